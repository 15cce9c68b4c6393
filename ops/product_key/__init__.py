"""The best of all sums of two halves, without forming them: the address of product keys."""

from typing import Any

import torch
from torch import Tensor

from mneme.ops.product_key.candidates import candidate_ranks, largest, product_key_topk
from mneme.ops.product_key.naive import product_key_topk_naive
from mneme.ops.registry import Draw, Op, drawn

__all__ = [
    "OP",
    "candidate_ranks",
    "largest",
    "product_key_topk",
    "product_key_topk_naive",
]

_REGIMES: dict[str, dict[str, int]] = {
    "typical": {},
    "more_than_a_half": {"k": 20},
    "few_of_many": {"n": 64, "k": 3},
}


@drawn()
def _inputs(
    draw: Draw, batch: int, length: int, regime: str, heads: int = 4, n: int = 1024, k: int = 32
) -> dict[str, Any]:
    """Scores in random order of which no two sums are equal, as ties are not defined.

    Those of the halves are multiples of n + 1 and of n, by factors below n.
    """
    n, k = _REGIMES[regime].get("n", n), _REGIMES[regime].get("k", k)
    noise = draw.uniform(batch, length, heads, 2, n)
    scores = noise.argsort(-1) * torch.tensor([[n + 1], [n]]) - n * n // 2
    return {"scores": scores, "k": k}


def _flops(inputs: dict[str, Any]) -> float:
    """Comparisons of the halves and additions of the candidates."""
    scores: Tensor = inputs["scores"]
    n = scores.shape[-1]
    tokens = scores.numel() / (2 * n) if n else 0
    return tokens * (2 * n + len(candidate_ranks(inputs["k"], n)[0]))


OP = Op(
    name="product_key",
    naive=product_key_topk_naive,
    forms={"candidates": product_key_topk},
    inputs=_inputs,
    regimes=tuple(_REGIMES),
    odd_sizes={"heads": 3, "n": 11, "k": 7},
    flops=_flops,
    timed=("scores",),
    stateful=False,
)
