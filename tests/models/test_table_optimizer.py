"""Tables are updated row by row: what is written, what is left alone, what a checkpoint keeps."""

import copy
import io
import pickle
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mneme.harness.config.compose import compose_checked
from mneme.harness.run.checkpoints import Interrupted, read_checkpoint
from mneme.harness.run.jobs import resume_run, start_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.layers import ParamOptions
from mneme.models.optim import (
    OptimizerWithTables,
    coalesced,
    make_optimizer,
    parameter_groups,
    row_gradient,
    row_updated,
)
from tests.harness.conftest import TINY
from tests.helpers import assert_close

N, D = 12, 4
ADAMW = partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


class Rows(nn.Module):
    """A table, read by row number."""

    def __init__(self, policy, sparse=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, D))
        self.param_options = {"weight": policy}
        self.sparse = sparse

    def forward(self, rows):
        return F.embedding(rows, self.weight, sparse=self.sparse)


class Net(nn.Module):
    """A table between two dense parts; `tabled` and its weight have a table's name and are none."""

    def __init__(self, policy=ParamOptions(update="lazy"), sparse=True):  # noqa: B008 (immutable)
        super().__init__()
        torch.manual_seed(0)
        self.tabled = nn.Linear(D, D)
        self.table = Rows(policy, sparse)
        self.table_weight = nn.Parameter(torch.randn(D, D))

    def forward(self, rows):
        return self.tabled(self.table(rows)) @ self.table_weight


def run(net, optimizer, batches):
    for rows in batches:
        optimizer.zero_grad()
        net(torch.tensor(rows, dtype=torch.long)).square().sum().backward()
        optimizer.step()


SOME = [[0, 3, 3, 5], [1, 3], [5, 5, 5, 11], [0, 2]]
EVERY = [[*range(N), 3, 3], list(range(N)), [*range(N), 0]]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lazy_on_rows_that_are_all_touched_is_adamw(decay):
    lazy = Net(ParamOptions(update="lazy", weight_decay=decay)).double()
    dense = Net(ParamOptions(weight_decay=decay), sparse=False).double()
    for net in (lazy, dense):
        run(net, make_optimizer(net, ADAMW), EVERY)
    for (name, a), b in zip(lazy.named_parameters(), dense.parameters(), strict=True):
        assert_close(a, b, name, 1e-13)


def test_rowwise_is_adagrad_with_one_accumulator_a_row():
    net = Net(ParamOptions(update="rowwise", weight_decay=0.3)).double()
    optimizer = make_optimizer(net, ADAMW)
    expected, sums = net.table.weight.detach().clone(), torch.zeros(N).double()
    for rows in SOME:
        run(net, optimizer, [rows])
        gradient = net.table.weight.grad.to_dense()
        for i in set(rows):
            sums[i] += gradient[i].square().mean()
            expected[i] *= 1 - 1e-2 * 0.3
            expected[i] -= 1e-2 * gradient[i] / (sums[i].sqrt() + 1e-6)
    assert_close(net.table.weight, expected, "table", 1e-13)
    state = optimizer.state[net.table.weight]
    assert state.keys() == {"sum"}
    assert_close(state["sum"], sums, "accumulators", 1e-13)


@pytest.mark.parametrize("update", ["lazy", "rowwise"])
def test_rows_that_are_not_touched_keep_every_bit(update):
    net = Net(ParamOptions(update=update, weight_decay=0.1))
    optimizer = make_optimizer(net, ADAMW)
    run(net, optimizer, SOME)
    state = optimizer.state[net.table.weight]
    tensors = {"weight": net.table.weight} | {n: v for n, v in state.items() if n != "step"}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    run(net, optimizer, [[1, 4, 4]])
    for name, tensor in tensors.items():
        changed = tensor.ne(before[name]).reshape(N, -1).any(1).nonzero()[:, 0].tolist()
        assert changed == [1, 4], name


def test_many_blocks_are_one_table(monkeypatch):
    nets = [Net(ParamOptions(update="lazy")).double() for _ in range(2)]
    run(nets[0], make_optimizer(nets[0], ADAMW), SOME)
    monkeypatch.setattr("mneme.models.optim._BLOCK_CPU", 1)
    run(nets[1], make_optimizer(nets[1], ADAMW), SOME)
    assert_close(nets[1].table.weight, nets[0].table.weight, "table", 1e-14)


