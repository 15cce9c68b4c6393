"""The sLSTM with block-diagonal recurrence: exponential gates, a normalizer and a stabilizer."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.lstm import OP as LSTM
from mneme.ops.registry import Op
from mneme.ops.slstm.cell import slstm, slstm_scan
from mneme.ops.slstm.naive import SLSTMState, slstm_naive

__all__ = ["OP", "SLSTMState", "slstm", "slstm_naive", "slstm_scan"]


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
    """Inputs of the LSTM in the same regime, and a state as tokens leave it: |c| <= n, n >= 1."""
    sizes = {"heads": heads, "width": width}
    inputs = LSTM.inputs(generator, batch, length, dtype=dtype, regime=regime, **sizes)
    h, c = inputs["state"]
    n = 1 + torch.rand(h.shape, generator=generator, dtype=torch.float64).to(h.dtype)
    m = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.dtype)
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
