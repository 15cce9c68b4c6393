"""Selection by Tucker scores, one token after the other: the specification.

Shapes: n keys of a side, r rank, c cores, s survivors of a side, k pairs kept.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.ops.contract import in_graph_of
from mneme.ops.tucker.leading import Leading, leading_vectors


def tucker_topk_naive(
    rows: Float[Tensor, "*tokens n r"],
    columns: Float[Tensor, "*tokens n r"],
    cores: Float[Tensor, "c r r"],
    k: int,
    *,
    leading: Leading | None = None,
    side_k: int | None = None,
) -> tuple[Float[Tensor, "*tokens c k"], Int[Tensor, "*tokens k"]]:
    """Keep the k pairs with the largest scores rows[i] @ C @ columns[j], C the sum of the cores.

    Only pairs of the s = min(k, side_k, n) rows and columns with the largest merged scores,
    rows @ left and columns @ right, are looked at.

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
    """
    lead, n, rank = rows.shape[:-2], *rows.shape[-2:]
    side = min(n, k if side_k is None else min(k, side_k))
    exact = torch.promote_types(rows.dtype, torch.float32)
    cores = cores.to(exact)
    left, right = leading or leading_vectors(cores.detach().sum(0))
    scores, pairs = [], []
    for row, column in zip(
        rows.to(exact).reshape(-1, n, rank), columns.to(exact).reshape(-1, n, rank), strict=True
    ):
        i = (row @ left.to(exact)).topk(side).indices
        j = (column @ right.to(exact)).topk(side).indices
        grids = row[i] @ cores @ column[j].T  # [c, s, s]
        best = grids.sum(0).flatten().topk(k).indices
        scores.append(grids.flatten(1)[:, best])
        pairs.append(i[best // side] * n + j[best % side])
    if not scores:
        none = rows.new_empty(*lead, len(cores), k)
        return in_graph_of(none, rows, columns, cores), none[..., 0, :].long()
    return (
        torch.stack(scores).view(*lead, len(cores), k).to(rows.dtype),
        torch.stack(pairs).view(*lead, k),
    )
