"""Test-time memory: a small network whose weights are the state, trained by the tokens it reads."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.norm import RMSNorm, l2_norm
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.rotary import rotate
from mneme.layers.parts.short_convolution import ConvState, ShortConvolution
from mneme.layers.parts.telemetry import observe, observing
from mneme.layers.protocol import Memory, Output, ParamOptions, require_at_least
from mneme.layers.registry import register
from mneme.layers.test_time.test_time_parts import (
    MAX_CHUNK_DECAY,
    Features,
    ForgetGate,
    Learner,
    PolynomialFeatures,
    Readout,
)
from mneme.ops.test_time import (
    MLP,
    DotProduct,
    FastWeights,
    Gates,
    Huber,
    LpError,
    LqNorm,
    Matrix,
    MemoryNetwork,
    Objective,
    RowNorm,
    Rule,
    Slots,
    Slow,
    Softmax,
    SquaredError,
    SwiGLU,
    UnitSlots,
    initial_stds,
    memorize,
    recall,
)

KEEP_RANK = 32  # of the map that makes a decay per channel, as in Miras (arXiv 2504.13173)
TTT_NORM_EPS = 1e-6  # of the norm over the model's width, in the code of TTT
DELTA_BIAS = 0.5413  # softplus of it is 1: errors are limited to a root mean square of 1 at first


class TestTimeState(NamedTuple):
    """What a test-time memory carries.

    Attributes:
        fast: the memory's weights and what its learner keeps.
        conv: the convolution's tail.
        position: `[B]`, tokens seen; empty without rotary positions in the sequence.
    """

    fast: FastWeights
    conv: ConvState
    position: tuple[Int[Tensor, " b"], ...]


@register(
    default={"heads": 2},
    linear={"heads": 2, "memory": Matrix(), "learner": Learner(gradient_reference="token")},
    deep={
        "heads": 1,
        "memory": MLP(depth=3, expand=1, activation="silu"),
        "forget_gate": ForgetGate("none"),
        "readout": Readout(gate=False),
        "features": Features(conv_size=1),
    },
    average={
        "heads": 2,
        "memory": MLP(depth=1, bias=True),
        "forget_gate": ForgetGate("none"),
        "learner": Learner(update="average", momentum=False, max_inner_lr=0.1),
        "features": Features(conv_size=1, silu=False, normalize=False, rope="chunk"),
        "readout": Readout("model", gate=False),
        "chunk_size": 8,
    },
    once_a_chunk={
        "heads": 2,
        "memory": SwiGLU(),
        "objective": DotProduct(),
        "forget_gate": ForgetGate("none", boundary=RowNorm()),
        # few tokens leave most of an update to rounding: without the outer step bf16 is far off
        "learner": Learner(
            update="chunk", inner_lr_per_weight=True, orthogonal="scheduled", outer_lr=True
        ),
        "features": Features(conv_size=1, affine=True, rope="sequence"),
        "chunk_size": 8,
        "read_before": True,
    },
    lp={
        "heads": 2,
        "objective": LpError(),
        "forget_gate": ForgetGate(boundary=LqNorm()),
        "learner": Learner(momentum=False, max_inner_lr=0.02),
        "chunk_size": 8,
    },
    huber={
        "heads": 2,
        "objective": Huber("clip"),
        "forget_gate": ForgetGate("channel"),
        "learner": Learner(momentum=False),
        "chunk_size": 8,
        "recompute": True,
    },
    mirror={
        "heads": 2,
        "forget_gate": ForgetGate(boundary=Softmax(scale_of_unit=4.0)),
        "learner": Learner(momentum=False),
        "chunk_size": 4,
        "read_before": True,
    },
    slots={
        "heads": 2,
        "memory": Slots(slots=6, form="encode"),
        "forget_gate": ForgetGate(boundary=UnitSlots()),
        "learner": Learner(momentum=False),
        "chunk_size": 4,
    },
    window={
        "heads": 2,
        "memory": MLP(residual=False, expand=2),
        "learner": Learner(window=3, momentum=False),
        "features": Features(degree=2),
        "chunk_size": 8,
    },
    windowed_muon={
        "heads": 2,
        "learner": Learner(update="chunk", orthogonal=True, outer_lr=True, window=3),
        "chunk_size": 8,
        "read_before": True,
    },
)
class TestTimeMemory(Memory):
    """A memory that learns at test time: Titans, TTT, LaCT, Miras, Lattice, OmegaNet and Atlas.

    Each head holds a small network f(W; .) as its state. A token writes by a step on an inner
    objective that asks for its value where its key is shown, and reads the network's output for its
    query. With `u(A; t)` the gradient at the weights A of the chunk's start, Titans
    (arXiv 2501.00663) is

        S_t = eta_t S_{t-1} - theta_t u(A; t),    W_t = (1 - alpha_t) W_{t-1} + S_t,
        y_t = f(W_t; q_t)

    and the other papers are other choices of five parts; see `ops/test_time/naive.py` for every
    recurrence and `configs/mixer/` for the choices of each paper.

    * q, k, v: as `features` says; the value size of a head is D / H, and so is the key size, unless
      the memory is one of slots, whose codes have one element per slot;
    * gates: theta, alpha, eta and the others are functions of a linear layer of the token whose
      weights start at zero; what follows it is in fp32;
    * output: RMSNorm per head, times `silu(W_g x_t)`, or as `readout` says, then the output
      projection.

    Args:
        d_model: width D.
        heads: memories H, a divisor of D; default 4.
        memory: architecture; default `MLP()`, two layers of width 4 D / H, residual, normalized.
        objective: inner loss; default the squared error.
        forget_gate: how it forgets; default a gate per head.
        learner: how it learns; default momentum and a step of at most 0.5.
        chunk_size: C, tokens whose gradients are taken at the same weights; default 16. It belongs
            to the function, except with `learner.gradient_reference="token"`. Chunks stand at
            absolute places.
        read_before: read the weights of the chunk's start, not the token's own; default False.
        features: how q, k and v are made.
        readout: norm and gate of what is read; default RMSNorm per head and a gate.
        recompute: compute groups of chunks again in the backward pass instead of keeping what is
            inside them; default False.

    State: the weights, as often as the rule needs them (at most three times: now, at the chunk's
    start or a sum of steps, and the momentum), the convolution's tail and the window's tokens;
    whatever the length. No pending tokens are kept: decoding costs the same at every place of a
    chunk. The sequences of a batch stand at the same place.

    Where we differ from the papers: losses carry 1/2 and no mean over features; steps are bounded;
    per-channel gates are decays only. The config of a paper's model lists the rest.

    Raises:
        ValueError: heads that do not divide the width, or parts that do not go together.
    """

    param_options: ClassVar[Mapping[str, ParamOptions]] = dict.fromkeys(
        ("initial", "memory_norm_weight", "memory_norm_bias"), ParamOptions(decays=False)
    )
    __test__ = False  # the name is the field's; pytest is not to collect it

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        memory: MemoryNetwork = MLP(),  # noqa: B008  (frozen)
        objective: Objective = SquaredError(),  # noqa: B008
        forget_gate: ForgetGate = ForgetGate(),  # noqa: B008
        learner: Learner = Learner(),  # noqa: B008
        chunk_size: int = 16,
        read_before: bool = False,
        features: Features = Features(),  # noqa: B008
        readout: Readout = Readout(),  # noqa: B008
        recompute: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads, chunk_size=chunk_size)
        if d_model % heads:
            raise ValueError(f"heads ({heads}) must divide d_model ({d_model})")
        self.heads, self.features, self.recompute = heads, features, recompute
        self.readout = readout
        self.forget_gate, self.learner = forget_gate, learner
        self.rule = Rule(
            memory=memory,
            objective=objective,
            boundary=forget_gate.boundary,
            chunk=chunk_size,
            update=learner.update,
            decay=forget_gate.gate,
            gradient_reference=learner.gradient_reference,
            momentum=learner.momentum,
            orthogonal=learner.orthogonal,
            outer_lr=learner.outer_lr,
            window=learner.window,
            read_before=read_before,
        )
        self.value_dim = d_model // heads
        self.key_dim = memory.slots if isinstance(memory, Slots) else self.value_dim
        if features.rope is not None and self.key_dim % 2:
            raise ValueError(f"rotary positions need an even key size, got {self.key_dim}")
        keys = heads * self.key_dim
        self.qkv_proj = nn.Linear(d_model, 2 * keys + d_model, bias=False)
        self.conv = ShortConvolution(2 * keys + d_model, conv_size=features.conv_size)
        self.qk_scale = self.qk_offset = None
        if features.affine:
            self.qk_scale = nn.Parameter(torch.ones(2 * keys))
            self.qk_offset = nn.Parameter(torch.zeros(2 * keys))
        self.expand = None
        if features.degree > 1:
            self.expand = PolynomialFeatures(self.key_dim, features.degree)
        self._make_fast_weights(memory)
        self._make_gates(d_model)
        self.gate_proj = nn.Linear(d_model, d_model, bias=False) if readout.gate else None
        self.norm: RMSNorm | nn.LayerNorm = RMSNorm(self.value_dim)
        if readout.norm == "model":
            self.norm = nn.LayerNorm(d_model, eps=TTT_NORM_EPS)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], state: TestTimeState | None = None) -> Output:
        """Writes each token into the memory and reads the memory with its query."""
        state = self.init_state(len(x)) if state is None else state
        qkv, conv, _ = self.conv(self.qkv_proj(x), state.conv)
        q, k, v = self._features(qkv, state)
        gates = self._gates(x)
        y, fast = memorize(
            q,
            k,
            v,
            gates,
            state.fast,
            rule=self.rule,
            slow=self._slow(),
            recompute=self.recompute and self.training,
            watch=partial(observe, self) if observing() else None,
        )
        self._observe_call(gates, fast)
        position = tuple(p + x.shape[1] for p in state.position)
        return Output(self._readout(y, x), TestTimeState(fast, conv, position))

    def recall(
        self, x: Float[Tensor, "b t d"], state: TestTimeState | None = None
    ) -> Float[Tensor, "b t d"]:
        """`f(W; q)` for the weights as they stand, at the place of the next token."""
        state = self.init_state(len(x)) if state is None else state
        keys = self.heads * self.key_dim
        queries = F.linear(x, self.qkv_proj.weight[:keys])
        if self.features.conv_size == 1:  # no other token is in it
            queries = (queries * self.conv.weight[:keys, 0]).to(queries.dtype)
        q = self._placed([self._heads(self._activated(queries))], state, advance=False)[0]
        return self._readout(recall(q, state.fast, rule=self.rule, slow=self._slow()), x)

    def init_state(self, batch_size: int) -> TestTimeState:
        """The learned initial weights, for every sequence."""
        dtype = torch.promote_types(self.out_proj.weight.dtype, torch.float32)
        weights = (repeat(w.to(dtype), "h i o -> b h i o", b=batch_size) for w in self.initial)
        positions = torch.zeros(batch_size, dtype=torch.long, device=self.out_proj.weight.device)
        return TestTimeState(
            self.rule.start(tuple(weights)),
            self.conv.init_state(batch_size),
            (positions,) if self.features.rope == "sequence" else (),
        )

    def state_spec(self) -> TestTimeState:
        """A place in the chunk, and as many recent tokens as the window holds, or fewer."""
        spec, rule = super().state_spec(), self.rule
        fast = spec.fast._replace(
            recent=tuple(tokens.growing(rule.window - 1) for tokens in spec.fast.recent),
            offset=spec.fast.offset.growing(rule.chunk - 1),
        )
        return spec._replace(fast=fast)

    def state_size(self, seq_len: int) -> int:
        """Constant, but for the window's tokens at the start."""
        weights = sum(w.numel() for w in self.initial)
        copies = 1 + self.rule.keeps_reference + self.rule.momentum + self.rule.keeps_pending
        sums = 3 * self.heads if self.rule.update == "chunk" else 0
        width = self.features.width(self.key_dim) + self.value_dim
        recent = min(seq_len, self.rule.window - 1) * self.heads * width
        position = 1 if self.features.rope == "sequence" else 0
        return copies * weights + sums + recent + self.conv.state_size(seq_len) + position

    def _make_fast_weights(self, memory: MemoryNetwork) -> None:
        """Initial weights of each head, and the layer norm inside the memory."""
        width = self.features.width(self.key_dim)
        shapes = memory.shapes(width, self.value_dim)
        stds = initial_stds(memory, width, self.value_dim, unit_keys=self.features.normalize)
        spread = self.rule.boundary.spread
        self.initial = nn.ParameterList(
            torch.randn(self.heads, *shape) * (std if spread is None else spread)
            for shape, std in zip(shapes, stds, strict=True)
        )
        if isinstance(memory, MLP) and memory.bias:
            with torch.no_grad():
                for weights in self.initial:
                    weights[:, -1] = 0.0
        self.memory_norm_weight = self.memory_norm_bias = self.position_weight = None
        if memory.norm:
            self.memory_norm_weight = nn.Parameter(torch.ones(self.heads, self.value_dim))
            self.memory_norm_bias = nn.Parameter(torch.zeros(self.heads, self.value_dim))
        if self.rule.update == "average":
            self.position_weight = nn.Parameter(torch.zeros(self.rule.chunk))

    def _make_gates(self, d_model: int) -> None:
        """One linear layer for all gates, and two of low rank for decays per channel."""
        learner, forget_gate = self.learner, self.forget_gate
        biases = {
            "inner_lr": [learner.inner_lr_bias]
            * (len(self.initial) if learner.inner_lr_per_weight else 1),
            "keep": [forget_gate.bias] if forget_gate.gate == "head" else [],
            "momentum": [learner.momentum_bias] if learner.momentum else [],
            "window": [0.0] * learner.window if learner.window > 1 else [],
            "delta": [DELTA_BIAS] if self.rule.objective.needs_delta else [],
        }
        self.gate_sizes = {name: len(values) for name, values in biases.items()}
        bias = torch.tensor([value for values in biases.values() for value in values])
        self.gates_proj = nn.Linear(d_model, self.heads * len(bias))
        self.keep_proj = None
        with torch.no_grad():
            self.gates_proj.weight.zero_()
            self.gates_proj.bias.copy_(bias.repeat(self.heads))
        if forget_gate.gate == "channel":
            rank = min(KEEP_RANK, d_model)
            down, up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model)
            nn.init.zeros_(up.weight)
            nn.init.constant_(up.bias, forget_gate.bias)
            self.keep_proj = nn.Sequential(down, up)

    def _gates(self, x: Tensor) -> Gates:
        """What each token decides about its update, `[B, T, H, .]` in fp32."""
        logits = at_least_fp32(self.gates_proj(x)).unflatten(-1, (self.heads, -1))
        parts = dict(
            zip(self.gate_sizes, logits.split(list(self.gate_sizes.values()), -1), strict=True)
        )
        present = {name: part for name, part in parts.items() if part.shape[-1]}

        def gate(name: str, function: Callable[[Tensor], Tensor]) -> Tensor | None:
            return function(present[name]) if name in present else None

        rule = self.rule
        most = self.learner.largest_inner_lr(rule.chunk, rule.memory)
        keep = gate("keep", lambda z: -F.softplus(z))
        if self.keep_proj is not None:
            forgotten = F.softplus(at_least_fp32(self.keep_proj(x)))
            keep = -forgotten.clamp(max=MAX_CHUNK_DECAY / rule.chunk).unflatten(
                -1, (self.heads, -1)
            )
        return Gates(
            inner_lr=most * parts["inner_lr"].sigmoid(),
            log_keep=keep,
            log_momentum=gate("momentum", lambda z: F.logsigmoid(z)[..., 0]),
            window=gate("window", torch.sigmoid),
            delta=gate("delta", lambda z: F.softplus(z) * self.value_dim**0.5),
        )

    def _slow(self) -> Slow:
        """Slow weights in the precision of the state."""
        weight, bias = self.memory_norm_weight, self.memory_norm_bias
        norms = position = None
        if isinstance(self.rule.boundary, RowNorm):
            norms = tuple(at_least_fp32(w).norm(dim=-2, keepdim=True) for w in self.initial)
        if self.position_weight is not None:
            learned = at_least_fp32(self.position_weight)
            places = torch.arange(1, len(learned) + 1, device=learned.device)
            position = (1 / places + learned).clamp(min=0)
        return Slow(
            gain=None if weight is None else at_least_fp32(weight),
            bias=None if bias is None else at_least_fp32(bias),
            norms=norms,
            position=position,
        )

    def _features(self, qkv: Tensor, state: TestTimeState) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys `[B, T, H, K]`, values `[B, T, H, V]`."""
        keys = self.heads * self.key_dim
        q, k, v = self._activated(qkv).split([keys, keys, self.heads * self.value_dim], dim=-1)
        q, k = self._placed([self._heads(q), self._heads(k)], state, advance=True)
        return q, k, self._heads(v)

    def _activated(self, x: Tensor) -> Tensor:
        """Queries, keys and values, or queries alone, before they are heads."""
        if self.qk_scale is not None and self.qk_offset is not None:
            after = (0, self.heads * self.value_dim)  # values stay as they are
            scale, offset = F.pad(self.qk_scale, after, value=1.0), F.pad(self.qk_offset, after)
            width = x.shape[-1]
            x = (x * scale[:width] + offset[:width]).to(x.dtype)
        return F.silu(x) if self.features.silu else x

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h k) -> b t h k", h=self.heads)

    def _placed(self, xs: list[Tensor], state: TestTimeState, *, advance: bool) -> list[Tensor]:
        """Normalized, rotated to their places, and expanded to features.

        Args:
            xs: queries or keys, `[B, T, H, K]`.
            state: before the first of these tokens.
            advance: whether each token stands one place after the one before.
        """
        features = self.features
        if features.normalize:
            xs = [l2_norm(x) for x in xs]
        if features.rope is not None:
            steps = torch.arange(xs[0].shape[1], device=xs[0].device) * advance
            if features.rope == "sequence":
                positions = state.position[0][:, None] + steps
            else:
                positions = (state.fast.offset.shape[1] + steps)[None] % self.rule.chunk
            xs = rotate(*xs, positions=positions, base=features.rope_base)
        return xs if self.expand is None else [self.expand(x) for x in xs]

    def _readout(self, y: Tensor, x: Tensor) -> Tensor:
        """What was read `[B, T, H, V]` as an output: normalized, gated by `x`, mixed."""
        y = y.to(self.norm.weight.dtype)
        if self.readout.norm == "model":
            y = self.norm(rearrange(y, "b t h v -> b t (h v)"))
        else:
            y = rearrange(self.norm(y), "b t h v -> b t (h v)")
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y)

    def _observe_call(self, gates: Gates, fast: FastWeights) -> None:
        """Reports each token's and head's gates and, at the end, the norm of the weights.

        A norm per token would cost a pass over the weights for each, so it is that after the last
        token of the call, and NaN before. Of accumulators, where a boundary's map makes weights of
        them.
        """
        if not observing():
            return
        observe(self, "inner_lr", gates.inner_lr.mean(-1))
        if gates.log_keep is not None:
            observe(self, "forget", -torch.expm1(gates.log_keep).mean(-1))
        if gates.log_momentum is not None:
            observe(self, "momentum", gates.log_momentum.exp())
        norm = torch.stack([w.square().sum((-2, -1)) for w in fast.weights]).sum(0).sqrt()
        before = gates.inner_lr.shape[1] - 1
        observe(self, "memory_norm", F.pad(norm[:, None], (0, 0, before, 0), value=torch.nan))
