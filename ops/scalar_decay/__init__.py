"""A matrix memory with one decay per head: linear attention, RetNet's retention, Mamba-2."""

from typing import Any

import torch

from mneme.ops.registry import Draw, Op, drawn
from mneme.ops.scalar_decay.chunk import scalar_decay, scalar_decay_chunk
from mneme.ops.scalar_decay.naive import scalar_decay_naive

__all__ = ["OP", "scalar_decay", "scalar_decay_chunk", "scalar_decay_naive"]


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, heads: int = 4, key: int = 64, value: int = 64
) -> dict[str, Any]:
    """Unit keys and queries, normal values, a random start state, and the decays of a regime.

    In "grouped", pairs of heads share their queries and keys.
    """
    groups = heads // 2 if regime == "grouped" else heads
    random = draw.uniform(batch, length, heads)
    mild = -0.2 * random
    decays = {
        "no_decay": None,
        "strong_decay": torch.full_like(random, -20.0),
        "mixed_decay": (-4.0 * random) ** 3,
    }
    return {
        "q": draw.unit(batch, length, groups, key),
        "k": draw.unit(batch, length, groups, key),
        "v": draw.normal(batch, length, heads, value),
        "g": decays.get(regime, mild),
        "state": draw.normal(batch, heads, key, value),
    }


def _flops(inputs: dict[str, Any], chunk: int = 64) -> float:
    """Operations of the forward pass: 2 C (G K + H V) + 4 H K V a token."""
    batch, tokens, groups, key = inputs["k"].shape
    heads, value = inputs["v"].shape[2:]
    token = 2 * chunk * (groups * key + heads * value) + 4 * heads * key * value
    return batch * tokens * token


OP = Op(
    name="scalar_decay",
    naive=scalar_decay_naive,
    forms={"chunk": scalar_decay_chunk, "auto": scalar_decay},
    inputs=_inputs,
    regimes=("typical", "no_decay", "strong_decay", "mixed_decay", "grouped"),
    odd_sizes={"heads": 6, "key": 12, "value": 20},
    flops=_flops,
    timed=("q", "k", "v", "g"),
)
