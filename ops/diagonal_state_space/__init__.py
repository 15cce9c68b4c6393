"""The diagonal state space of S4D: channels through damped oscillators, the same at every token."""

import math
from typing import Any

import torch

from mneme.ops.diagonal_state_space.chunk import diagonal_state_space, diagonal_state_space_chunk
from mneme.ops.diagonal_state_space.naive import diagonal_state_space_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = ["OP", "diagonal_state_space", "diagonal_state_space_chunk", "diagonal_state_space_naive"]


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, channels: int = 256, modes: int = 32
) -> dict[str, Any]:
    """Normal inputs, reads and start state, writes around 1, and the rates and steps of a regime.

    "typical" are the rates S4D-Lin, -1/2 + i pi n, and steps of 0.001 to 0.1. "fast" are real rates
    from -1 to -M at steps of 1 to 30: most of what is written is gone within a token.
    """
    unit = draw.uniform(channels)
    mode = torch.arange(modes, dtype=torch.float64)
    rate, step = {
        "typical": ((torch.full_like(mode, -0.5), math.pi * mode), 1e-3 * 100**unit),
        "fast": ((-1 - mode, torch.zeros_like(mode)), 30**unit),
    }[regime]
    return {
        "x": draw.normal(batch, length, channels),
        "A": torch.stack(rate, -1).repeat(channels, 1, 1),
        "B": 0.1 * draw.normal(channels, modes, 2) + torch.tensor([1.0, 0.0]),
        "C": draw.normal(channels, modes, 2),
        "step": step,
        "state": draw.normal(batch, channels, modes, 2),
    }


def _flops(inputs: dict[str, Any], chunk: int = 64) -> float:
    """Operations of the forward pass: D (2 C + 8 M + 8 M / C) a token."""
    modes = inputs["A"].shape[1]
    return inputs["x"].numel() * (2.0 * chunk + 8 * modes + 8 * modes / chunk)


OP = Op(
    name="diagonal_state_space",
    naive=diagonal_state_space_naive,
    forms={"chunk": diagonal_state_space_chunk, "auto": diagonal_state_space},
    inputs=_inputs,
    regimes=("typical", "fast"),
    odd_sizes={"channels": 7, "modes": 5},
    flops=_flops,
    timed=("x",),
)
