"""Simple long convolutions: a free kernel per channel, kept small by soft thresholding."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.protocol import Layer, Output, ParamOptions, require_at_least
from mneme.layers.recurrent.gated_output import GatedOutput
from mneme.layers.registry import register
from mneme.ops.long_convolution import long_convolution

KERNEL_STD = 0.02  # of the first tap at the start, as in the released code


class LongConvState(NamedTuple):
    """The last `max_len - 1` inputs, `[B, S, D]`, or all there were if fewer."""

    inputs: Float[Tensor, "b s d"]


@register(default={"max_len": 200}, short={"max_len": 5}, one_tap={"max_len": 1, "squash": 0.0})
class LongConv(Layer):
    """A long convolution (arXiv 2302.06646), then GELU and a gated linear unit.

    Per channel, with L = `max_len` taps,

        y_t = sum_{l < L} k_l x_{t-l} + D x_t,    k = sign(w) max(|w| - squash, 0)

    and the output is `(W_o g + b_o) * sigmoid(W_g g + b_g)` with `g = GELU(y)`. The taps w start
    normal with deviation `0.02 exp(-(l / L) (D / 2)**(d / D))`, so that later channels d forget
    sooner; the skip D starts normal. The kernel is not decayed and learns at 5e-4 at most. A tap
    that is squashed to zero has no gradient, and so stays there.

    Args:
        d_model: width D.
        max_len: taps L; what lies further back is not seen.
        squash: what is taken off the size of every tap; default 0.003, as in the released configs.

    State: the last L - 1 inputs, so it grows up to `D (L - 1)` scalars.

    Where we differ: one kernel per channel, where the paper also has two, and no kernel dropout.

    Raises:
        ValueError: fewer than one tap, or a negative squash.
    """

    param_options: ClassVar[Mapping[str, ParamOptions]] = {
        "kernel": ParamOptions(decays=False, max_lr=5e-4)
    }

    def __init__(self, d_model: int, *, max_len: int, squash: float = 0.003) -> None:
        super().__init__()
        require_at_least(1, max_len=max_len)
        require_at_least(0, squash=squash)
        self.squash = squash
        envelope = fading(d_model, max_len)
        self.kernel = nn.Parameter(KERNEL_STD * torch.randn_like(envelope) * envelope)
        self.D = nn.Parameter(torch.randn(d_model))
        self.output = GatedOutput(d_model)

    def forward(self, x: Float[Tensor, "b t d"], state: LongConvState | None = None) -> Output:
        """Convolves each channel, then mixes channels."""
        (inputs,) = self.init_state(len(x)) if state is None else state
        y, inputs = long_convolution(x, self.taps(), inputs)
        y = (y + self.D * x).to(self.D.dtype)
        return Output(self.output(y), LongConvState(inputs))

    def taps(self) -> Float[Tensor, "d l"]:
        """The squashed kernel, in fp32 (fp64 in fp64)."""
        return F.softshrink(at_least_fp32(self.kernel), self.squash)

    def init_state(self, batch_size: int) -> LongConvState:
        """No earlier inputs, `[B, 0, D]`."""
        return LongConvState(self.kernel.new_zeros(batch_size, 0, len(self.kernel)))

    def state_spec(self) -> LongConvState:
        """As many inputs as a later token can see, or fewer."""
        return LongConvState(super().state_spec().inputs.growing(self.kernel.shape[1] - 1))

    def state_size(self, seq_len: int) -> int:
        """The inputs that a later token can see."""
        channels, taps = self.kernel.shape
        return channels * min(seq_len, taps - 1)


def fading(channels: int, taps: int) -> Float[Tensor, "d l"]:
    """Deviations of the taps at the start over that of the first, `exp(-(l / L) (D / 2)**(d / D))`.

    From one fall by e over the kernel in the first channel to about D / 2 of them in the last.
    """
    channel, tap = torch.arange(channels)[:, None], torch.arange(taps)
    return torch.exp(-(tap / taps) * (channels / 2) ** (channel / channels))
