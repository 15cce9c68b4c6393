"""The sLSTM with block-diagonal recurrence: exponential gates, a normalizer and a stabilizer."""

from typing import Any

import torch

from mneme.ops.lstm import OP as LSTM
from mneme.ops.registry import Draw, Op, drawn
from mneme.ops.slstm.cell import slstm, slstm_scan
from mneme.ops.slstm.naive import SLSTMState, slstm_naive

__all__ = ["OP", "SLSTMState", "slstm", "slstm_naive", "slstm_scan"]


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, heads: int = 4, width: int = 64
) -> dict[str, Any]:
    """Inputs of the LSTM in the same regime, and a state as tokens leave it: |c| <= n, n >= 1."""
    options = {"dtype": torch.float64, "regime": regime, "heads": heads, "width": width}
    inputs = LSTM.inputs(draw.generator, batch, length, **options)
    h, c = inputs["state"]
    n, m = 1 + draw.uniform(*h.shape), draw.normal(*h.shape)
    return inputs | {"state": SLSTMState(h, c.tanh() * n, n, m)}


OP = Op(
    name="slstm",
    naive=slstm_naive,
    forms={"scan": slstm_scan, "auto": slstm},
    inputs=_inputs,
    regimes=("typical", "saturated"),
    odd_sizes=LSTM.odd_sizes,
    flops=LSTM.flops,
    timed=("wx",),
)
