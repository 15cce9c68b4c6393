"""The gated delta rule: a matrix memory that decays and corrects what it stores under each key."""

from typing import Any

from torch import Tensor

from mneme.ops.gated_delta.chunk import (
    RECURRENT_UP_TO,
    check_chunk_size,
    gated_delta,
    gated_delta_chunk,
)
from mneme.ops.gated_delta.naive import gated_delta_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = [
    "OP",
    "RECURRENT_UP_TO",
    "check_chunk_size",
    "gated_delta",
    "gated_delta_chunk",
    "gated_delta_naive",
]


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, heads: int = 4, key: int = 64, value: int = 64
) -> dict[str, Any]:
    """Unit keys and queries, normal values, a random start state, and the gates of a regime."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * draw.uniform(batch, length, heads)

    gates = {
        "typical": (uniform(-0.2, 0.0), uniform(0.0, 1.0)),
        "no_decay": (uniform(0.0, 0.0), uniform(0.0, 1.0)),
        "strong_decay": (uniform(-20.0, -20.0), uniform(0.0, 1.0)),
        "mixed_decay": (uniform(-4.0, 0.0) ** 3, uniform(0.0, 1.0)),
        "beta_zero": (uniform(-0.2, 0.0), uniform(0.0, 0.0)),
        "beta_one": (uniform(-0.2, 0.0), uniform(1.0, 1.0)),
        "beta_two": (uniform(-0.2, 0.0), uniform(2.0, 2.0)),
    }
    g, beta = gates[regime]
    return {
        "q": draw.unit(batch, length, heads, key),
        "k": draw.unit(batch, length, heads, key),
        "v": draw.normal(batch, length, heads, value),
        "g": g,
        "beta": beta,
        "state": draw.normal(batch, heads, key, value),
    }


def _flops(inputs: dict[str, Any], chunk: int = 64) -> float:
    """Operations of the forward pass: H [2 C K + C^2 / 3 + 4 C (K + V) + 6 K V] a token."""
    batch, tokens, heads, key = inputs["k"].shape
    value = inputs["v"].shape[-1]
    token = 2 * chunk * key + chunk**2 / 3 + 4 * chunk * (key + value) + 6 * key * value
    return batch * tokens * heads * token


OP = Op(
    name="gated_delta",
    naive=gated_delta_naive,
    forms={"chunk": gated_delta_chunk, "auto": gated_delta},
    inputs=_inputs,
    regimes=(
        "typical",
        "no_decay",
        "strong_decay",
        "mixed_decay",
        "beta_zero",
        "beta_one",
        "beta_two",
    ),
    odd_sizes={"heads": 3, "key": 12, "value": 20},
    flops=_flops,
    timed=("q", "k", "v", "g", "beta"),
)
