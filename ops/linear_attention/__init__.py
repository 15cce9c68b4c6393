"""Linear attention with a normalizer, and with a prefix that every query sees."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.linear_attention.chunk import linear_attention, linear_attention_chunk, with_prefix
from mneme.ops.linear_attention.naive import linear_attention_naive
from mneme.ops.registry import Op

__all__ = ["OP", "linear_attention", "linear_attention_chunk", "linear_attention_naive"]


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
    prefix: int = 37,
) -> dict[str, Any]:
    """Features elu(x) + 1 of normal x, normal values, and a state that five tokens have left."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def features(tokens: int) -> Tensor:
        return torch.nn.functional.elu(normal(batch, tokens, heads, key)) + 1

    def values(tokens: int) -> Tensor:
        return normal(batch, tokens, heads, value)

    names = {"q": features(length), "k": features(length), "v": values(length)}
    inputs: dict[str, Any] = {name: x.to(dtype) for name, x in names.items()}
    state = with_prefix(features(5), values(5), None)
    inputs["state"] = tuple(x.to(torch.promote_types(dtype, torch.float32)) for x in state)
    if regime == "prefix":
        inputs["prefix"] = features(prefix).to(dtype), values(prefix).to(dtype)
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
