"""The delta rule: a matrix memory that corrects what it stores under each key."""

from typing import Any

from mneme.ops.delta.chunk import delta, delta_chunk
from mneme.ops.delta.naive import delta_naive
from mneme.ops.gated_delta import OP as GATED_DELTA
from mneme.ops.registry import Op

__all__ = ["OP", "delta", "delta_chunk", "delta_naive"]


def _inputs(*args: Any, **options: Any) -> dict[str, Any]:
    """Inputs of the gated delta rule in the same regime, without its decays."""
    inputs = GATED_DELTA.inputs(*args, **options)
    del inputs["g"]
    return inputs


OP = Op(
    name="delta",
    naive=delta_naive,
    forms={"chunk": delta_chunk, "auto": delta},
    inputs=_inputs,
    regimes=("typical", "beta_two"),
    odd_sizes=GATED_DELTA.odd_sizes,
    flops=GATED_DELTA.flops,
    timed=("q", "k", "v", "beta"),
)
