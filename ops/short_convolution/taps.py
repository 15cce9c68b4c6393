"""The causal depthwise convolution as one fused multiply-add over the sequence per tap.

A library convolution with as many groups as channels wants channels before time, so that both its
passes start with a transposing copy; W shifted multiply-adds read the sequence as it lies.

Shapes: B batch, T time, D channels, W width of the filter.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mneme.ops.contract import carries

_BLOCK_ELEMENTS = 2**17  # whose products are summed while they are in cache


def _filter_gradient(history: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """`sum_{b, t} history[b, t + j] dy[b, t]` for each channel and tap j, block by block."""
    batch, tokens, channels = dy.shape
    dweight, span = torch.zeros_like(weight), max(1, _BLOCK_ELEMENTS // channels)
    rows = max(1, span // max(1, tokens))
    for first in range(0, batch, rows):
        for start in range(0, tokens, span):
            part = dy[first : first + rows, start : start + span]
            for j in range(weight.shape[1]):
                seen = history[first : first + rows, start + j : start + j + part.shape[1]]
                dweight[:, j] += (seen * part).sum((0, 1))
    return dweight


class _Taps(torch.autograd.Function):
    """Correlation of history [B, T + W - 1, D] with weight [D, W] along time."""

    @staticmethod
    def forward(ctx: Any, history: Tensor, weight: Tensor) -> Tensor:
        tokens = history.shape[1] - weight.shape[1] + 1
        y = history[:, :tokens] * weight[:, 0]
        for j in range(1, weight.shape[1]):
            y.addcmul_(history[:, j : j + tokens], weight[:, j])
        ctx.save_for_backward(history, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        history, weight = ctx.saved_tensors
        tokens, taps = dy.shape[1], range(weight.shape[1])
        dhistory = dweight = None
        if ctx.needs_input_grad[0]:
            dhistory = torch.zeros_like(history)
            for j in taps:
                dhistory[:, j : j + tokens].addcmul_(dy, weight[:, j])
        if ctx.needs_input_grad[1]:
            dweight = _filter_gradient(history, dy, weight)
        return dhistory, dweight


@carries("x")
def short_convolution(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    state: Float[Tensor, "B W-1 D"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B W-1 D"]]:
    """Filter each channel over its last W tokens: y_t = sum_j weight[:, j] * x_{t - W + 1 + j}.

    The last column of `weight` multiplies the current token; there is no bias and no activation.
    The gradient is analytic and cannot be differentiated again.

    Args:
        x: Inputs.
        weight: One filter a channel, oldest tap first.
        state: The W - 1 inputs before the first one, oldest first; zeros when None.

    Returns:
        The filtered inputs in the dtype of `x` (summed in fp32 or more), and the last W - 1 inputs,
        some of them from `state` if T < W - 1.

    Raises:
        ValueError: If `weight` or `state` does not fit `x`.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    if weight.shape[0] != channels:
        raise ValueError(f"weight filters {weight.shape[0]} channels, but x has {channels}")
    if state is None:
        state = x.new_zeros(batch, width - 1, channels)
    elif state.shape != (batch, width - 1, channels):
        raise ValueError(
            f"state has shape {tuple(state.shape)}; a filter of width {width} over x "
            f"{tuple(x.shape)} needs {(batch, width - 1, channels)}"
        )
    history = torch.cat((state, x), 1)
    exact = torch.promote_types(x.dtype, torch.float32)
    y = _Taps.apply(history.to(exact), weight.to(exact))
    return y.to(x.dtype), history[:, tokens:]
