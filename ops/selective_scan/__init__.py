"""The selective scan of Mamba: channels through decaying states that the tokens control."""

from typing import Any

import torch

from mneme.ops.registry import Draw, Op, drawn
from mneme.ops.selective_scan.chunk import selective_scan, selective_scan_chunk
from mneme.ops.selective_scan.naive import selective_scan_naive

__all__ = ["OP", "selective_scan", "selective_scan_chunk", "selective_scan_naive"]


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, channels: int = 256, states: int = 16
) -> dict[str, Any]:
    """Normal inputs, writes, reads and start state; rates -1 to -N; the steps of a regime.

    "typical" are 0.001 to 0.1, as Mamba starts; "long_steps" 0 to 30, with decays from none to less
    than the smallest number.
    """
    unit = draw.uniform(batch, length, channels)
    step = {
        "typical": 1e-3 * 100**unit,
        "long_steps": 30 * unit**2,
        "no_step": torch.zeros_like(unit),
    }[regime]
    return {
        "x": draw.normal(batch, length, channels),
        "step": step,
        "A": -torch.arange(1, states + 1, dtype=torch.float64).repeat(channels, 1),
        "B": draw.normal(batch, length, states),
        "C": draw.normal(batch, length, states),
        "state": draw.normal(batch, channels, states),
    }


def _flops(inputs: dict[str, Any]) -> float:
    """Operations of the forward pass: 7 D N a token, an exponential counting as one."""
    return 7.0 * inputs["x"].numel() * inputs["A"].shape[1]


OP = Op(
    name="selective_scan",
    naive=selective_scan_naive,
    forms={"chunk": selective_scan_chunk, "auto": selective_scan},
    inputs=_inputs,
    regimes=("typical", "long_steps", "no_step"),
    odd_sizes={"channels": 7, "states": 5},
    flops=_flops,
    timed=("x", "step", "B", "C"),
)
