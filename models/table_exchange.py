"""Tables updated row by row, in training with several processes.

Torch's DistributedDataParallel reduces dense gradients. Sparse ones fail with NCCL, and with Gloo
where a process has no rows, so these tables are kept out of it: their rows are exchanged here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mneme.models.parameter_groups import row_updated
from mneme.models.row_gradients import row_gradient, sparse_rows

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
