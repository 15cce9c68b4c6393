"""Rotary position embedding (arXiv 2104.09864)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    *xs: Float[Tensor, "b t _ d"], positions: Int[Tensor, "#b t"], base: float
) -> list[Float[Tensor, "b t _ d"]]:
    """Turns each pair `(x_i, x_{i + d/2})` by the angle `position * base**(-2 i / d)`.

    The inner product of two rotated vectors depends on the difference of their positions alone.
    Angles are formed in fp32 (fp64 for fp64 inputs), whatever the precision of the inputs.

    Args:
        *xs: queries and keys, of any number of heads; `d` must be even.
        positions: absolute positions, one row for all sequences or a row each.
        base: wavelength base; larger turns more slowly.
    """
    half = xs[0].shape[-1] // 2
    dtype = torch.promote_types(xs[0].dtype, torch.float32)
    exponents = torch.arange(half, device=xs[0].device, dtype=dtype) / half
    angles = positions[..., None, None].to(dtype) * base**-exponents
    cos, sin = angles.cos(), angles.sin()
    return [_turn(x, cos, sin) for x in xs]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
