"""The selective scan of Mamba: channels through decaying states that the tokens control."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.registry import Op
from mneme.ops.selective_scan.chunk import selective_scan, selective_scan_chunk
from mneme.ops.selective_scan.naive import selective_scan_naive

__all__ = ["OP", "selective_scan", "selective_scan_chunk", "selective_scan_naive"]


def _inputs(
    generator: torch.Generator,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    regime: str = "typical",
    channels: int = 256,
    states: int = 16,
) -> dict[str, Any]:
    """Normal inputs, writes, reads and start state; rates -1 to -N; the steps of a regime.

    "typical" are 0.001 to 0.1, as Mamba starts; "long_steps" 0 to 30, with decays from none to less
    than the smallest number.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unit = torch.rand(batch, length, channels, generator=generator, dtype=torch.float64)
    step = {
        "typical": 1e-3 * 100**unit,
        "long_steps": 30 * unit**2,
        "no_step": torch.zeros_like(unit),
    }[regime]
    tensors = {
        "x": normal(batch, length, channels),
        "step": step,
        "A": -torch.arange(1, states + 1, dtype=torch.float64).repeat(channels, 1),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
    }
    state = normal(batch, channels, states).to(torch.promote_types(dtype, torch.float32))
    return {name: v.to(dtype) for name, v in tensors.items()} | {"state": state}


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
