"""Activations of a memory's hidden layers with what analytic inner gradients need: their slopes.

The inner gradient of a hidden layer is `g * phi'(z)`, so the outer gradient needs `phi''`. Written
in elementary operations that would cost a dozen passes over the largest tensors of a chunk.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ActivationName = Literal["gelu", "silu"]

_gelu_slope = torch.ops.aten.gelu_backward
_silu_slope = torch.ops.aten.silu_backward


class _GeluSlope(torch.autograd.Function):
    """`g * phi'(z)` for phi(z) = z Phi(z), Phi the normal distribution function."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(g, z)
        return _gelu_slope(g, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        g, z = ctx.saved_tensors
        square = z * z  # phi''(z) = (2 - z^2) exp(-z^2 / 2) / sqrt(2 pi)
        bell = torch.mul(square, -0.5).exp_()
        bend = square.neg_().add_(2).mul_(bell).mul_(1 / math.sqrt(2 * math.pi))
        return _gelu_slope(d, z), bend.mul_(d).mul_(g)


class _SiluSlope(torch.autograd.Function):
    """`g * phi'(z)` for phi(z) = z s, s = sigmoid(z)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(g, z)
        return _silu_slope(g, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        g, z = ctx.saved_tensors
        s = z.sigmoid()  # phi''(z) = s (1 - s) (2 + z (1 - 2 s))
        bend = torch.addcmul(torch.full_like(s, 2.0), z, 1 - 2 * s)
        bend.mul_(s).mul_(1 - s)
        return _silu_slope(d, z), bend.mul_(d).mul_(g)


class Activation(NamedTuple):
    """An activation and the gradient it passes back.

    Attributes:
        value: `phi(z)`.
        slope: `g * phi'(z)` from (g, z), differentiable once more.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, _GeluSlope.apply),
    "silu": Activation(F.silu, _SiluSlope.apply),
}
