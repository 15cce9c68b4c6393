"""Test-time memories: fast weights that learn, token by token, to map keys to values."""

import torch
from torch import Tensor

from mneme.ops.contract import without_autocast
from mneme.ops.registry import Op
from mneme.ops.test_time.chunk import Watch
from mneme.ops.test_time.chunk import memorize_chunked as memorize
from mneme.ops.test_time.examples import REGIMES, flops, inputs
from mneme.ops.test_time.memories import (
    MLP,
    Head,
    Matrix,
    MemoryNetwork,
    Slots,
    SwiGLU,
    initial_stds,
)
from mneme.ops.test_time.naive import memorize_naive
from mneme.ops.test_time.rule import (
    Boundary,
    DotProduct,
    FastWeights,
    Gates,
    Huber,
    LpError,
    LqNorm,
    Objective,
    Orthogonal,
    RowNorm,
    Rule,
    Slow,
    Softmax,
    SquaredError,
    UnitSlots,
    newton_schulz,
)

__all__ = [
    "MLP",
    "OP",
    "Boundary",
    "DotProduct",
    "FastWeights",
    "Gates",
    "Huber",
    "LpError",
    "LqNorm",
    "Matrix",
    "MemoryNetwork",
    "Objective",
    "Orthogonal",
    "RowNorm",
    "Rule",
    "Slots",
    "Slow",
    "Softmax",
    "SquaredError",
    "SwiGLU",
    "UnitSlots",
    "Watch",
    "initial_stds",
    "memorize",
    "memorize_naive",
    "newton_schulz",
    "recall",
]


@without_autocast
def recall(q: Tensor, state: FastWeights, *, rule: Rule, slow: Slow | None = None) -> Tensor:
    """Read a memory without writing: every query sees the weights that `state` holds.

    They are those that the last token read after its own write, or, where the rule reads before the
    write, those of the chunk's start.

    Args:
        q: queries, `[B, T, H, K]`.
        state: of the memory.
        rule: the fixed choices.
        slow: slow weights that the rule uses.

    Returns:
        `[B, T, H, V]`, in the dtype of `q`.
    """
    slow = Slow() if slow is None else slow
    weights, head = _standing(state, rule, slow), None
    if slow.gain is not None and slow.bias is not None:
        head = Head(slow.gain[:, None], slow.bias[:, None])
    rows = q.transpose(1, 2).to(weights[0].dtype)
    y = rule.memory.apply(lambda layer, x: torch.matmul(x, weights[layer]), rows, head)
    return y.transpose(1, 2).to(q.dtype)


def _standing(state: FastWeights, rule: Rule, slow: Slow) -> tuple[Tensor, ...]:
    """The weights of the last token's place."""
    start = state.reference or state.weights
    if rule.read_before:
        return tuple(rule.boundary.view(w) for w in start)
    if rule.update == "average" and state.offset.shape[1]:
        assert slow.position is not None
        factor = slow.position[state.offset.shape[1] - 1]
        pairs = zip(state.weights, state.pending, strict=True)
        return tuple(w + factor * s for w, s in pairs)
    scales = (rule.boundary.scale(w) for w in start)
    scaled = zip(state.weights, scales, strict=True)
    return tuple(w if c is None else w * c for w, c in scaled)


OP = Op(
    name="test_time",
    naive=memorize_naive,
    forms={"chunk": memorize},
    inputs=inputs,
    regimes=tuple(REGIMES),
    odd_sizes={"heads": 3, "width": 6},
    flops=flops,
    timed=("q", "k", "v", "gates"),
    starts_empty=False,
    half_products=True,
)
