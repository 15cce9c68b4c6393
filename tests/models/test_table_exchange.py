"""Processes exchange the rows of tables; here threads stand for them."""

import threading

import pytest
import torch
from torch import nn

from mneme.layers import ParamOptions
from mneme.models import optim
from mneme.models.optim import average_rows, leave_out_of_ddp
from tests.helpers import assert_close

N, D, RANKS = 10, 3, 3


class Table(nn.Module):
    def __init__(self, update="lazy"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(N, D))
        self.param_options = {"weight": ParamOptions(update=update)}


def tables(*gradients):
    net = nn.Sequential(nn.Linear(2, 2), *(Table() for _ in gradients), Table("dense"))
    for table, gradient in zip(net[1:-1], gradients, strict=True):
        table.weight.grad = gradient
    net[-1].weight.grad = torch.ones(N, D)
    return net


def touching(*rows):
    values = torch.randn(len(rows), D, dtype=torch.float)
    index = torch.tensor([rows], dtype=torch.long)
    return torch.sparse_coo_tensor(index, values, (N, D), check_invariants=True)


@pytest.fixture
def exchange(monkeypatch):
    """Runs `average_rows` on each module as if each were in a process of its own."""
    barrier, here, sent = threading.Barrier(RANKS, timeout=20), threading.local(), [None] * RANKS

    def gather(piece):
        sent[here.rank] = piece
        barrier.wait()
        received = list(sent)
        barrier.wait()
        assert len({tensor.shape for tensor in received}) == 1, "pieces must be of one size"
        return received

    monkeypatch.setattr(optim, "_processes", lambda: RANKS)
    monkeypatch.setattr(optim, "_gather", gather)

    def run(modules):
        def of(rank):
            here.rank = rank
            average_rows(modules[rank])

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


@pytest.mark.parametrize(
    "rows", [[(1, 4, 1, 9), (4,), (7, 2)], [(3, 5), (), (5,)], [(), (), ()], [(0,), None, (0, 1)]]
)
def test_all_processes_end_with_the_mean_of_the_gradients(exchange, rows):
    gradients = [None if r is None else touching(*r) for r in rows]
    dense = [torch.zeros(N, D) if g is None else g.to_dense() for g in gradients]
    modules = [tables(g, None, touching(rank)) for rank, g in enumerate(gradients)]
    exchange(modules)
    for module in modules:
        averaged = module[1].weight.grad
        assert averaged.is_coalesced()
        assert_close(averaged.to_dense(), sum(dense) / RANKS, "gradient", 1e-6)
        assert averaged.indices()[0].tolist() == sorted({i for r in rows for i in r or ()})
        assert torch.equal(averaged.values(), modules[0][1].weight.grad.values())
        assert module[2].weight.grad is None, "no process has a gradient"
        assert module[3].weight.grad.indices().tolist() == [[0, 1, 2]]
        assert torch.equal(module[-1].weight.grad, torch.ones(N, D)), "DDP's to reduce"


def test_one_process_keeps_its_gradient():
    gradient = touching(3, 3)
    module = tables(gradient)
    average_rows(module)
    assert module[1].weight.grad is gradient


def test_ddp_is_told_of_the_tables_under_all_their_names():
    module = tables(None, None)
    module.again = module[1]
    leave_out_of_ddp(module)
    ignored = module._ddp_params_and_buffers_to_ignore
    assert set(ignored) == {"1.weight", "2.weight", "again.weight"}
