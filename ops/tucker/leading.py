"""What the singular values of a core decide: the merged scores, and the price of the rest."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import without_autocast


class Leading(NamedTuple):
    """Leading singular vectors of the sum of the cores, by which rows and columns are chosen."""

    left: Float[Tensor, " r"]
    right: Float[Tensor, " r"]


@torch.no_grad()
@without_autocast
def leading_vectors(core: Float[Tensor, "r r"], previous: Leading | None = None) -> Leading:
    """The leading singular vectors of a core, signed like the previous ones.

    Both vectors of a pair may be flipped without changing the product, but the other sign selects
    the smallest scores of each side, whose products are large only where scores are negative. The
    sign is the one closest to the previous pair. The first pair is signed so that its entries have
    a sum of at least 0, and merging scores of positive mean gives scores of positive mean.

    Args:
        core: Sum of the cores.
        previous: The pair before the last change of the cores; None, or zeros, for the first.

    Returns:
        Unit vectors, in fp32 (fp64 for an fp64 core), without gradient.
    """
    u, _, v = torch.linalg.svd(core.to(torch.promote_types(core.dtype, torch.float32)))
    pair = torch.stack((u[:, 0], v[0]))
    before = torch.zeros_like(pair) if previous is None else torch.stack(previous).to(pair)
    before = torch.where((before == 0).all(), torch.ones_like(pair), before)
    pair = torch.where((pair * before).sum() < 0, -pair, pair)
    return Leading(*pair.unbind(0))


@without_autocast
def tail_penalty(core: Float[Tensor, "r r"], threshold: float) -> Float[Tensor, ""]:
    """`sum_{i >= 2} max(0, sigma_i - threshold)^2 / (r - 1)`, 0 for rank 1.

    A core whose other singular values are small is selected from almost exactly by its leading
    ones. The threshold leaves them enough to differ from a core of rank one.

    Args:
        core: Sum of the cores.
        threshold: Singular values up to this cost nothing.
    """
    values = torch.linalg.svdvals(core.to(torch.promote_types(core.dtype, torch.float32)))
    return (values[1:] - threshold).relu().square().sum() / max(1, len(core) - 1)
