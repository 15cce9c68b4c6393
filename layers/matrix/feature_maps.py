"""Feature maps of linear attention: what queries and keys become before they meet.

A normalized read divides by a sum of inner products of features, so these maps keep them positive.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def elu_map(x: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """`elu(x) + 1`, above zero (arXiv 2006.16236), without the rounding to zero of that sum."""
    return x.clamp(max=0).exp() + x.relu()


def taylor_map(x: Float[Tensor, "... k"]) -> Float[Tensor, "... f"]:
    """The exponential to second order: `phi(q) . phi(k) = 1 + s + s^2 / 2`, `s = q . k / sqrt(K)`.

    The features of "Based" (arXiv 2402.18668): one, the elements, and the products of two, each
    pair once; `taylor_size` counts them.
    """
    x = x * x.shape[-1] ** -0.25
    pairs = [x[..., i : i + 1] * x[..., i + 1 :] for i in range(x.shape[-1] - 1)]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() * 0.5**0.5, *pairs], dim=-1)


def taylor_size(width: int) -> int:
    """Features that `taylor_map` makes of K elements: `1 + K + K (K + 1) / 2`."""
    return 1 + width + width * (width + 1) // 2
