"""The LSTM with block-diagonal recurrence."""

from typing import Any

from mneme.ops.lstm.cell import lstm, lstm_scan
from mneme.ops.lstm.naive import LSTMState, lstm_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = ["OP", "LSTMState", "lstm", "lstm_naive", "lstm_scan"]


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, heads: int = 4, width: int = 64
) -> dict[str, Any]:
    """Normal inputs and biases, recurrent weights of gain 1; 20 times the inputs if "saturated"."""
    gain = {"typical": 1.0, "saturated": 20.0}[regime]
    inputs = {
        "wx": gain * draw.normal(batch, length, 4, heads, width),
        "r": draw.normal(4, heads, width, width) * width**-0.5,
        "b": draw.normal(4, heads, width),
    }
    h, c = (draw.normal(batch, heads, width) for _ in range(2))
    return {**inputs, "state": LSTMState(h.tanh(), c)}


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
