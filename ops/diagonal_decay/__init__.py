"""A matrix memory with one decay per key channel: gated linear attention."""

from typing import Any

import torch

from mneme.ops.diagonal_decay.chunk import diagonal_decay, diagonal_decay_chunk
from mneme.ops.diagonal_decay.naive import diagonal_decay_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = ["OP", "diagonal_decay", "diagonal_decay_chunk", "diagonal_decay_naive"]


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, heads: int = 4, key: int = 64, value: int = 64
) -> dict[str, Any]:
    """Unit keys and queries, normal values, a random start state, and the decays of a regime.

    In "typical", decays are those of a gated linear attention layer before training. In
    "mixed_decay", channels that keep and channels that forget at once stand side by side, and
    change roles from token to token.
    """
    random = draw.uniform(batch, length, heads, key)
    decays = {
        "typical": torch.nn.functional.logsigmoid(draw.normal(*random.shape)) / 16,
        "no_decay": torch.zeros_like(random),
        "strong_decay": torch.full_like(random, -20.0),
        "mixed_decay": -20.0 * random**8,
    }
    return {
        "q": draw.unit(batch, length, heads, key),
        "k": draw.unit(batch, length, heads, key),
        "v": draw.normal(batch, length, heads, value),
        "g": decays[regime],
        "state": draw.normal(batch, heads, key, value),
    }


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
