"""Selection by Tucker scores: the best rows and columns by merged scores, then their exact grid."""

from collections.abc import Iterator
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.ops.contract import without_autocast
from mneme.ops.product_key import largest
from mneme.ops.tucker.leading import Leading, leading_vectors

_BLOCK_ELEMENTS = 2**19  # of the grids formed at a time, so that they stay in cache


def _tokens_at_a_time(rows: Tensor, columns: Tensor, grid: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of some tokens, `[t, n, r]`."""
    step, flat = max(1, _BLOCK_ELEMENTS // grid), (prod(rows.shape[:-2]), *rows.shape[-2:])
    return zip(*(x.reshape(flat).split(step) for x in (rows, columns)), strict=True)


def _best_pairs(
    rows: Tensor, columns: Tensor, core: Tensor, leading: Leading, side: int, k: int
) -> tuple[Tensor, Tensor]:
    """Rows and columns of the k best pairs of tokens `[t, n, r]`, each `[t, k]`."""
    i = largest(rows @ leading.left, side)[1]
    j = largest(columns @ leading.right, side)[1]
    grid = (_keys(rows, i) @ core) @ _keys(columns, j).mT
    best = largest(grid.flatten(1), k)[1]
    first = best.div(side, rounding_mode="floor")
    return i.gather(1, first), j.gather(1, best % side)


def _keys(scores: Tensor, index: Tensor) -> Tensor:
    """The r scores of some keys, `[..., k, r]`."""
    return scores.gather(-2, index.unsqueeze(-1).expand(*index.shape, scores.shape[-1]))


@without_autocast
def tucker_topk(
    rows: Float[Tensor, "*tokens n r"],
    columns: Float[Tensor, "*tokens n r"],
    cores: Float[Tensor, "c r r"],
    k: int,
    *,
    leading: Leading | None = None,
    side_k: int | None = None,
) -> tuple[Float[Tensor, "*tokens c k"], Int[Tensor, "*tokens k"]]:
    """Keep the k pairs with the largest scores rows[i] @ C @ columns[j], C the sum of the cores.

    Tucker-decomposed query-key retrieval of UltraMem (arXiv 2411.12364). Only pairs of the
    s = min(k, side_k, n) rows and columns with the largest merged scores, rows @ left and
    columns @ right, are looked at, so that the selection is approximate unless s is n. It has no
    gradient; the scores of what was selected have that of `rows`, `columns` and `cores`.

    Args:
        rows: r scores of every row key.
        columns: r scores of every column key.
        cores: One matrix each for a slice of the value.
        k: Pairs to keep, at most s * s.
        leading: left and right; those of C, as `leading_vectors` signs them, when None.
        side_k: Most survivors of a side; k when None.

    Returns:
        Each core's own scores of the kept pairs, best first by their sum, in the dtype of `rows`
        (computed in fp32 or more), and the pairs as i * n + j.

    Raises:
        ValueError: If k is not between 1 and s * s.
    """
    n = rows.shape[-2]
    side = min(n, k if side_k is None else min(k, side_k))
    if not 1 <= k <= side * side:
        raise ValueError(f"k is {k}; {side} rows and columns have 1 to {side * side} pairs to keep")
    exact = torch.promote_types(rows.dtype, torch.float32)
    wide_rows, wide_columns, wide_cores = (x.to(exact) for x in (rows, columns, cores))
    with torch.no_grad():
        core = wide_cores.sum(0)
        pair = (
            leading_vectors(core) if leading is None else Leading(*(x.to(exact) for x in leading))
        )
        parts = [
            _best_pairs(*tokens, core, pair, side, k)
            for tokens in _tokens_at_a_time(wide_rows, wide_columns, side * side)
        ]
        i, j = (torch.cat(x).view(*rows.shape[:-2], k) for x in zip(*parts, strict=True))
    left = torch.einsum("...kr,crs->...cks", _keys(wide_rows, i), wide_cores)
    scores = (left * _keys(wide_columns, j).unsqueeze(-3)).sum(-1)
    return scores.to(rows.dtype), i * n + j
