"""A matrix memory with one decay per key channel: gated linear attention."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.diagonal_decay.chunk import diagonal_decay, diagonal_decay_chunk
from mneme.ops.diagonal_decay.naive import diagonal_decay_naive
from mneme.ops.registry import Op

__all__ = ["OP", "diagonal_decay", "diagonal_decay_chunk", "diagonal_decay_naive"]


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
    """Unit keys and queries, normal values, a random start state, and the decays of a regime.

    In "typical", decays are those of a gated linear attention layer before training. In
    "mixed_decay", channels that keep and channels that forget at once stand side by side, and
    change roles from token to token.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    random = torch.rand(batch, length, heads, key, generator=generator, dtype=torch.float64)
    decays = {
        "typical": torch.nn.functional.logsigmoid(normal(*random.shape)) / 16,
        "no_decay": torch.zeros_like(random),
        "strong_decay": torch.full_like(random, -20.0),
        "mixed_decay": -20.0 * random**8,
    }
    tensors = {
        "q": unit(batch, length, heads, key),
        "k": unit(batch, length, heads, key),
        "v": normal(batch, length, heads, value),
        "g": decays[regime],
    }
    state = normal(batch, heads, key, value).to(torch.promote_types(dtype, torch.float32))
    return {name: x.to(dtype) for name, x in tensors.items()} | {"state": state}


def _flops(inputs: dict[str, Any], chunk: int = 32) -> float:
    """Operations of the forward pass: H [2 C (K + V) + 4 K V] a token."""
    batch, tokens, heads, key = inputs["k"].shape
    value = inputs["v"].shape[-1]
    return float(batch * tokens * heads * (2 * chunk * (key + value) + 4 * key * value))


OP = Op(
    name="diagonal_decay",
    naive=diagonal_decay_naive,
    forms={"chunk": diagonal_decay_chunk, "auto": diagonal_decay},
    inputs=_inputs,
    regimes=("typical", "no_decay", "strong_decay", "mixed_decay"),
    odd_sizes={"heads": 3, "key": 12, "value": 20},
    flops=_flops,
    timed=("q", "k", "v", "g"),
)
