"""Updates of large tables that write only the rows that have a gradient.

N rows of D entries, of which a step touches U. A step costs time in U, not in N.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mneme.models.row_gradients import row_gradient

# Entries of a table that are worked on together. On a CPU they and their state stay in the cache of
# a core (256 KiB a stream): twice as fast as all rows at once. On a GPU few launches count more.
_BLOCK_CPU, _BLOCK_GPU = 2**16, 2**24

BETAS, EPS = (0.9, 0.999), 1e-8
"""For tables, where the dense optimizer has no such options: those of torch's AdamW."""


class OptimizerWithTables(torch.optim.Optimizer):
    """One optimizer: a dense one for most parameters, row updates for tables.

    It takes over the parameter groups of `dense` that have an option `update` ("lazy" or "rowwise",
    see `lazy_adamw_` and `rowwise_adagrad_`). Its own groups are the remaining ones of `dense`,
    then the tables', and its state is that of `dense`: schedulers, checkpoints and closures see a
    single optimizer. Of the options of `dense`, tables use `lr`, `weight_decay`, `betas` and `eps`.

    Gradients of tables may be sparse (coalesced or not) or dense: see `row_gradient`. Groups added
    later are told apart by `update` as well.

    Args:
        dense: made over all parameters; it must not have stepped yet.

    Raises:
        ValueError: row updates are to maximize or to keep the largest second moments.
    """

    def __init__(self, dense: torch.optim.Optimizer) -> None:
        groups = dense.param_groups
        tables = [group for group in groups if "update" in group]
        for table in chain.from_iterable(group["params"] for group in tables):
            dense.state.pop(table, None)  # some optimizers make their state at once
        dense.param_groups = []  # until they are added again
        self.dense = dense
        super().__init__([*(g for g in groups if "update" not in g), *tables], dense.defaults)
        self.state = dense.state

    @property
    def table_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of tables."""
        return [group for group in self.param_groups if "update" in group]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, which are tables if the group has an option `update`.

        Raises:
            ValueError: row updates have no such option, or a parameter is in a group already.
        """
        if "update" in param_group:
            _check_table_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if "update" not in param_group:
            self.dense.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.dense.step()
        for group in self.table_groups:
            for table in group["params"]:
                if table.grad is not None:
                    UPDATES[group["update"]](table, self.state[table], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, of tables in the precision in which it was saved."""
        super().load_state_dict(state_dict)
        saved_groups = (group for group in state_dict["param_groups"] if "update" in group)
        numbers = chain.from_iterable(group["params"] for group in saved_groups)
        tables = chain.from_iterable(group["params"] for group in self.table_groups)
        for table, number in zip(tables, numbers, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                on_device = value.to(table.device) if isinstance(value, Tensor) else value
                self.state[table][name] = on_device

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: the dense optimizer as well."""
        return {**super().__getstate__(), "dense": self.dense}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over groups and state, which are the dense optimizer's too."""
        super().__setstate__(state)
        groups = [group for group in self.param_groups if "update" not in group]
        self.dense.__setstate__({"state": self.state, "param_groups": groups})


def lazy_adamw_(table: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW on the rows that have a gradient; other rows and their state keep every bit.

    The moments' bias is corrected by the number of steps of the table, not of the row: the rule of
    torch's SparseAdam. Weight decay is AdamW's, on touched rows only, so a row that is rarely read
    decays as rarely. If every row is touched at every step, this is torch's AdamW.

    The state is `[N, D]` twice, in fp32 or wider, as is the step of a bf16 table until it is added.
    """
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(table, dtype=_wide(table))
        state["exp_avg_sq"] = torch.zeros_like(table, dtype=_wide(table))
    state["step"] += 1
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    beta1, beta2 = group.get("betas", BETAS)
    # lr * (m / c1) / (sqrt(v / c2) + eps), with the corrections c taken out of the rows
    root = (1 - beta2 ** state["step"]) ** 0.5
    rate = float(group["lr"]) * root / (1 - beta1 ** state["step"])
    eps = _eps(group) * root
    for rows, gradient in _blocks(table):
        m = mean.index_select(0, rows).lerp_(gradient, 1 - beta1)
        v = square.index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean.index_copy_(0, rows, m)
        square.index_copy_(0, rows, v)
        _descend(table, rows, m.div_(v.sqrt_().add_(eps)).mul_(rate), group)


def rowwise_adagrad_(table: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Adagrad with one accumulator a row, on the rows that have a gradient.

        s_i <- s_i + mean_j g_ij^2
        w_i <- (1 - lr * weight_decay) w_i - lr * g_i / (sqrt(s_i) + eps)

    This is FBGEMM's exact row-wise Adagrad (`EXACT_ROWWISE_ADAGRAD`) with decoupled decay. The
    state is `[N]`, in fp32 or wider, as is the step of a bf16 table until it is added.
    """
    if not state:
        state["sum"] = torch.zeros(len(table), dtype=_wide(table), device=table.device)
    sums, lr, eps = state["sum"], float(group["lr"]), _eps(group)
    for rows, gradient in _blocks(table):
        s = sums.index_select(0, rows).add_(gradient.square().mean(1))
        sums.index_copy_(0, rows, s)
        _descend(table, rows, gradient * (lr / s.sqrt_().add_(eps))[:, None], group)


UPDATES = {"lazy": lazy_adamw_, "rowwise": rowwise_adagrad_}


def _check_table_group(group: dict[str, Any]) -> None:
    """Raises ValueError for options of a table's group that row updates would not follow."""
    update = group["update"]
    if update not in UPDATES:
        raise ValueError(f"update must be one of {', '.join(map(repr, UPDATES))}; got {update!r}")
    for option in ("maximize", "amsgrad"):
        if group.get(option):
            raise ValueError(
                f"{option}=True is not for tables that are updated row by row ({update!r}): leave "
                "it out of the optimizer, or give the tables the update 'dense'"
            )


def _blocks(table: nn.Parameter) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of the rows `[u]` that have a gradient, and of it `[u, D]`, in fp32 or wider."""
    assert table.grad is not None
    gradient = row_gradient(table.grad)
    block = _BLOCK_GPU if table.is_cuda else _BLOCK_CPU * torch.get_num_threads()
    size = max(1, block // table.shape[1])
    pieces = zip(gradient.indices()[0].split(size), gradient.values().split(size), strict=True)
    return ((rows, values.to(_wide(table))) for rows, values in pieces)


def _descend(table: nn.Parameter, rows: Tensor, step: Tensor, group: dict[str, Any]) -> None:
    """Subtracts a step `[u, D]`, which is overwritten, and the weight decay from some rows."""
    decay = float(group["lr"]) * group.get("weight_decay", 0.0)
    if decay:
        step.add_(table.index_select(0, rows), alpha=decay)
    table.index_add_(0, rows, step.to(table.dtype), alpha=-1)


def _eps(group: dict[str, Any]) -> float:
    """What the dense optimizer adds to roots; Adafactor's pair is of other places."""
    eps = group.get("eps", EPS)
    return EPS if isinstance(eps, tuple | list) else eps


def _wide(table: Tensor) -> torch.dtype:
    return torch.promote_types(table.dtype, torch.float32)
