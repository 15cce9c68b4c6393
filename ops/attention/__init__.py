"""Causal softmax attention with windows, persistent keys, a past, and grouped heads."""

from typing import Any

from mneme.ops.attention.fused import attention
from mneme.ops.attention.naive import attention_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = ["OP", "attention", "attention_naive"]

_REGIMES: dict[str, dict[str, int]] = {
    "typical": {},
    "past": {"past": 37},
    "window": {"window": 16, "past": 5},
    "window_one": {"window": 1},
    "prefix": {"prefix": 3},
    "window_prefix_past": {"window": 9, "prefix": 3, "past": 70},
}


@drawn()
def _inputs(
    draw: Draw,
    batch: int,
    length: int,
    regime: str,
    heads: int = 4,
    key_heads: int = 4,
    key: int = 64,
    value: int = 64,
) -> dict[str, Any]:
    """Normal queries, keys and values, with the window, prefix and past of a regime."""
    options = dict(_REGIMES[regime])
    keys = options.get("prefix", 0) + options.pop("past", 0) + length

    return {
        "q": draw.normal(batch, length, heads, key),
        "k": draw.normal(batch, keys, key_heads, key),
        "v": draw.normal(batch, keys, key_heads, value),
        **options,
    }


def _flops(inputs: dict[str, Any]) -> float:
    """Operations of the forward pass: 2 H (D + Dv) for every key a query sees."""
    batch, tokens, heads, key = inputs["q"].shape
    prefix = inputs.get("prefix", 0)
    length = inputs["k"].shape[1] - prefix
    window = inputs.get("window", length)
    seen = sum(
        min(window, position) + prefix for position in range(length - tokens + 1, length + 1)
    )
    return 2.0 * batch * heads * (key + inputs["v"].shape[-1]) * seen


OP = Op(
    name="attention",
    naive=attention_naive,
    forms={"fused": attention},
    inputs=_inputs,
    regimes=tuple(_REGIMES),
    odd_sizes={"heads": 6, "key_heads": 2, "key": 12, "value": 20},
    flops=_flops,
    timed=("q", "k", "v"),
    stateful=False,
)
