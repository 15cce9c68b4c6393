"""Softmax attention: the memory that keeps every token, or the last few."""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mneme.layers.parts.rotary import RopeScaling, rotate
from mneme.layers.protocol import Layer, Output, require_at_least
from mneme.layers.registry import register
from mneme.ops.attention import attention


class KVCache(NamedTuple):
    """Rotated keys and values of the tokens that later queries can still see.

    Attributes:
        k, v: `[B, S, G, K]`, S tokens of G key-value heads.
        position: `[B]`, tokens seen so far: the position of the next one.
    """

    k: Float[Tensor, "b s g k"]
    v: Float[Tensor, "b s g k"]
    position: Int[Tensor, " b"]


@register(
    full={"heads": 2},
    window={"heads": 2, "window": 5},
    grouped={"heads": 4, "kv_heads": 2},
    no_positions={"heads": 2, "rope_base": None},
    persistent={"heads": 2, "persistent": 3, "window": 4},
    biased={"heads": 2, "bias": True, "rope_scaling": RopeScaling(factor=4.0, trained_length=16)},
)
class SoftmaxAttention(Layer):
    """Causal multi-head attention (arXiv 1706.03762) with rotary positions and a carried cache.

    `y_t = W_o sum_s softmax_s(q_t . k_s / sqrt(K)) v_s` over the tokens `s <= t`, or over the last
    `window` of them. Key-value heads may be shared by groups of query heads (arXiv 2305.13245).
    Persistent tokens (Titans, arXiv 2501.00663) are learned inputs put before the sequence: every
    query sees them, also beyond the window; they carry no position.

    Args:
        d_model: width D.
        heads: query heads H; default 4.
        kv_heads: key-value heads G, a divisor of H; default H.
        head_dim: size K of a head, even if positions are used; default D / H.
        window: tokens a query sees, itself included; default None, all of them.
        persistent: learned tokens before the sequence; default 0.
        rope_base: base of the rotary wavelengths, or None for no positions; default 10000.
        rope_scaling: of the rotary frequencies, as in Llama 3.1; default None.
        bias: biases of the linear layers; default False.

    State: `2 G K` scalars per visible past token (at most `window - 1` with a window) and one
    position. The cache is copied once per call, as reading it is no cheaper.

    Raises:
        ValueError: sizes that do not divide, a window below 1, or scaled positions without
            positions.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        persistent: int = 0,
        rope_base: float | None = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads)
        require_at_least(0, persistent=persistent)
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = d_model // heads if head_dim is None else head_dim
        self.window = window
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self._check_sizes(d_model, head_dim)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, queries, bias=bias)
        self.kv_proj = nn.Linear(d_model, 2 * keys, bias=bias)
        self.out_proj = nn.Linear(queries, d_model, bias=bias)
        self.persistent = nn.Parameter(torch.randn(persistent, d_model)) if persistent else None

    def _check_sizes(self, d_model: int, head_dim: int | None) -> None:
        window = 1 if self.window is None else self.window
        require_at_least(1, kv_heads=self.kv_heads, head_dim=self.head_dim, window=window)
        if head_dim is None and d_model % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide d_model ({d_model})")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.rope_base is None and self.rope_scaling is not None:
            raise ValueError("rope_scaling needs a rope_base; with None there are no positions")
        if self.rope_base is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")

    def forward(self, x: Float[Tensor, "b t d"], state: KVCache | None = None) -> Output:
        """Attends from each token of `x` to the tokens of the cache and of `x` up to it."""
        q = rearrange(self.q_proj(x), "b t (h k) -> b t h k", h=self.heads)
        k, v = self._keys_values(x)
        state = self._empty(x.shape[0], like=k) if state is None else state
        q, k = self.placed(q, k, state.position)
        k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
        y = attention(q, *self._with_persistent(k, v), window=self.window, prefix=self._prefix)
        cache = KVCache(self._visible(k), self._visible(v), state.position + x.shape[1])
        return Output(self.out_proj(rearrange(y, "b t h k -> b t (h k)")), cache)

    def init_state(self, batch_size: int) -> KVCache:
        """An empty cache."""
        return self._empty(batch_size, like=self.kv_proj.weight)

    def state_spec(self) -> KVCache:
        """Any number of tokens, or those that the next one still sees."""
        spec = super().state_spec()
        most = None if self.window is None else self.window - 1
        return spec._replace(k=spec.k.growing(most), v=spec.v.growing(most))

    def state_size(self, seq_len: int) -> int:
        """Keys and values of the tokens still visible, and the position."""
        tokens = seq_len if self.window is None else min(seq_len, self.window - 1)
        return 2 * tokens * self.kv_heads * self.head_dim + 1

    def placed(
        self, q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t g k"], start: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t g k"]]:
        """Queries and keys rotated to their positions, those of each sequence from `start` on."""
        if self.rope_base is None:
            return q, k
        positions = start[:, None] + torch.arange(q.shape[1], device=q.device)
        q, k = rotate(q, k, positions=positions, base=self.rope_base, scaling=self.rope_scaling)
        return q, k

    @property
    def _prefix(self) -> int:
        return 0 if self.persistent is None else self.persistent.shape[0]

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = rearrange(self.kv_proj(x), "... (two g k) -> two ... g k", two=2, g=self.kv_heads)
        return k, v

    def _empty(self, batch_size: int, like: Tensor) -> KVCache:
        cache = like.new_empty(batch_size, 0, self.kv_heads, self.head_dim)
        position = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return KVCache(cache, cache, position)

    def _with_persistent(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.persistent is None:
            return k, v
        first = self._keys_values(self.persistent)
        first_k, first_v = (repeat(t, "p g k -> b p g k", b=len(k)) for t in first)
        return torch.cat([first_k.to(k.dtype), k], 1), torch.cat([first_v.to(v.dtype), v], 1)

    def _visible(self, cache: Tensor) -> Tensor:
        """The part of the cache that the next token may see, free of what it may not."""
        surplus = 0 if self.window is None else cache.shape[1] - (self.window - 1)
        return cache if surplus <= 0 else cache[:, surplus:].clone()
