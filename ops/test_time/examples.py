"""Inputs to try test-time memories on: every choice of every part at least once.

Each regime names a rule and the gates it is run with; the state is one in the middle of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ops.test_time.boundary import LqNorm, RowNorm, Softmax, UnitSlots
from ops.test_time.memories import MLP, Matrix, Slots, SwiGLU, initial_stds
from ops.test_time.naive import memorize_naive
from ops.test_time.objectives import DotProduct, Huber, LpError
from ops.test_time.rule import Gates, Rule, Slow

BEGUN = 3  # tokens before the first, so that calls start inside a chunk


@dataclass(frozen=True)
class _Regime:
    rule: Rule
    decay: str = "head"  # or "channel", "none", "strong"
    still: bool = False  # steps of zero


REGIMES: dict[str, _Regime] = {
    "typical": _Regime(Rule()),
    "no_decay": _Regime(Rule(momentum=False), "none"),
    "strong_decay": _Regime(Rule(memory=MLP(norm=False)), "strong"),
    "zero_step": _Regime(Rule(), still=True),
    "chunk_of_one": _Regime(Rule(chunk=1, momentum=False)),
    "matrix": _Regime(Rule(memory=Matrix())),
    "exact": _Regime(Rule(memory=Matrix(), anchor="token")),
    "exact_no_momentum": _Regime(Rule(memory=Matrix(), anchor="token", momentum=False, chunk=6)),
    "exact_strong_decay": _Regime(Rule(memory=Matrix(), anchor="token"), "strong"),
    "linear_attention": _Regime(
        Rule(memory=Matrix(), objective=DotProduct(), momentum=False), "none"
    ),
    "depth_4": _Regime(
        Rule(memory=MLP(depth=4, expand=2, activation="silu"), chunk=7, momentum=False), "none"
    ),
    "no_norm": _Regime(Rule(memory=MLP(norm=False))),
    "biases": _Regime(Rule(memory=MLP(bias=True, residual=False))),
    "swiglu": _Regime(Rule(memory=SwiGLU(residual=True, norm=True))),
    "read_before": _Regime(Rule(read_before=True)),
    "averaged": _Regime(Rule(memory=MLP(depth=1, bias=True), update="average", momentum=False)),
    "averaged_before": _Regime(Rule(update="average", momentum=False, read_before=True)),
    "once_a_chunk": _Regime(
        Rule(
            memory=SwiGLU(),
            objective=DotProduct(),
            boundary=RowNorm(),
            update="chunk",
            read_before=True,
        )
    ),
    "muon": _Regime(
        Rule(update="chunk", orthogonal=True, outer_step=True, read_before=True, window=3, chunk=32)
    ),
    "lp": _Regime(Rule(objective=LpError(), boundary=LqNorm(), momentum=False)),
    "huber": _Regime(Rule(objective=Huber("sign"), momentum=False), "channel"),
    "clip_matrix": _Regime(
        Rule(memory=Matrix(), objective=Huber("clip"), momentum=False), "channel"
    ),
    "softmax": _Regime(Rule(boundary=Softmax(4.0), momentum=False, read_before=True)),
    "slots_decode": _Regime(Rule(memory=Slots(5), boundary=UnitSlots(), momentum=False)),
    "slots_encode": _Regime(Rule(memory=Slots(5, "encode"), boundary=UnitSlots())),
    "slots_similarity": _Regime(
        Rule(memory=Slots(5, "similarity"), boundary=UnitSlots(), momentum=False), "none"
    ),
    "window": _Regime(Rule(window=3, momentum=False)),
    "window_momentum": _Regime(Rule(window=4, chunk=5)),
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
    chosen = REGIMES[regime]
    draw = _Draw(generator, batch, heads, width, chosen)
    slow = draw.slow()
    start = chosen.rule.start(draw.weights())
    state = memorize_naive(**draw.tokens(BEGUN), state=start, rule=chosen.rule, slow=slow)[1]
    wide = torch.promote_types(dtype, torch.float32)
    tokens = tree_map_only(Tensor, lambda x: x.to(dtype), draw.tokens(length))
    kept = tree_map_only(Tensor, lambda x: x.to(wide), {"state": state, "slow": slow})
    return {**tokens, **kept, "rule": chosen.rule}


@dataclass(frozen=True)
class _Draw:
    """Random tensors of one call, in float64."""

    generator: torch.Generator
    batch: int
    heads: int
    width: int
    regime: _Regime

    @property
    def key(self) -> int:
        """Width of keys: that of codes if the memory has slots."""
        memory = self.regime.rule.memory
        return memory.slots if isinstance(memory, Slots) else self.width

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def weights(self) -> tuple[Tensor, ...]:
        """Initial weights `[B, H, in, out]`, of the scales that a layer gives them."""
        memory = self.regime.rule.memory
        shapes = memory.shapes(self.key, self.width)
        stds = initial_stds(shapes, normalized=memory.norm, unit_keys=True)
        shape = self.batch, self.heads
        return tuple(self.normal(*shape, *s) * std for s, std in zip(shapes, stds, strict=True))

    def tokens(self, length: int) -> dict[str, Any]:
        """Queries, keys, values and gates of `length` tokens."""
        shape = (self.batch, length, self.heads)
        q, k = (F.normalize(self.normal(*shape, self.key), dim=-1) for _ in range(2))
        return {"q": q, "k": k, "v": self.normal(*shape, self.width), "gates": self._gates(shape)}

    def _gates(self, shape: tuple[int, int, int]) -> Gates:
        rule, decay = self.regime.rule, self.regime.decay
        maps = len(rule.memory.shapes(self.key, self.width))
        steps = maps if rule.update == "chunk" and rule.window == 1 else 1
        logits = self.normal(*shape, self.width if decay == "channel" else 1)
        bias = 10 if decay == "strong" else -5
        most = 1 / (max(4, rule.chunk) * rule.window)
        return Gates(
            step=self.normal(*shape, steps).sigmoid() * (0.0 if self.regime.still else most),
            log_keep=None if decay == "none" else -F.softplus(logits + bias),
            log_momentum=F.logsigmoid(self.normal(*shape)) if rule.momentum else None,
            window=self.normal(*shape, rule.window).sigmoid() if rule.window > 1 else None,
            limit=F.softplus(self.normal(*shape, 1)) if rule.objective.needs_limit else None,
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

    Per head, token and linear map of `i x o`: `2 i o` for each of the keys' forward pass, the delta
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
