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


class _Gelu(torch.autograd.Function):
    """phi(z) = z Phi(z) and phi'(z), Phi the normal distribution function."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.gelu_backward(torch.ones_like(z), z)
        ctx.save_for_backward(z, slope)
        return F.gelu(z), slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor, dslope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        square = z * z  # phi''(z) = (2 - z^2) exp(-z^2 / 2) / sqrt(2 pi)
        bell = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        bend = square.neg_().add_(2).mul_(bell)
        return bend.mul_(dslope).addcmul_(dvalue, slope)


class _Silu(torch.autograd.Function):
    """phi(z) = z s and phi'(z), s = sigmoid(z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.ops.aten.silu_backward(torch.ones_like(z), z)
        ctx.save_for_backward(z, slope)
        return F.silu(z), slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue: Tensor, dslope: Tensor) -> Tensor:
        z, slope = ctx.saved_tensors
        s = z.sigmoid()  # phi''(z) = s (1 - s) (2 + z (1 - 2 s))
        bend = torch.addcmul(z + 2, z, s, value=-2).mul_(s).mul_(1 - s)
        return bend.mul_(dslope).addcmul_(dvalue, slope)


class Activation(NamedTuple):
    """An activation, alone and with its slope.

    Attributes:
        value: `phi(z)`.
        with_slope: `(phi(z), phi'(z))`, both differentiable once.
    """

    value: Callable[[Tensor], Tensor]
    with_slope: Callable[[Tensor], tuple[Tensor, Tensor]]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, _Gelu.apply),
    "silu": Activation(F.silu, _Silu.apply),
}
