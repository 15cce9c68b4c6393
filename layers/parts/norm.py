"""Norms whose epsilon is fixed, so that a layer is one function in every precision.

`nn.RMSNorm` without an epsilon takes that of the dtype: 1.2e-7 in fp32, 2e-16 in fp64. What is read
from a young memory is small enough for the difference to be most of the output.
"""

from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.parts.precision import at_least_fp32

NORM_EPS = 1e-5  # Mamba-2 and fla; Qwen3-Next has 1e-6
L2_NORM_EPS = 1e-6  # Qwen3-Next and fla


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (arXiv 1910.07467).

    Args:
        dim: width of the last axis.
        eps: added to the mean square; default 1e-5.
    """

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__(dim, eps=eps)


def l2_norm(x: Float[Tensor, "... k"], eps: float = L2_NORM_EPS) -> Float[Tensor, "... k"]:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, computed in fp32 or more.

    Zero stays zero, and its gradient is `eps**-0.5` times what comes in. `F.normalize` divides by
    `max(norm, 1e-12)`, through which the gradient of padding is 1e12 times as large.
    """
    exact = at_least_fp32(x)
    return (exact * (exact.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