def test_groups_hold_exactly_the_tables():
    net = Net(ParamOptions(update="lazy", lr_multiplier=3.0, weight_decay=0.2, clip_group="tables"))
    optimizer = make_optimizer(net, ADAMW)
    treated = {
        id(p): (group["lr"], group["weight_decay"], group.get("update"))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert treated == {
        id(net.table.weight): (pytest.approx(3e-2), 0.2, "lazy"),
        id(net.tabled.weight): (1e-2, 0.1, None),
        id(net.tabled.bias): (1e-2, 0.0, None),
        id(net.table_weight): (1e-2, 0.1, None),
    }
    assert row_updated(net) == [net.table.weight]


def test_the_largest_rate_holds_after_the_multiplier_and_the_scheduler_multiplies_all():
    net = Net(ParamOptions(update="lazy", lr_multiplier=3.0, max_lr=2e-2))
    optimizer = make_optimizer(net, ADAMW)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [1e-2, 1e-2, 2e-2]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run(net, optimizer, [[0]])
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in rates]
    assert [group["lr"] for group in optimizer.dense.param_groups] == [5e-3, 5e-3]


@pytest.mark.parametrize(
    ("policy", "decay"),
    [
        (ParamOptions(), 0.1),
        (ParamOptions(weight_decay=0.2), 0.2),
        (ParamOptions(decays=False, weight_decay=0.2), 0.0),
    ],
)
def test_a_weight_decay_of_its_own_holds_where_a_parameter_decays(policy, decay):
    net = Net(policy, sparse=False)
    optimizer = make_optimizer(net, ADAMW)
    assert type(optimizer) is torch.optim.AdamW
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(net.table.weight)] == decay


class Shared(nn.Module):
    """Two readers of one table, of which the first says nothing about it."""

    param_options: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, N, bias=False)
        self.first, self.second = (
            Rows(ParamOptions(update="lazy")),
            Rows(ParamOptions(update="lazy")),
        )
        self.head.weight = self.second.weight = self.first.weight

    def forward(self, rows):
        return self.first(rows) + self.second(rows.flip(0) + 1)


def test_a_shared_table_is_listed_once_and_gets_the_sum_of_its_gradients():
    net = Shared()
    (group,) = parameter_groups(net)
    assert group["params"] == [net.first.weight]
    assert group["update"] == "lazy"
    net(torch.tensor([0, 2])).sum().backward()
    gradient = row_gradient(net.first.weight.grad)
    assert gradient.indices().tolist() == [[0, 1, 2, 3]]
    run(net, make_optimizer(net, ADAMW), [[0, 2], [0, 2]])


def test_accumulated_sparse_gradients_are_the_dense_gradient():
    nets = [Net(ParamOptions(update="lazy"), sparse=sparse).double() for sparse in (True, False)]
    for net in nets:
        optimizer = make_optimizer(net, ADAMW)
        for rows in (SOME[0], SOME[1], SOME[0]):
            net(torch.tensor(rows)).square().sum().backward()
        optimizer.step()
    touched = row_gradient(nets[0].table.weight.grad)
    assert touched.indices().tolist() == [[0, 1, 3, 5]]
    assert_close(touched.to_dense(), nets[1].table.weight.grad, "gradient", 1e-13)
    assert_close(nets[0].table.weight, nets[1].table.weight, "table", 1e-13)


def test_a_dense_gradient_touches_the_rows_where_it_is_not_zero():
    gradient = torch.zeros(N, D)
    gradient[2, 1], gradient[7, 0] = 3.0, torch.nan
    sparse = row_gradient(gradient)
    assert sparse.is_coalesced()
    assert sparse.indices().tolist() == [[2, 7]]
    net = Net(ParamOptions(update="lazy"), sparse=False)
    before = net.table.weight.detach().clone()
    run(net, make_optimizer(net, ADAMW), [[0, 3, 3]])
    changed = net.table.weight.ne(before).any(1).nonzero()[:, 0].tolist()
    assert changed == [0, 3]


