"""The short causal convolution: shifts and mixes the last few tokens of each channel."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.protocol import Layer, Output, require_at_least
from mneme.layers.registry import register
from mneme.ops.short_convolution import short_convolution


class ConvState(NamedTuple):
    """The last `conv_size - 1` inputs: `[B, conv_size - 1, D]`."""

    tail: Float[Tensor, "b w d"]


@register(
    default={"conv_size": 4}, pointwise={"conv_size": 1}, biased={"conv_size": 3, "bias": True}
)
class ShortConvolution(Layer):
    """`y_t = sum_j w_j * x_{t-W+1+j}` per channel, j = 0 .. W - 1, zeros before the start.

    Taps stand in the order of time, as in PyTorch's Conv1d: the last of the W = `conv_size`, which
    is the last column of `weight` `[D, W]`, is that of the current token.

    A matrix memory without it cannot shift a key onto its value; see "Zoology" (arXiv 2312.04927)
    and the ablations of "Gated Delta Networks" (arXiv 2412.06464).

    Args:
        d_model: channels D.
        conv_size: taps; default 4, the width of Mamba (arXiv 2312.00752) and its successors.
        bias: add a bias per channel; default False.

    Weights and bias start uniform in `+-conv_size**-0.5`, as PyTorch's depthwise Conv1d does.
    """

    def __init__(self, d_model: int, *, conv_size: int = 4, bias: bool = False) -> None:
        super().__init__()
        require_at_least(1, conv_size=conv_size)
        self.weight = nn.Parameter(torch.empty(d_model, conv_size))
        self.bias = nn.Parameter(torch.empty(d_model)) if bias else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(conv_size**-0.5), conv_size**-0.5)

    def forward(self, x: Float[Tensor, "b t d"], state: ConvState | None = None) -> Output:
        """Convolves `x`, continuing from the inputs in `state`."""
        y, tail = short_convolution(x, self.weight, None if state is None else state.tail)
        if self.bias is not None:
            y = (y + self.bias).to(x.dtype)
        return Output(y, ConvState(tail))

    def init_state(self, batch_size: int) -> ConvState:
        """Zeros in the place of the inputs before the first."""
        channels, taps = self.weight.shape
        return ConvState(self.weight.new_zeros(batch_size, taps - 1, channels))

    def state_size(self, seq_len: int) -> int:
        """`(conv_size - 1) D`, whatever the length."""
        channels, taps = self.weight.shape
        return (taps - 1) * channels
