"""The LSTM with block-diagonal recurrence."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.lstm.cell import lstm, lstm_scan
from mneme.ops.lstm.naive import LSTMState, lstm_naive
from mneme.ops.registry import Op

__all__ = ["OP", "LSTMState", "lstm", "lstm_naive", "lstm_scan"]


def _inputs(
    generator: torch.Generator,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    regime: str = "typical",
    heads: int = 4,
    width: int = 64,
) -> dict[str, Any]:
    """Normal inputs and biases, recurrent weights of gain 1; 20 times the inputs if "saturated"."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gain = {"typical": 1.0, "saturated": 20.0}[regime]
    tensors = {
        "wx": gain * normal(batch, length, 4, heads, width),
        "r": normal(4, heads, width, width) * width**-0.5,
        "b": normal(4, heads, width),
    }
    state_dtype = torch.promote_types(dtype, torch.float32)
    h, c = (normal(batch, heads, width).to(state_dtype) for _ in range(2))
    return {name: x.to(dtype) for name, x in tensors.items()} | {"state": LSTMState(h.tanh(), c)}


def _flops(inputs: dict[str, Any]) -> float:
    """Operations of the recurrent product of the forward pass: 8 H D^2 a token."""
    batch, tokens, _, heads, width = inputs["wx"].shape
    return 8.0 * batch * tokens * heads * width**2


OP = Op(
    name="lstm",
    naive=lstm_naive,
    forms={"scan": lstm_scan, "auto": lstm},
    inputs=_inputs,
    regimes=("typical", "saturated"),
    odd_sizes={"heads": 3, "width": 10},
    flops=_flops,
    timed=("wx",),
)
