"""Reads of a table and the gradient of its rows, without copies of all the rows looked up.

Everything here is a library call per block, without autograd; `read.py` puts the gradients on.

Shapes: N rows of the table, D width, T tokens, m lookups of each, U rows that are looked up.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_BLOCK_NUMBERS = 2**17  # of looked-up rows, which stay in cache until they are used
_CACHED_NUMBERS = 2**22  # of a table that mostly stays in cache
_WIDE = 1024  # numbers of a row from which on the processor sees the pattern by itself
_LONGEST = 256  # lookups added up one after the other; longer runs are summed in two stages

# y_i = block[places_i] . x[bag_i], the gradient of a weighted bag with respect to its weights
_bag_products = torch.ops.aten._embedding_bag_per_sample_weights_backward


def weighted_sums(
    table: Float[Tensor, "N D"], rows: Int[Tensor, "T m"], weights: Float[Tensor, "T m"]
) -> Float[Tensor, "T D"]:
    """`y_t = sum_j weights[t, j] * table[rows[t, j]]` in the dtype of the weights."""
    if rows.numel() == 0:
        return weights.new_zeros(rows.shape[0], table.shape[1])
    if table.dtype == weights.dtype:
        return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
    y = weights.new_empty(rows.shape[0], table.shape[1])
    step = max(1, _BLOCK_NUMBERS // (rows.shape[1] * table.shape[1]))  # tokens
    places = torch.arange(step * rows.shape[1], device=rows.device)
    for out, row, weight in zip(y.split(step), rows.split(step), weights.split(step), strict=True):
        place = places[: row.numel()]
        block = _gathered(table, row.reshape(-1), place).to(weights.dtype)
        out.copy_(
            F.embedding_bag(place.view(row.shape), block, mode="sum", per_sample_weights=weight)
        )
    return y


def products(
    table: Float[Tensor, "N D"], rows: Int[Tensor, "T m"], x: Float[Tensor, "T D"]
) -> Float[Tensor, "T m"]:
    """`y_{t,j} = table[rows[t, j]] . x_t` in the dtype of x.

    The library computes such products in the backward pass of a bag, but waits there for each row
    in turn. Rows that were gathered before, a block at a time, are read from the cache.
    """
    tokens, lookups = rows.shape
    flat, token = rows.reshape(-1), torch.arange(tokens, device=rows.device)
    token = token.repeat_interleave(lookups)
    if table.dtype == x.dtype and not _far(table):
        return _bag_products(x, table, flat, token, token, 0).view(rows.shape)
    y = x.new_empty(flat.shape)
    step = max(1, _BLOCK_NUMBERS // table.shape[1])  # lookups
    places = torch.arange(step, device=rows.device)
    parts = (part.split(step) for part in (y, flat, token))
    for out, row, bag in zip(*parts, strict=True):
        block = _gathered(table, row, places[: row.numel()]).to(x.dtype)
        out.copy_(_bag_products(x, block, places[: row.numel()], places, bag, 0))
    return y.view(rows.shape)


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


def _far(table: Tensor) -> bool:
    """Whether a row is read sooner if it is asked for ahead of time."""
    width = table.shape[1]
    return table.device.type == "cpu" and table.numel() > _CACHED_NUMBERS and width < _WIDE


def _gathered(table: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """The rows, as bags of one: unlike an index, a bag asks for rows ahead of time."""
    return F.embedding_bag(rows, table, places, mode="sum")
