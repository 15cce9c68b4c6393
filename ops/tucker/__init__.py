"""Tucker-decomposed scores of all pairs of row and column keys, and the best of them."""

from typing import Any

from mneme.ops.registry import Draw, Op, drawn
from mneme.ops.tucker.leading import Leading, leading_vectors, tail_penalty
from mneme.ops.tucker.naive import tucker_topk_naive
from mneme.ops.tucker.survivors import tucker_topk

__all__ = [
    "OP",
    "Leading",
    "leading_vectors",
    "tail_penalty",
    "tucker_topk",
    "tucker_topk_naive",
]

_REGIMES: dict[str, dict[str, int]] = {
    "typical": {},
    "every_key_survives": {"k": 15},
    "few_survive": {"side_k": 3},
}


@drawn()
def _inputs(
    draw: Draw,
    batch: int,
    length: int,
    regime: str,
    heads: int = 1,
    n: int = 360,
    rank: int = 2,
    cores: int = 2,
    k: int = 32,
) -> dict[str, Any]:
    """Normal scores, uniform cores as UltraMem starts with, and how many a regime keeps."""
    core = draw.uniform(cores, rank, rank)
    return {
        "rows": draw.normal(batch, length, heads, n, rank),
        "columns": draw.normal(batch, length, heads, n, rank),
        "cores": core,
        "k": k,
        **_REGIMES[regime],
    }


def _flops(inputs: dict[str, Any]) -> float:
    """Operations of the forward pass: 4 n r + 2 s r (r + s) + 2 k c r (r + 1) a token."""
    cores, rank, _ = inputs["cores"].shape
    n, k = inputs["rows"].shape[-2], inputs["k"]
    side = min(n, k, inputs.get("side_k", k))
    token = 4 * n * rank + 2 * side * rank * (rank + side) + 2 * k * cores * rank * (rank + 1)
    return inputs["rows"].numel() / (n * rank) * token


OP = Op(
    name="tucker",
    naive=tucker_topk_naive,
    forms={"survivors": tucker_topk},
    inputs=_inputs,
    regimes=tuple(_REGIMES),
    odd_sizes={"heads": 3, "n": 11, "rank": 3, "cores": 2, "k": 5},
    flops=_flops,
    timed=("rows", "columns"),
    stateful=False,
)
