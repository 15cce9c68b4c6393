"""Inputs to try test-time memories on: every choice of every part at least once.

Each regime names a rule and the gates it is run with; the state is one in the middle of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from mneme.ops.test_time.memories import MLP, Matrix, Slots, SwiGLU, initial_stds
from mneme.ops.test_time.naive import memorize_naive
from mneme.ops.test_time.rule import (
    DotProduct,
    Gates,
    Huber,
    LpError,
    LqNorm,
    RowNorm,
    Rule,
    Slow,
    Softmax,
    UnitSlots,
)

BEGUN = 3  # tokens before the first, so that calls start inside a chunk


@dataclass(frozen=True)
class Regime:
    """A rule, and the gates it is run with."""

    rule: Rule
    bias: float = -5.0  # of what is forgotten; 10 forgets nearly all
    still: bool = False  # steps of zero


REGIMES: dict[str, Regime] = {
    "typical": Regime(Rule()),
    "no_decay": Regime(Rule(momentum=False, decay="none")),
    "strong_decay": Regime(Rule(memory=MLP(norm=False)), bias=10.0),
    "zero_step": Regime(Rule(), still=True),
    "chunk_of_one": Regime(Rule(chunk=1, momentum=False)),
    "matrix": Regime(Rule(memory=Matrix())),
    "exact": Regime(Rule(memory=Matrix(), gradient_reference="token")),
    "exact_no_momentum": Regime(
        Rule(memory=Matrix(), gradient_reference="token", momentum=False, chunk=6)
    ),
    "exact_strong_decay": Regime(Rule(memory=Matrix(), gradient_reference="token"), bias=10.0),
    "linear_attention": Regime(
        Rule(memory=Matrix(), objective=DotProduct(), momentum=False, decay="none")
    ),
    "depth_4": Regime(
        Rule(
            memory=MLP(depth=4, expand=2, activation="silu"),
            chunk=7,
            momentum=False,
            decay="none",
        )
    ),
    "no_norm": Regime(Rule(memory=MLP(norm=False))),
    "biases": Regime(Rule(memory=MLP(bias=True, residual=False))),
    "swiglu": Regime(Rule(memory=SwiGLU(residual=True, norm=True))),
    "read_before": Regime(Rule(read_before=True)),
    "averaged": Regime(
        Rule(memory=MLP(depth=1, bias=True), update="average", momentum=False, decay="none")
    ),
    "averaged_before": Regime(
        Rule(update="average", momentum=False, decay="none", read_before=True)
    ),
    "once_a_chunk": Regime(
        Rule(
            memory=SwiGLU(),
            objective=DotProduct(),
            boundary=RowNorm(),
            update="chunk",
            read_before=True,
        )
    ),
    "muon": Regime(
        Rule(update="chunk", orthogonal=True, outer_lr=True, read_before=True, window=3, chunk=32)
    ),
    "lp": Regime(Rule(objective=LpError(), boundary=LqNorm(), momentum=False)),
    "huber": Regime(Rule(objective=Huber("sign"), momentum=False, decay="channel")),
    "clip_matrix": Regime(
        Rule(memory=Matrix(), objective=Huber("clip"), momentum=False, decay="channel")
    ),
    "softmax": Regime(Rule(boundary=Softmax(4.0), momentum=False, read_before=True)),
    "slots_decode": Regime(Rule(memory=Slots(5), boundary=UnitSlots(), momentum=False)),
    "slots_encode": Regime(Rule(memory=Slots(5, "encode"), boundary=UnitSlots())),
    "slots_similarity": Regime(
        Rule(memory=Slots(5, "similarity"), boundary=UnitSlots(), momentum=False, decay="none")
    ),
    "window": Regime(Rule(window=3, momentum=False)),
    "window_momentum": Regime(Rule(window=4, chunk=5)),
}


def inputs(
    generator: torch.Generator,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    regime: str = "typical",
    heads: int = 4,
    width: int = 64,
) -> dict[str, Any]:
    """Unit keys and queries, normal values, and a state in the middle of a chunk."""
    return inputs_of(REGIMES[regime], generator, batch, length, dtype, heads, width)


def inputs_of(
    regime: Regime,
    generator: torch.Generator,
    batch: int,
    length: int,
    dtype: torch.dtype,
    heads: int,
    width: int,
) -> dict[str, Any]:
    """As `inputs`, for any regime."""
    draw = _Draw(generator, batch, heads, width, regime)
    slow = draw.slow()
    start = regime.rule.start(draw.weights())
    state = memorize_naive(**draw.tokens(BEGUN), state=start, rule=regime.rule, slow=slow)[1]
    wide = torch.promote_types(dtype, torch.float32)
    tokens = tree_map_only(Tensor, lambda x: x.to(dtype), draw.tokens(length))
    kept = tree_map_only(Tensor, lambda x: x.to(wide), {"state": state, "slow": slow})
    return {**tokens, **kept, "rule": regime.rule}


@dataclass(frozen=True)
class _Draw:
    """Random tensors of one call, in float64."""

    generator: torch.Generator
    batch: int
    heads: int
    width: int
    regime: Regime

    @property
    def key(self) -> int:
        """Width of keys: that of codes if the memory has slots."""
        memory = self.regime.rule.memory
        return memory.slots if isinstance(memory, Slots) else self.width

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def weights(self) -> tuple[Tensor, ...]:
        """Initial weights `[B, H, in, out]`, of the scales that a layer gives them."""
        memory = self.regime.rule.memory
        shapes = memory.shapes(self.key, self.width)
        stds = initial_stds(memory, self.key, self.width, unit_keys=True)
        shape = self.batch, self.heads
        return tuple(self.normal(*shape, *s) * std for s, std in zip(shapes, stds, strict=True))

    def tokens(self, length: int) -> dict[str, Any]:
        """Queries, keys, values and gates of `length` tokens."""
        shape = (self.batch, length, self.heads)
        q, k = (F.normalize(self.normal(*shape, self.key), dim=-1) for _ in range(2))
        return {"q": q, "k": k, "v": self.normal(*shape, self.width), "gates": self._gates(shape)}

    def _gates(self, shape: tuple[int, int, int]) -> Gates:
        rule = self.regime.rule
        maps = len(rule.memory.shapes(self.key, self.width))
        rates = maps if rule.update == "chunk" and rule.window == 1 else 1
        logits = self.normal(*shape, self.width if rule.decay == "channel" else 1)
        most = 1 / (max(4, rule.chunk) * rule.window)
        return Gates(
            inner_lr=self.normal(*shape, rates).sigmoid() * (0.0 if self.regime.still else most),
            log_keep=None if rule.decay == "none" else -F.softplus(logits + self.regime.bias),
            log_momentum=F.logsigmoid(self.normal(*shape)) if rule.momentum else None,
            window=self.normal(*shape, rule.window).sigmoid() if rule.window > 1 else None,
            delta=F.softplus(self.normal(*shape, 1)) if rule.objective.needs_delta else None,
        )

    def slow(self) -> Slow:
        """Slow weights that the rule uses."""
        rule, affine = self.regime.rule, (self.heads, self.width)
        shapes = rule.memory.shapes(self.key, self.width)
        norms = tuple(1 + self.normal(self.heads, 1, o).abs() for _, o in shapes)
        places = torch.arange(1, rule.chunk + 1, dtype=torch.float64)
        return Slow(
            gain=1 + 0.1 * self.normal(*affine) if rule.memory.norm else None,
            bias=0.1 * self.normal(*affine) if rule.memory.norm else None,
            norms=norms if isinstance(rule.boundary, RowNorm) else None,
            position=1 / places if rule.update == "average" else None,
        )


def flops(inputs: dict[str, Any]) -> float:
    """Operations of the forward pass.

    Per head, token and linear layer of `i x o`: `2 i o` for each of the keys' forward pass, the
        delta
    passed back (not by the first map), the write, the read, and write and read of the momentum if
    there is one; and `2 C (i + o)` for reading what the chunk's own tokens wrote.
    """
    rule: Rule = inputs["rule"]
    batch, tokens, heads, _ = inputs["k"].shape
    passes = 5 if rule.momentum else 3
    total = 0.0
    for place, weight in enumerate(inputs["state"].weights):
        i, o = weight.shape[-2:]
        own = 0 if rule.read_before else 2 * rule.chunk * (i + o)
        total += 2 * i * o * (passes + (place > 0)) + own
    return batch * tokens * heads * total
