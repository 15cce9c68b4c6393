"""Memory as a context: attention over a segment and what a memory recalls about it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.hybrid.memory_with_attention import BranchGate
from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.parts.norm import RMSNorm
from mneme.layers.parts.rotary import rotate
from mneme.layers.protocol import (
    Layer,
    LayerFactory,
    Memory,
    Output,
    State,
    join_aux,
    require_at_least,
)
from mneme.layers.registry import register
from mneme.layers.state_fit import TensorSpec
from mneme.ops.contract import masked_attention

RECALL_SCALE = 0.25  # of h at the start, where tokens have 1; see "Where we differ"


class ContextState(NamedTuple):
    """The memory, now and when the segment began, and the segment so far.

    Attributes:
        memory: after the last token.
        start: at the start of the current segment; between segments the same as `memory`.
        k, v: `[B, S, 2 H, K]`, rotated keys and values of the S tokens since the segment began:
            H heads of what was recalled for each token, then H of the token itself. S is how far
            into the segment the sequence is, known from the shape alone.
    """

    memory: State
    start: State
    k: Float[Tensor, "b s g k"]
    v: Float[Tensor, "b s g k"]


@register(
    bare={
        "memory": partial(GatedDeltaNet, heads=1, conv_size=1),
        "segment": 8,
        "heads": 1,
        "persistent": 0,
        "rope_base": None,
    },
    default={
        "memory": partial(GatedDeltaNet, heads=2),
        "segment": 5,
        "heads": 2,
        "persistent": 3,
    },
)
class MemoryAsContext(Layer):
    """The context ("MAC") of Titans (arXiv 2501.00663, section 4.1): retrieve, attend, write, gate.

    The sequence is cut into segments S of C tokens, at absolute positions. With M' the memory at
    the end of the previous segment and persistent tokens p,

        h = norm(M'(S W_q))            read-only: `memory.recall`
        y = Attn([p ; h ; S])          causal, of the segment's tokens
        m_t = M_t(y_t)                 the memory writes y and reads, token by token
        o = gate(y, m)

    h_j was asked for by token j, so token t sees p, and h_j and S_j for j <= t only. Attention is
    precise within the segment; what lies before it comes back through h, and attention decides
    what of that is of use and, through y, what is remembered.

    Args:
        d_model: width D.
        memory: layer factory of the memory M, a `Memory`.
        segment: tokens C of a segment.
        heads: H of the attention; default 4.
        persistent: learned tokens P that every query sees; default 4.
        rope_base: base of the rotary wavelengths, or None for no positions; default 10000.

    State: two states of the memory, and 4 D scalars per token since the segment began.

    Where the paper is silent: the mask above. W_q comes before the memory's own projection of
    queries. Rotary positions count within the segment, h_t stands where token t does, and p carries
    none. Attention has an output projection of its own before y
    is written. The gate is that of `BranchGate`. Persistent tokens start with unit variance, the
    scale of the normalized input.

    Where we differ: h goes through an RMSNorm whose weight starts at 1/4. As it leaves a memory, h
    has a tenth of the tokens' scale or less, the less the deeper the model, and a small model did
    not learn to use it. At the tokens' full scale the loop of memory, h, y and memory was chaotic
    before training: over 512 tokens the effect of a change to the first grew tenfold or more in 14
    of 24 Gated DeltaNets of width 64 and 128. At 1/4 it shrank in all of them.

    Raises:
        ValueError: sizes that do not divide, or a memory that cannot recall.
    """

    def __init__(
        self,
        d_model: int,
        *,
        memory: LayerFactory,
        segment: int,
        heads: int = 4,
        persistent: int = 4,
        rope_base: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        require_at_least(1, segment=segment, heads=heads)
        require_at_least(0, persistent=persistent)
        if d_model % heads:
            raise ValueError(f"heads ({heads}) must divide d_model ({d_model})")
        if rope_base is not None and d_model // heads % 2:
            raise ValueError(f"rotary positions need an even head size, got {d_model // heads}")
        self.segment, self.heads, self.rope_base = segment, heads, rope_base
        self.memory = _able_to_recall(memory(d_model))
        self.recall_norm = RMSNorm(d_model)
        nn.init.constant_(self.recall_norm.weight, RECALL_SCALE)
        self.query_proj = nn.Linear(d_model, d_model, bias=False)
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.kv_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.attention_proj = nn.Linear(d_model, d_model, bias=False)
        self.gate = BranchGate(d_model)
        self.persistent = nn.Parameter(torch.randn(persistent, d_model)) if persistent else None

    def forward(self, x: Float[Tensor, "b t d"], state: ContextState | None = None) -> Output:
        """Works through the rest of the current segment, then segment by segment."""
        state = self.init_state(len(x)) if state is None else state
        edges = range(self.segment - state.k.shape[1], x.shape[1], self.segment)
        pieces = x.tensor_split(list(edges), dim=1)
        outputs, auxes = [], []
        for piece in pieces:
            y, state, aux = self._within_segment(piece, state)
            outputs.append(y)
            auxes.append(aux)
        mean = _mean(auxes, [piece.shape[1] for piece in pieces])
        return Output(torch.cat(outputs, 1), state, join_aux({"memory": mean}))

    def init_state(self, batch_size: int) -> ContextState:
        """Memories before their first token, and no segment begun."""
        empty = self._no_keys(batch_size, like=self.kv_proj.weight)
        return ContextState(
            self.memory.init_state(batch_size), self.memory.init_state(batch_size), empty, empty
        )

    def state_spec(self) -> ContextState:
        """Two states of the memory, and as many tokens as a segment that is not complete."""
        none = TensorSpec.of(self._no_keys(1, like=self.kv_proj.weight))
        keys: Any = none.growing(self.segment - 1)
        return ContextState(self.memory, self.memory, keys, keys)

    def state_size(self, seq_len: int) -> int:
        """Both memories, and keys and values of two kinds for each token of the segment so far."""
        begun = seq_len % self.segment
        memories = self.memory.state_size(seq_len) + self.memory.state_size(seq_len - begun)
        return memories + begun * 2 * self.kv_proj.out_features

    def _within_segment(self, x: Tensor, state: ContextState) -> Output:
        """Tokens that do not go beyond the current segment."""
        recalled = self.memory.recall(self.query_proj(x), state.start)
        q, k, v = self._queries_keys_values(x, recalled, start=state.k.shape[1])
        k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
        y = self.attention_proj(self._attend(q, k, v))
        m, memory, aux = self.memory(y, state.memory)
        after = ContextState(memory, state.start, k, v)
        if k.shape[1] == self.segment:
            empty = self._no_keys(len(x), like=k)
            after = ContextState(memory, memory, empty, empty)
        return Output(self.gate(y, m), after, aux)

    def _queries_keys_values(
        self, x: Tensor, recalled: Tensor, start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, `[B, T, H, K]`; keys and values of both kinds, `[B, T, 2 H, K]`."""
        q = rearrange(self.q_proj(x), "b t (h k) -> b t h k", h=self.heads)
        h = self.recall_norm(recalled.to(self.recall_norm.weight.dtype))
        kv = self.kv_proj(torch.stack([h.to(x.dtype), x], 2))
        k, v = rearrange(kv, "b t both (two h k) -> two b t (both h) k", two=2, h=self.heads)
        if self.rope_base is not None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
            q, k = rotate(q, k, positions=positions, base=self.rope_base)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From the last tokens of the segment to what they may see of it, `[B, T, D]`."""
        prefix = 0 if self.persistent is None else len(self.persistent)
        mask = None  # the last token sees everything
        if q.shape[1] > 1:
            mask = _mask(q.shape[1], k.shape[1], prefix, q.device)
        k, v = (rearrange(t, "b s (both h) k -> b h (s both) k", both=2) for t in (k, v))
        k, v = self._with_persistent(k, v)
        y = masked_attention(q.transpose(1, 2), k, v, mask)
        return rearrange(y, "b h t k -> b t (h k)")

    def _with_persistent(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.persistent is None:
            return k, v
        kv = self.kv_proj(self.persistent)
        first = repeat(kv, "p (two h k) -> two b h p k", two=2, h=self.heads, b=len(k))
        return torch.cat([first[0], k], 2), torch.cat([first[1], v], 2)

    def _no_keys(self, batch_size: int, like: Tensor) -> Tensor:
        width = self.kv_proj.in_features // self.heads
        return like.new_empty(batch_size, 0, 2 * self.heads, width)


def _able_to_recall(memory: Layer) -> Memory:
    if not isinstance(memory, Memory):
        raise ValueError(f"memory must be able to recall; {type(memory).__name__} is no Memory")
    return memory


def _mask(queries: int, tokens: int, prefix: int, device: torch.device) -> Tensor:
    """What the last queries see of the prefix and of two keys per token, `[T, P + 2 S]`."""
    seen = torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    return F.pad(seen.repeat_interleave(2, dim=1), (prefix, 0), value=True)


def _mean(auxes: Sequence[Mapping[str, Tensor]], tokens: Sequence[int]) -> dict[str, Tensor]:
    """Each name's mean over the pieces, by their tokens; that of the one piece if it has none."""
    weights = [count / sum(tokens) if sum(tokens) else 1.0 for count in tokens]
    return {
        name: torch.stack([w * aux[name] for w, aux in zip(weights, auxes, strict=True)]).sum(0)
        for name in auxes[0]
    }
