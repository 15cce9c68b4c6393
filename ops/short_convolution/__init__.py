"""Causal depthwise convolution over the last few tokens."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.registry import Op
from mneme.ops.short_convolution.naive import short_convolution_naive
from mneme.ops.short_convolution.taps import short_convolution

__all__ = ["OP", "short_convolution", "short_convolution_naive"]


def _inputs(
    generator: torch.Generator,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    regime: str = "typical",
    channels: int = 256,
    width: int = 4,
) -> dict[str, Any]:
    """Normal inputs and state, filters of unit gain; "single_tap" is a filter of width 1."""
    width = 1 if regime == "single_tap" else width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, length, channels),
        "weight": normal(channels, width) * width**-0.5,
        "state": normal(batch, width - 1, channels),
    }


def _flops(inputs: dict[str, Any]) -> float:
    """Operations of the forward pass: 2 D W a token."""
    return 2.0 * inputs["x"].numel() * inputs["weight"].shape[1]


OP = Op(
    name="short_convolution",
    naive=short_convolution_naive,
    forms={"taps": short_convolution},
    inputs=_inputs,
    regimes=("typical", "single_tap"),
    odd_sizes={"channels": 7, "width": 5},
    flops=_flops,
    timed=("x",),
)
