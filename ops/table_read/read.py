"""Two reads of a large table, each the adjoint of the other, at the cost of the rows they touch.

Shapes: N rows of the table, D width, T tokens, m lookups of each; "*T" stands for any axes.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.ops.contract import uncompiled, without_autocast
from mneme.ops.table_read.kernels import all_row_sums, products, touched_row_sums, weighted_sums
from mneme.ops.table_read.naive import exact_dtype


class _Sum(torch.autograd.Function):
    """`y_t = sum_j weights[t, j] * table[rows[t, j]]`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(table, rows, weights)
        ctx.sparse = sparse
        return weighted_sums(table.detach(), rows, weights.detach())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        table, rows, weights = ctx.saved_tensors
        dtable = dweights = None
        if ctx.needs_input_grad[0]:
            dtable = _TableGradient.apply(rows, weights, dy, table, ctx.sparse)
        if ctx.needs_input_grad[2]:
            dweights = _Product.apply(table, rows, dy, ctx.sparse)
        return dtable, None, dweights, None


class _Product(torch.autograd.Function):
    """`y_{t,j} = table[rows[t, j]] . x_t`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, x: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(table, rows, x)
        ctx.sparse = sparse
        return products(table.detach(), rows, x.detach())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        table, rows, x = ctx.saved_tensors
        dtable = dx = None
        if ctx.needs_input_grad[0]:
            dtable = _TableGradient.apply(rows, dy, x, table, ctx.sparse)
        if ctx.needs_input_grad[2]:
            dx = _Sum.apply(table, rows, dy, ctx.sparse)
        return dtable, None, dx, None


class _TableGradient(torch.autograd.Function):
    """`sum weights[t, j] * x_t` over the lookups of each row, in shape and dtype of `table`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, x: Tensor, table: Tensor, sparse: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, x)
        if not sparse:
            return all_row_sums(rows, weights, x, table.shape[0]).to(table.dtype)
        index, sums = touched_row_sums(rows, weights, x)
        return torch.sparse_coo_tensor(
            index[None],
            sums.to(table.dtype),
            table.shape,
            check_invariants=False,
            is_coalesced=True,
        )

    @staticmethod
    def backward(ctx: Any, ddtable: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, x = ctx.saved_tensors
        if ddtable.is_sparse:
            ddtable = ddtable.to_dense()
        dweights = dx = None
        if ctx.needs_input_grad[1]:
            dweights = _Product.apply(ddtable, rows, x, False)
        if ctx.needs_input_grad[2]:
            dx = _Sum.apply(ddtable, rows, weights, False)
        return None, dweights, dx, None, None


@uncompiled
@without_autocast
def sum_rows(
    table: Float[Tensor, "N D"],
    rows: Int[Tensor, "*T m"],
    weights: Float[Tensor, "*T m"],
    *,
    sparse_grad: bool = False,
) -> Float[Tensor, "*T D"]:
    """Weighted sum of each token's rows, `y_t = sum_j weights[t, j] * table[rows[t, j]]`.

    Its gradient with respect to the weights is `dot_rows(table, rows, dy)`. Gradients can be
    differentiated again; see README.md for the gradient of the table.

    Args:
        table: What is read.
        rows: Which rows each token reads, int64; a row may come up several times.
        weights: What each of them counts for.
        sparse_grad: Whether the gradient of the table is a coalesced `torch.sparse_coo` tensor of
            the rows that were looked up, instead of a dense tensor of the table's size.

    Returns:
        The sums, in the dtype of `weights`; arithmetic is in fp32 or wider.

    Raises:
        ValueError: If shapes do not fit, or `rows` are not int64 or not rows of the table.
    """
    _check(table, rows)
    if weights.shape != rows.shape:
        raise ValueError(
            f"weights {tuple(weights.shape)} must have one number for each of the lookups "
            f"{tuple(rows.shape)}"
        )
    flat = (math.prod(rows.shape[:-1]), rows.shape[-1])
    exact = weights.reshape(flat).to(exact_dtype(table, weights))
    y: Tensor = _Sum.apply(table, rows.reshape(flat), exact, sparse_grad)
    return y.view(*rows.shape[:-1], table.shape[1]).to(weights.dtype)


@uncompiled
@without_autocast
def dot_rows(
    table: Float[Tensor, "N D"],
    rows: Int[Tensor, "*T m"],
    x: Float[Tensor, "*T D"],
    *,
    sparse_grad: bool = False,
) -> Float[Tensor, "*T m"]:
    """Product of each looked-up row and its token, `y_{t,j} = table[rows[t, j]] . x_t`.

    Its gradient with respect to x is `sum_rows(table, rows, dy)`. Gradients can be differentiated
    again; see README.md for the gradient of the table.

    Args:
        table: What is read.
        rows: Which rows each token reads, int64; a row may come up several times.
        x: The tokens.
        sparse_grad: Whether the gradient of the table is a coalesced `torch.sparse_coo` tensor of
            the rows that were looked up, instead of a dense tensor of the table's size.

    Returns:
        The products, in the dtype of `x`; arithmetic is in fp32 or wider.

    Raises:
        ValueError: If shapes do not fit, or `rows` are not int64 or not rows of the table.
    """
    _check(table, rows)
    wanted = (*rows.shape[:-1], table.shape[-1])
    if x.shape != wanted:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; lookups {tuple(rows.shape)} of rows of width "
            f"{table.shape[-1]} need {wanted}"
        )
    tokens = math.prod(rows.shape[:-1])
    exact = x.reshape(tokens, x.shape[-1]).to(exact_dtype(table, x))
    y: Tensor = _Product.apply(table, rows.reshape(tokens, rows.shape[-1]), exact, sparse_grad)
    return y.view(rows.shape).to(x.dtype)


def _check(table: Tensor, rows: Tensor) -> None:
    if table.dim() != 2:
        raise ValueError(
            f"table must be rows of numbers, [N, D], but has shape {tuple(table.shape)}"
        )
    if rows.dtype != torch.int64:
        raise ValueError(f"rows must be int64, but are {rows.dtype}")
    if rows.is_meta or rows.numel() == 0:
        return
    low, high = (int(x) for x in rows.aminmax())
    if low < 0 or high >= table.shape[0]:
        raise ValueError(
            f"rows must be from 0 to {table.shape[0] - 1}, but run from {low} to {high}"
        )
