"""Causal convolution with free kernels as long as the sequence."""

import math
from typing import Any

import torch

from mneme.ops.long_convolution.blocks import long_convolution, long_convolution_blocks
from mneme.ops.long_convolution.naive import long_convolution_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = ["OP", "long_convolution", "long_convolution_blocks", "long_convolution_naive"]


@drawn(exact="")
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, channels: int = 256, taps: int | None = None
) -> dict[str, Any]:
    """Normal inputs, kernels of unit gain that fade, and as many earlier inputs as a regime says.

    By default there are as many taps as tokens. "typical" starts with a third of the state that it
    will have, "full" with all of it; "one_tap" is a kernel without a memory.
    """
    taps = {"one_tap": 1}.get(regime, taps or length)
    earlier = {"full": taps - 1}.get(regime, taps // 3)

    fading = torch.exp(-3 * torch.arange(taps, dtype=torch.float64) / taps)
    kernel = draw.normal(channels, taps) * fading / fading.norm()
    x, state = draw.normal(batch, length, channels), draw.normal(batch, earlier, channels)
    return {"x": x, "kernel": kernel, "state": state}


def _flops(inputs: dict[str, Any]) -> float:
    """Operations of two transforms of 2T elements a channel, as one FFT would need: 10 log2(2T)."""
    x = inputs["x"]
    return 10.0 * x.numel() * math.log2(2 * x.shape[1])


OP = Op(
    name="long_convolution",
    naive=long_convolution_naive,
    forms={"blocks": long_convolution_blocks, "auto": long_convolution},
    inputs=_inputs,
    regimes=("typical", "full", "one_tap"),
    odd_sizes={"channels": 7, "taps": 75},
    flops=_flops,
    timed=("x",),
    starts_empty=False,
)
