"""How parameters are updated: groups, optimizers of dense parameters and of tables, clipping.

N rows of D entries of a table, of which a step touches U. A step costs time in U, not in N.

In an update, `SequenceModule` has the processes' row gradients averaged (`average_rows`), clips
each group of parameters by its own norm (`clip_by_groups`), and steps the optimizer that
`make_optimizer` made: `OptimizerWithTables` where tables are updated row by row.

Torch's DistributedDataParallel reduces dense gradients. Sparse ones fail with NCCL, and with Gloo
where a process has no rows, so these tables are kept out of it: their rows are exchanged here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mneme.layers.protocol import NO_OPTIONS, ParamOptions


def row_gradient(gradient: Tensor) -> Tensor:
    """The gradient of a table as a coalesced sparse tensor of the rows that were touched.

    A dense gradient does not say which rows were read: its rows that are all zero count as
    untouched. The update is then that of the sparse gradient, but for rows that were read and
    have a gradient of exactly zero.
    """
    if gradient.is_sparse:
        return coalesced(gradient)
    rows = gradient.ne(0).any(1).nonzero()[:, 0]
    return sparse_rows(rows, gradient[rows], gradient.shape, is_coalesced=True)


def sparse_rows(rows: Tensor, values: Tensor, shape: torch.Size, *, is_coalesced: bool) -> Tensor:
    """The sparse tensor `[N, D]` of some rows `[U]` with values `[U, D]`."""
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=is_coalesced, check_invariants=False
    )


def coalesced(gradient: Tensor) -> Tensor:
    """The same sparse gradient with each row once, in order.

    `backward` forgets that a leaf's gradient is so already, and sorting and copying it again would
    be a quarter of a training step.
    """
    rows = gradient._indices()[0]
    if not gradient.is_coalesced() and bool((rows[1:] > rows[:-1]).all()):
        return sparse_rows(rows, gradient._values(), gradient.shape, is_coalesced=True)
    return gradient.coalesce()


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


_NO_GRADIENT = -1  # in place of a number of rows


def leave_out_of_ddp(module: nn.Module) -> None:
    """Marks the row-updated tables of a module that is going to be wrapped."""
    tables = set(row_updated(module))
    names = [n for n, p in module.named_parameters(remove_duplicate=False) if p in tables]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


@torch.no_grad()
def start_equal(module: nn.Module) -> None:
    """Gives every process the first one's row-updated tables, as DDP does for what it wraps."""
    if _processes() > 1:
        for table in row_updated(module):
            distributed.broadcast(table, src=0)


@torch.no_grad()
def average_rows(module: nn.Module) -> None:
    """Replaces the gradients of row-updated tables by their means over all processes.

    A row that one process has not touched counts as zero there. Processes may have touched
    different numbers of rows, or none; all end with the same gradient to the bit.
    """
    tables = row_updated(module) if _processes() > 1 else []
    if not tables:
        return
    gradients = [None if t.grad is None else row_gradient(t.grad) for t in tables]
    touched = [_NO_GRADIENT if g is None else len(g.values()) for g in gradients]
    counts = torch.stack(_gather(torch.tensor(touched, device=tables[0].device)))  # [P, tables]
    for table, gradient, sizes in zip(tables, gradients, counts.T.tolist(), strict=True):
        if max(sizes) != _NO_GRADIENT:
            table.grad = _average(table, gradient, [max(size, 0) for size in sizes])


