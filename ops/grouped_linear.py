"""One linear layer per group of consecutive rows: the product that experts are made of."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_linear(
    x: Float[Tensor, "n i"], weight: Float[Tensor, "e o i"], rows: Sequence[int]
) -> Float[Tensor, "n o"]:
    """`y = W_e x` with e the group of each row: one product per group, none for an empty one.

    The products write into one result, and their gradients into one gradient of the stacked
    weights. Under autocast it is rounded like any linear layer. There is no second derivative.

    Args:
        x: rows, those of a group next to each other, groups in order.
        weight: of each group.
        rows: of each group; they sum to n.
    """
    return _GroupedLinear.apply(_autocast(x), _autocast(weight), tuple(rows))


class _GroupedLinear(torch.autograd.Function):
    """`torch.nn.functional.grouped_mm` would do, but for fp64 and widths not of 16 bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        y = x.new_empty(len(x), weight.shape[1])
        for e, group in _filled(rows):
            torch.mm(x[group], weight[e].mT, out=y[group])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if wants_x else None
        new = torch.zeros_like if 0 in ctx.rows else torch.empty_like
        dw = new(weight) if wants_weight else None
        for e, group in _filled(ctx.rows):
            if dx is not None:
                torch.mm(dy[group], weight[e], out=dx[group])
            if dw is not None:
                torch.mm(dy[group].mT, x[group], out=dw[e])
        return dx, dw, None


def _filled(rows: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and where."""
    end = 0
    for group, size in enumerate(rows):
        start, end = end, end + size
        if size:
            yield group, slice(start, end)


def _autocast(x: Tensor) -> Tensor:
    """As autocast casts the operands of products: to its dtype, where it is on, but for fp64."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
