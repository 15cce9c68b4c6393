"""The two reads of a table by gathering every looked-up row: the specification.

Shapes: N rows of the table, D width, m lookups of a token; "..." stands for the tokens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.ops.contract import without_autocast


@without_autocast
def sum_rows_naive(
    table: Float[Tensor, "N D"], rows: Int[Tensor, "*T m"], weights: Float[Tensor, "*T m"]
) -> Float[Tensor, "*T D"]:
    """Weighted sum of each token's rows, `y_t = sum_j weights[t, j] * table[rows[t, j]]`.

    The values of product-key memory, "Large Memory Layers with Product Keys" (arXiv 1907.05242).

    Args:
        table: What is read.
        rows: Which rows each token reads; a row may come up several times.
        weights: What each of them counts for.

    Returns:
        The sums, in the dtype of `weights`; arithmetic is in fp32 or wider.
    """
    exact = exact_dtype(table, weights)
    y = torch.einsum("...md,...m->...d", table[rows].to(exact), weights.to(exact))
    return y.to(weights.dtype)


@without_autocast
def dot_rows_naive(
    table: Float[Tensor, "N D"], rows: Int[Tensor, "*T m"], x: Float[Tensor, "*T D"]
) -> Float[Tensor, "*T m"]:
    """Product of each looked-up row and its token, `y_{t,j} = table[rows[t, j]] . x_t`.

    The first layer of the experts of PEER, "Mixture of A Million Experts" (arXiv 2407.04153).

    Args:
        table: What is read.
        rows: Which rows each token reads; a row may come up several times.
        x: The tokens.

    Returns:
        The products, in the dtype of `x`; arithmetic is in fp32 or wider.
    """
    exact = exact_dtype(table, x)
    y = torch.einsum("...md,...d->...m", table[rows].to(exact), x.to(exact))
    return y.to(x.dtype)


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of some tensors, and at least fp32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
