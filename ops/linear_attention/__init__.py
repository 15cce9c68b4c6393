"""Linear attention with a normalizer, and with a prefix that every query sees."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.linear_attention.chunk import linear_attention, linear_attention_chunk, with_prefix
from mneme.ops.linear_attention.naive import linear_attention_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = ["OP", "linear_attention", "linear_attention_chunk", "linear_attention_naive"]


@drawn()
def _inputs(
    draw: Draw,
    batch: int,
    length: int,
    regime: str,
    heads: int = 4,
    key: int = 64,
    value: int = 64,
    prefix: int = 37,
) -> dict[str, Any]:
    """Features elu(x) + 1 of normal x, normal values, and a state that five tokens have left."""

    def features(tokens: int) -> Tensor:
        return torch.nn.functional.elu(draw.normal(batch, tokens, heads, key)) + 1

    def values(tokens: int) -> Tensor:
        return draw.normal(batch, tokens, heads, value)

    inputs: dict[str, Any] = {
        "q": features(length),
        "k": features(length),
        "v": values(length),
        "state": with_prefix(features(5), values(5), None),
    }
    if regime == "prefix":
        inputs["prefix"] = features(prefix), values(prefix)
    return inputs


def _flops(inputs: dict[str, Any], chunk: int = 64) -> float:
    """Operations of the forward pass: H [2 C (F + V + 1) + 4 F (V + 1)] a token, and the prefix."""
    batch, tokens, heads, features = inputs["k"].shape
    width = inputs["v"].shape[-1] + 1
    token = 2 * chunk * (features + width) + 4 * features * width
    read_first = inputs["prefix"][0].shape[1] if "prefix" in inputs else 0
    return batch * heads * (tokens * token + read_first * 2 * features * width)


OP = Op(
    name="linear_attention",
    naive=linear_attention_naive,
    forms={"chunk": linear_attention_chunk, "auto": linear_attention},
    inputs=_inputs,
    regimes=("typical", "prefix"),
    odd_sizes={"heads": 3, "key": 12, "value": 20, "prefix": 17},
    flops=_flops,
    timed=("q", "k", "v"),
)