def test_a_gradient_without_rows_changes_nothing():
    net = Net(ParamOptions(update="lazy"))
    before = net.table.weight.detach().clone()
    run(net, make_optimizer(net, ADAMW), [[]])
    assert torch.equal(net.table.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", ["lazy", "rowwise"])
def test_a_saved_optimizer_goes_on_bit_by_bit(update, dtype):
    net = Net(ParamOptions(update=update, weight_decay=0.1)).to(dtype)
    optimizer = make_optimizer(net, ADAMW)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    run(net, optimizer, SOME)
    scheduler.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copied = copy.deepcopy(net)
    resumed = make_optimizer(copied, ADAMW)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for value in resumed.state[copied.table.weight].values():
        assert not torch.is_tensor(value) or value.dtype == torch.float32
    for one, other in ((net, optimizer), (copied, resumed)):
        run(one, other, SOME)
    for (name, a), b in zip(copied.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in b)


def test_a_bf16_table_is_updated_in_fp32():
    wide = Net(ParamOptions(update="lazy"))
    narrow = copy.deepcopy(wide)
    narrow.table.to(torch.bfloat16)
    wide.table.load_state_dict(narrow.table.state_dict())
    optimizers = [make_optimizer(net, ADAMW) for net in (wide, narrow)]
    for _ in range(3):
        gradient = torch.randn(2, D).bfloat16()
        for net, optimizer in zip((wide, narrow), optimizers, strict=True):
            weight = net.table.weight
            weight.grad = torch.sparse_coo_tensor(
                [[1, 4]], gradient.to(weight.dtype), (N, D), check_invariants=True
            )
            optimizer.step()
    states = [o.state[o.table_groups[0]["params"][0]] for o in optimizers]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(states[0][name], states[1][name])
    assert_close(narrow.table.weight.float(), wide.table.weight, "table", 5e-3)


@pytest.mark.parametrize("option", ["maximize", "amsgrad"])
def test_options_that_row_updates_do_not_follow_are_refused(option):
    factory = partial(ADAMW, **{option: True})
    with pytest.raises(ValueError, match=f"{option}=True is not for tables .* update 'dense'"):
        make_optimizer(Net(), factory)
    assert make_optimizer(Net(ParamOptions(), sparse=False), factory).param_groups[0][option]


def test_an_update_that_does_not_exist_is_refused():
    optimizer = make_optimizer(Net(), ADAMW)
    table = nn.Parameter(torch.randn(N, D))
    with pytest.raises(ValueError, match="update must be one of 'lazy', 'rowwise'; got 'sparse'"):
        optimizer.add_param_group({"params": [table], "update": "sparse"})
    assert len(optimizer.param_groups) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_optimizer_goes_on_bit_by_bit(copied):
    net = Net(ParamOptions(update="lazy", weight_decay=0.1))
    optimizer = make_optimizer(net, ADAMW)
    run(net, optimizer, SOME)
    twin, its_optimizer = copied((net, optimizer))
    assert its_optimizer.dense is not optimizer.dense
    for one, other in ((net, optimizer), (twin, its_optimizer)):
        for group in other.param_groups:
            group["lr"] *= 0.5
        run(one, other, SOME)
    for (name, a), b in zip(twin.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b), name


def unfrozen_later(dtype=torch.float32, batches=SOME):
    """Two nets and one optimizer, which has the second only after some steps of the first."""
    first, second = Net().to(dtype), Net(ParamOptions(update="rowwise", weight_decay=0.1)).to(dtype)
    optimizer = make_optimizer(first, ADAMW)
    run(first, optimizer, batches)
    for group in parameter_groups(second):  # two of dense parameters, then one of the table
        optimizer.add_param_group(group)
    return nn.ModuleList([first, second]), optimizer


def step_both(nets, optimizer, batches):
    for rows in batches:
        optimizer.zero_grad()
        sum(net(torch.tensor(rows)).square().sum() for net in nets).backward()
        optimizer.step()


def test_groups_may_be_added_after_the_first_step():
    nets, optimizer = unfrozen_later()
    updates = [group.get("update") for group in optimizer.param_groups]
    assert updates == [None, None, "lazy", None, None, "rowwise"]
    apart = copy.deepcopy(nets)
    alone = Net()
    own = [make_optimizer(alone, ADAMW), make_optimizer(apart[1], ADAMW)]
    run(alone, own[0], SOME)
    for net, one in zip((alone, apart[1]), own, strict=True):
        run(net, one, SOME)
    step_both(nets, optimizer, SOME)
    for net, expected in zip(nets, (alone, apart[1]), strict=True):
        for (name, a), b in zip(net.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b), name
    assert optimizer.state[nets[1].table.weight].keys() == {"sum"}


def test_a_saved_optimizer_with_added_groups_goes_on_bit_by_bit():
    nets, optimizer = unfrozen_later(torch.bfloat16)
    step_both(nets, optimizer, SOME)
    copied, resumed = unfrozen_later(torch.bfloat16, batches=[])
    copied.load_state_dict(nets.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net in copied:
        state = resumed.state[net.table.weight]
        assert all(v.dtype == torch.float32 for v in state.values() if torch.is_tensor(v))
    for one, other in ((nets, optimizer), (copied, resumed)):
        step_both(one, other, SOME)
    for (name, a), b in zip(copied.named_parameters(), nets.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_closure_is_what_makes_the_gradients():
    net = Net()
    optimizer = make_optimizer(net, ADAMW)
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        loss = net(torch.tensor([0, 1])).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


OTHERS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}  # closures, sparse or matrices only
OPTIMIZERS = [
    cls for name, cls in vars(torch.optim).items() if isinstance(cls, type) and name not in OTHERS
]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_any_optimizer_may_be_chosen_for_the_dense_parameters(cls):
    momentum = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    net = Net(ParamOptions(update="lazy", lr_multiplier=0.5))
    optimizer = make_optimizer(net, partial(cls, lr=1e-2, **momentum))
    assert isinstance(optimizer, OptimizerWithTables)
    run(net, optimizer, SOME)
    assert optimizer.state[net.table.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[net.tabled.weight]


def test_tables_may_be_all_that_is_trained():
    net = Net()
    net.tabled.requires_grad_(False)
    net.table_weight.requires_grad_(False)
    before = net.table.weight.detach().clone()
    run(net, make_optimizer(net, ADAMW), [[0]])
    assert not torch.equal(net.table.weight, before)


def test_a_row_update_needs_a_table():
    net = nn.Linear(D, D)
    net.param_options = {"bias": ParamOptions(update="lazy")}
    with pytest.raises(ValueError, match=r"Linear\.bias has 1 axes; the update 'lazy' is for tab"):
        make_optimizer(net, ADAMW)


PKM = (
    *(option for option in TINY if option != "ffn=none"),
    "ffn=pkm",
    "ffn.heads=2",
    "ffn.sub_keys=8",
    "ffn.top_k=4",
    "checkpoint_every=1",
)


def test_a_run_with_tables_resumes_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    runs = {}
    for name in ("whole", "stopped"):
        composed = compose_checked([*PKM, f"run_dir={tmp_path / name}"])
        if name == "whole":
            runs[name], _ = start_run(composed)
            continue
        with monkeypatch.context() as patch:
            patch.setattr(
                "mneme.harness.run.checkpoints.StopOnSignal.end_of_step", stop_at_the_third
            )
            with pytest.raises(Interrupted):
                start_run(composed)
        runs[name] = type(runs["whole"])(tmp_path / name)
        resume_run(str(runs[name].path))
    assert read_metrics(runs["stopped"].metrics) == read_metrics(runs["whole"].metrics)
    weights = [read_checkpoint(run.last)["state_dict"] for run in runs.values()]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def stop_at_the_third(callback, trainer):
    if trainer.global_step == 3:
        raise Interrupted(15, 3, callback.checkpoints.run.path)


def test_a_gradient_that_lost_its_mark_is_not_sorted_again():
    values = torch.arange(6.0).view(3, 2)
    for rows, copied in (([1, 4, 7], False), ([4, 1, 7], True), ([1, 1, 7], True)):
        index = torch.tensor([rows])
        gradient = torch.sparse_coo_tensor(index, values, (9, 2), check_invariants=False)
        found = coalesced(gradient)
        assert found.is_coalesced()
        assert (found.values().data_ptr() != values.data_ptr()) == copied
        torch.testing.assert_close(found.to_dense(), gradient.to_dense())
