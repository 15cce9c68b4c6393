"""The delta rule: a matrix memory that corrects what it stores under each key."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries
from mneme.ops.delta.chunk import delta_chunk
from mneme.ops.delta.naive import delta_naive
from mneme.ops.gated_delta import OP as GATED_DELTA
from mneme.ops.gated_delta import RECURRENT_UP_TO, check_chunk_size, gated_delta
from mneme.ops.registry import Op

__all__ = ["OP", "delta", "delta_chunk", "delta_naive"]


@carries("q", "k", "v", "beta")
def delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the delta rule in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `delta_naive`, more through the chunked form; both
    compute the same function, to rounding. Arguments and results are those of `delta_chunk`.
    """
    check_chunk_size(chunk_size)
    if k.shape[1] <= RECURRENT_UP_TO:
        return delta_naive(q, k, v, beta, state, scale=scale)
    return gated_delta(q, k, v, None, beta, state, scale=scale, chunk_size=chunk_size)


def _inputs(
    generator: torch.Generator,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    regime: str = "typical",
    heads: int = 4,
    key: int = 64,
    value: int = 64,
) -> dict[str, Any]:
    """Inputs of the gated delta rule in the same regime, without its decays."""
    sizes = {"heads": heads, "key": key, "value": value}
    inputs = GATED_DELTA.inputs(generator, batch, length, dtype=dtype, regime=regime, **sizes)
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
