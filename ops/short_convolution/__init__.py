"""Causal depthwise convolution over the last few tokens."""

from typing import Any

from mneme.ops.registry import Draw, Op, drawn
from mneme.ops.short_convolution.naive import short_convolution_naive
from mneme.ops.short_convolution.taps import short_convolution

__all__ = ["OP", "short_convolution", "short_convolution_naive"]


@drawn(exact="")
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, channels: int = 256, width: int = 4
) -> dict[str, Any]:
    """Normal inputs and state, filters of unit gain; "single_tap" is a filter of width 1."""
    width = 1 if regime == "single_tap" else width

    return {
        "x": draw.normal(batch, length, channels),
        "weight": draw.normal(channels, width) * width**-0.5,
        "state": draw.normal(batch, width - 1, channels),
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
