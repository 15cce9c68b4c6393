"""`PEER` is the layer of PEER-pytorch 0.2.2."""

import pytest
import torch
from PEER_pytorch import PEER as TheirPEER
from torch import nn
from torch.nn import functional as F

from mneme.layers import PEER, TableOptions
from tests.peers.compare import assert_same, peer
from tests.peers.mappings.peer_pytorch import peer_options, peer_weights

CASES = {
    "one expert a head": {"dim": 10, "heads": 5, "num_experts": 49, "num_experts_per_head": 4},
    "softmax": {
        "dim": 8,
        "heads": 3,
        "num_experts": 25,
        "num_experts_per_head": 4,
        "non_competing_scores": False,
    },
    "wide search": {
        "dim": 6,
        "heads": 2,
        "num_experts": 36,
        "num_experts_per_head": 3,
        "product_key_topk": 5,
        "dim_key": 7,
        "non_competing_scores": False,
    },
    "relu": {
        "dim": 6,
        "heads": 2,
        "num_experts": 16,
        "num_experts_per_head": 3,
        "activation": nn.ReLU,
        "non_competing_scores": False,
    },
    "norm before": {
        "dim": 8,
        "heads": 2,
        "num_experts": 25,
        "num_experts_per_head": 2,
        "pre_rmsnorm": True,
        "non_competing_scores": False,
    },
    "own experts": {
        "dim": 4,
        "heads": 1,
        "num_experts": 9,
        "num_experts_per_head": 2,
        "separate_embed_per_head": True,
    },
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())
def test_layer(arguments):
    dim, options = arguments["dim"], peer_options(**arguments)
    theirs = peer(lambda: TheirPEER(**arguments))
    ours = PEER(dim, **options, table=TableOptions(update="dense"))
    if arguments.get("pre_rmsnorm"):
        ours.register_forward_pre_hook(
            lambda _, inputs: (F.normalize(inputs[0], dim=-1) * dim**0.5,)
        )
    x = torch.randn(2, 9, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same(ours, theirs, peer_weights, x)


def test_what_ours_cannot_be_is_refused():
    with pytest.raises(ValueError, match="separate_embed_per_head must be false"):
        peer_options(dim=8, separate_embed_per_head=True)
    with pytest.raises(ValueError, match="product_key_topk must be 16 or more, got 4"):
        peer_options(dim=8, product_key_topk=4, non_competing_scores=False)
    with pytest.raises(ValueError, match="activation must be GELU, ReLU or Identity, got Tanh"):
        peer_options(dim=8, activation=nn.Tanh)