def _average(table: nn.Parameter, gradient: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """The mean over processes, of which each has touched one of `sizes` rows."""
    if gradient is None:
        rows, values = table.new_empty(0, dtype=torch.long), table.new_empty(0, table.shape[1])
    else:
        rows, values = gradient.indices()[0], gradient.values() / len(sizes)
    missing = max(sizes) - len(rows)  # pieces of unequal size cannot be gathered
    all_rows = _gather(F.pad(rows, (0, missing)))
    all_values = _gather(F.pad(values, (0, 0, 0, missing)))
    gathered = sparse_rows(
        torch.cat([piece[:size] for piece, size in zip(all_rows, sizes, strict=True)]),
        torch.cat([piece[:size] for piece, size in zip(all_values, sizes, strict=True)]),
        table.shape,
        is_coalesced=False,
    )
    return gathered.coalesce()


def _gather(piece: Tensor) -> list[Tensor]:
    """The pieces of all processes, in their order."""
    pieces = [torch.empty_like(piece) for _ in range(_processes())]
    distributed.all_gather(pieces, piece)
    return pieces


def _processes() -> int:
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def make_optimizer(
    model: nn.Module, factory: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups`, each at the learning rate of its options.

    A scheduler multiplies these rates. Where tables are updated row by row, the optimizer is
    wrapped in `OptimizerWithTables`.

    Raises:
        ValueError: the optimizer has an option that row updates do not follow.
    """
    optimizer = factory(parameter_groups(model))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("lr_multiplier", 1.0)
        if group["max_lr"] is not None:
            group["lr"] = min(group["lr"], group["max_lr"])
    return with_tables(optimizer)


def with_tables(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, or one that writes the tables of its groups row by row, if any are."""
    by_rows = any("update" in group for group in optimizer.param_groups)
    return OptimizerWithTables(optimizer) if by_rows else optimizer


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Splits the parameters into those that are treated alike.

    Parameters with two or more axes decay (linear maps, embeddings, filters, learned tokens).
    Vectors and scalars do not, which covers norms, biases and most decay parameters of gates, where
    decay would change how long a memory lasts. `param_options` of the layers that own them exempt
    others, such as the initial weights of a test-time memory, say how fast theirs may learn and
    which are updated row by row. A `ParameterList` has the options that its owner gives its name.
    """
    groups: dict[ParamOptions, list[nn.Parameter]] = defaultdict(list)
    for parameter, options in param_options_of(model).items():
        if parameter.requires_grad:
            groups[_as_optimized(parameter, options)].append(parameter)
    return [{"params": found, **_group_options(options)} for options, found in groups.items()]


def row_updated(model: nn.Module) -> list[nn.Parameter]:
    """The tables whose updates touch only the rows that have a gradient."""
    return [p for p, options in param_options_of(model).items() if options.update != "dense"]


def param_options_of(model: nn.Module) -> dict[nn.Parameter, ParamOptions]:
    """Every parameter once, in the model's order, with what the module that owns it says of it.

    If several modules share a parameter, the first that has options for it decides.

    Raises:
        ValueError: a row update is asked for what is not a table `[N, D]`.
    """
    found: dict[nn.Parameter, ParamOptions] = {}
    for module in model.modules():
        param_options = getattr(module, "param_options", {})
        for name, parameter in _own_parameters(module):
            options = param_options.get(name, NO_OPTIONS)
            if options.update != "dense" and parameter.ndim != 2:
                raise ValueError(
                    f"{type(module).__name__}.{name} has {parameter.ndim} axes; the update "
                    f"{options.update!r} is for tables [N, D] and has two"
                )
            if found.get(parameter, NO_OPTIONS) == NO_OPTIONS:
                found[parameter] = options
    return found


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a module names: its own, and those of lists under the list's name."""
    yield from module.named_parameters(recurse=False)
    for name, child in module.named_children():
        if isinstance(child, nn.ParameterList):
            yield from ((name, parameter) for parameter in child.parameters())


def _as_optimized(parameter: nn.Parameter, options: ParamOptions) -> ParamOptions:
    """What the optimizer needs of the options: equal for parameters that are treated alike."""
    decays = options.decays and parameter.ndim >= 2
    return options._replace(
        decays=True, weight_decay=options.weight_decay if decays else 0.0, clip_group=None
    )


def _group_options(options: ParamOptions) -> dict[str, Any]:
    """The options of a parameter group; what is left out is the optimizer's own."""
    group: dict[str, Any] = {"max_lr": options.max_lr}
    if options.weight_decay is not None:
        group["weight_decay"] = options.weight_decay
    if options.lr_multiplier != 1:
        group["lr_multiplier"] = options.lr_multiplier
    if options.update != "dense":
        group["update"] = options.update
    return group


MAIN = None
"""The clip group of parameters whose options names none."""

_EPS = 1e-6  # added to a norm before dividing by it, as torch does


@torch.no_grad()
def clip_by_groups(model: nn.Module, limit: float) -> dict[str | None, Tensor]:
    """Scales down, in place, the gradients of each clip group whose global norm is above `limit`.

    Args:
        model: its modules' `param_options` name the groups; parameters without one form `MAIN`.
        limit: for the norm of every group alone; infinity scales nothing.

    Returns:
        The norm of each group before clipping, 0 where it has no gradient.
    """
    groups: dict[str | None, list[nn.Parameter]] = defaultdict(list, {MAIN: []})
    for parameter, options in param_options_of(model).items():
        groups[options.clip_group].append(parameter)
    return {name: _clip(parameters, limit) for name, parameters in groups.items()}


def _clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """As torch's `clip_grad_norm_`, which refuses sparse gradients on the CPU."""
    if not any(p.grad is not None and p.grad.is_sparse for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    values = [_values(p) for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(values)
    scale = limit / (norm + _EPS)
    if scale < 1:
        torch._foreach_mul_(values, scale)
    return norm


def _values(parameter: nn.Parameter) -> Tensor:
    """The gradient's entries, as they are: of a sparse one, its coalesced rows."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = coalesced(parameter.grad)
    return parameter.grad.values()
