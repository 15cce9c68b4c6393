"""The hash that ties a bank to its base model."""

import pytest
import torch
from torch import nn

from mneme.models.bank import model_hash


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.bank = nn.Linear(3, 4), nn.Linear(2, 2)
        self.bankers = nn.Embedding(3, 2, dtype=torch.bfloat16)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", torch.zeros(0))


def test_a_hash_is_the_same_after_saving_and_loading(tmp_path):
    net = Net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = Net()
    assert model_hash(loaded) != model_hash(net)
    loaded.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert model_hash(loaded) == model_hash(net)
    assert len(model_hash(net)) == 64


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("inner.weight", True),
        ("bankers.weight", True),
        ("count", True),
        ("scratch", False),
        ("bank.weight", False),
    ],
)
def test_a_hash_is_that_of_all_but_the_bank(name, matters):
    net = Net()
    before = model_hash(net)
    net.get_parameter(name).data.add_(1) if "." in name else net.get_buffer(name).add_(1)
    assert (model_hash(net) != before) == matters
    assert model_hash(net, leave_out=()) != model_hash(net)


def test_a_hash_tells_shapes_and_dtypes_apart():
    same_bytes, hashes = torch.ones(3, 4), set()
    for tensor in (same_bytes, same_bytes.view(4, 3), same_bytes.view(torch.int32)):
        module = nn.Module()
        module.register_buffer("w", tensor)
        hashes.add(model_hash(module))
    assert len(hashes) == 3
