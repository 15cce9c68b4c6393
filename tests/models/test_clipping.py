"""Gradients are clipped by group, sparse ones too, and what is not finite is named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mneme.layers import ParamOptions
from mneme.models.diagnosis import nonfinite_gradients
from mneme.models.optim import MAIN, clip_by_groups


class Table(nn.Module):
    def __init__(self, group, sparse):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 3))
        self.param_options = {"weight": ParamOptions(update="lazy", clip_group=group)}
        self.sparse = sparse


class Net(nn.Module):
    def __init__(self, group="tables", sparse=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 5)
        self.table = Table(group, sparse)
        self.last = nn.Linear(5, 2)

    def backward(self):
        rows = torch.tensor([1, 4, 1, 7])
        read = F.embedding(rows, self.table.weight, sparse=self.table.sparse)
        (10 * self.last(self.first(read).tanh())).square().sum().backward()
        return self


def gradients(net):
    return {n: p.grad.to_dense().clone() for n, p in net.named_parameters()}


def norm(*tensors):
    return torch.cat([t.flatten() for t in tensors]).norm()


@pytest.mark.parametrize("limit", [1.0, 1e6, float("inf")])
def test_without_groups_it_is_torchs_own_to_the_bit(limit):
    ours, torchs = Net(None, sparse=False).backward(), Net(None, sparse=False).backward()
    norms = clip_by_groups(ours, limit)
    assert norms.keys() == {MAIN}
    assert torch.equal(norms[MAIN], nn.utils.clip_grad_norm_(torchs.parameters(), limit))
    for name, gradient in gradients(torchs).items():
        assert torch.equal(ours.get_parameter(name).grad, gradient), name


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("limit", [1.0, 1e6])
def test_each_group_is_scaled_by_its_own_norm(sparse, limit):
    net = Net(sparse=sparse).backward()
    before = gradients(net)
    table = before.pop("table.weight")
    norms = clip_by_groups(net, limit)
    assert norms.keys() == {MAIN, "tables"}
    torch.testing.assert_close(norms["tables"], norm(table))
    torch.testing.assert_close(norms[MAIN], norm(*before.values()))
    after = gradients(net)
    expected = table * min(1.0, limit / norm(table).item())
    torch.testing.assert_close(after.pop("table.weight"), expected)
    for name, gradient in after.items():
        scale = min(1.0, limit / norms[MAIN].item())
        torch.testing.assert_close(gradient, before[name] * scale, msg=name)


def test_a_sparse_gradient_in_the_main_group_counts_as_the_dense_one():
    nets = [Net(None, sparse=sparse).backward() for sparse in (True, False)]
    norms = [clip_by_groups(net, 1.0)[MAIN] for net in nets]
    torch.testing.assert_close(*norms)
    for name, gradient in gradients(nets[0]).items():
        torch.testing.assert_close(gradient, gradients(nets[1])[name], msg=name)


def test_rows_that_occur_twice_are_added_before_the_norm():
    net = Net()
    net.table.weight.grad = torch.sparse_coo_tensor(
        [[2, 2]], torch.tensor([[3.0, 0, 0], [1.0, 0, 3.0]]), (9, 3), check_invariants=True
    )
    assert clip_by_groups(net, 2.5)["tables"] == 5
    torch.testing.assert_close(net.table.weight.grad.to_dense()[2], torch.tensor([2.0, 0, 1.5]))


def test_a_group_without_gradients_has_norm_zero():
    assert clip_by_groups(Net(), 1.0) == {MAIN: 0, "tables": 0}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sparse_gradient_that_is_not_finite_is_named(value):
    net = Net().backward()
    assert nonfinite_gradients(net) == []
    net.table.weight.grad = net.table.weight.grad.coalesce()
    net.table.weight.grad.values()[0, 1] = value
    norms = clip_by_groups(net, 1.0)
    assert norms[MAIN].isfinite()
    assert not norms["tables"].isfinite()
    assert nonfinite_gradients(net) == ["table.weight"]
