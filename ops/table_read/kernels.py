"""Reads of a table and the gradient of its rows, without copies of all the rows looked up.

Everything here is library calls without autograd; `read.py` puts the gradients on.

Shapes: N rows of the table, D width, T tokens, m lookups of each, U rows that are looked up.
"""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_BLOCK_ELEMENTS = 2**17  # of rows that are lifted to the precision of the arithmetic together
_LONGEST = 256  # lookups added up one after the other; longer runs are summed in two stages

# y_i = table[rows_i] . x[token_i], the gradient of a weighted bag with respect to its weights
_bag_products = torch.ops.aten._embedding_bag_per_sample_weights_backward


def weighted_sums(
    table: Float[Tensor, "N D"], rows: Int[Tensor, "T m"], weights: Float[Tensor, "T m"]
) -> Float[Tensor, "T D"]:
    """`y_t = sum_j weights[t, j] * table[rows[t, j]]` in the dtype of the weights."""
    if rows.numel() == 0:
        return weights.new_zeros(rows.shape[0], table.shape[1])
    if table.dtype != weights.dtype:
        return _lifted(weighted_sums, table, rows, weights)
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


def products(
    table: Float[Tensor, "N D"], rows: Int[Tensor, "T m"], x: Float[Tensor, "T D"]
) -> Float[Tensor, "T m"]:
    """`y_{t,j} = table[rows[t, j]] . x_t` in the dtype of x.

    They are entries of the matrix `x table^T`, and on a CPU the library computes chosen entries of
    such a product best; that they come in any order and repeatedly is all the same to it.
    """
    if rows.numel() == 0:
        return x.new_zeros(rows.shape)
    if table.dtype != x.dtype:
        return _lifted(products, table, rows, x)
    tokens, lookups = rows.shape
    if rows.device.type != "cpu" or lookups > table.shape[0]:  # than entries in a row of x table^T
        token = torch.arange(tokens, device=rows.device).repeat_interleave(lookups)
        return _bag_products(x, table, rows.flatten(), token, token, 0).view(rows.shape)
    with warnings.catch_warnings():  # the first such matrix of a process says that it is in beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        chosen = torch.sparse_csr_tensor(
            torch.arange(tokens + 1, device=rows.device) * lookups,
            rows.flatten(),
            x.new_zeros(rows.numel()),
            (tokens, table.shape[0]),
            check_invariants=False,
        )
        entries = torch.sparse.sampled_addmm(chosen, x, table.T, beta=0.0).values()
    return entries.clone().view(rows.shape)  # of its own: torch.compile takes no view of a matrix


def touched_row_sums(
    rows: Int[Tensor, "T m"], weights: Float[Tensor, "T m"], x: Float[Tensor, "T D"]
) -> tuple[Int[Tensor, " U"], Float[Tensor, "U D"]]:
    """The rows that are looked up, in order, and for each `sum weights[t, j] * x_t` over lookups.

    Lookups are sorted by row, so that those of a row are a bag of token vectors: nothing is added
    atomically, and the order of the terms is that of the tokens.
    """
    if rows.numel() == 0:
        return rows.new_empty(0), x.new_empty(0, x.shape[1])
    ordered, order = rows.reshape(-1).sort(stable=True)
    if rows.is_meta:  # where there are no numbers, as if no row came up twice
        starts = torch.arange(ordered.numel(), device=rows.device)
    else:
        changes = (ordered[1:] != ordered[:-1]).nonzero().flatten() + 1
        starts = torch.cat((changes.new_zeros(1), changes))
    return ordered.index_select(0, starts), _run_sums(order, starts, weights, x)


def all_row_sums(
    rows: Int[Tensor, "T m"], weights: Float[Tensor, "T m"], x: Float[Tensor, "T D"], count: int
) -> Float[Tensor, "N D"]:
    """The same sums for all rows below `count`, with zeros for those that are not looked up."""
    if rows.numel() == 0 or rows.is_meta:
        return x.new_zeros(count, x.shape[1])
    flat = rows.reshape(-1)
    lookups = flat.bincount(minlength=count)
    return _run_sums(flat.argsort(stable=True), lookups.cumsum(0) - lookups, weights, x)


def _run_sums(order: Tensor, starts: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Sums of `weights * x` over runs of lookups, which `order` puts next to each other."""
    token, weight = order // weights.shape[1], weights.reshape(-1).index_select(0, order)
    lengths = starts.diff(append=starts.new_tensor([order.numel()]))
    if order.is_meta or int(lengths.max()) <= _LONGEST:
        return F.embedding_bag(token, x, starts, mode="sum", per_sample_weights=weight)
    groups = (lengths + _LONGEST - 1) // _LONGEST  # of each run
    first = groups.cumsum(0) - groups
    place = torch.arange(int(groups.sum()), device=order.device)
    within = place - first.repeat_interleave(groups)
    starts = starts.repeat_interleave(groups) + within * _LONGEST
    sums = F.embedding_bag(token, x, starts, mode="sum", per_sample_weights=weight)
    return F.embedding_bag(place, sums, first, mode="sum")


def _lifted(
    read: Callable[[Tensor, Tensor, Tensor], Tensor], table: Tensor, rows: Tensor, other: Tensor
) -> Tensor:
    """A read in the dtype of `other`: the rows of some tokens at a time are gathered and lifted."""
    step = max(1, _BLOCK_ELEMENTS // (rows.shape[1] * table.shape[1]))
    places = torch.arange(step * rows.shape[1], device=rows.device)
    parts = []
    for row, part in zip(rows.split(step), other.split(step), strict=True):
        place = places[: row.numel()]
        block = F.embedding_bag(row.flatten(), table, place, mode="sum")  # bags of one
        parts.append(read(block.to(other.dtype), place.view(row.shape), part))
    return torch.cat(parts)
