"""B'MOJO: one softmax over recent tokens, a memory's reads for older ones, and a few kept ones."""

from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mneme.layers.attention.softmax_attention import SoftmaxAttention
from mneme.layers.hybrid.eidetic import (
    EideticState,
    nothing_kept,
    number_kept,
    scored,
    select,
    still_waiting,
)
from mneme.layers.hybrid.key_sets import Blocks, attend
from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.parts.norm import RMSNorm
from mneme.layers.protocol import Layer, LayerFactory, Output, State, join_aux, require_at_least
from mneme.layers.registry import register


class BMojoState(NamedTuple):
    """What B'MOJO carries.

    Attributes:
        memory: of the fading memory.
        recent: `[B, S, 2, G, K]`, rotated keys and values of the last tokens: those of the window
            or, with an eidetic memory, of the current block and the one before.
        fading: `[B, S, 2, G, K]`, the same of the memory's last outputs.
        eidetic: of the eidetic memory; empty without.
        position: `[B]`, tokens seen.
    """

    memory: State
    recent: Float[Tensor, "b s two g k"]
    fading: Float[Tensor, "b f two g k"]
    eidetic: tuple[EideticState, ...]
    position: Int[Tensor, " b"]


@register(
    default={
        "memory": partial(GatedDeltaNet, heads=1, conv_size=1),
        "heads": 2,
        "window": 5,
        "eidetic": 3,
    },
    fading={"memory": partial(GatedDeltaNet, heads=2), "heads": 4, "kv_heads": 2, "window": 4},
    eidetic_beyond_window={
        "memory": partial(GatedDeltaNet, heads=1, conv_size=1),
        "heads": 2,
        "window": 3,
        "eidetic": 7,
        "rope_base": None,
    },
)
class BMojo(Layer):
    """B'MOJO (arXiv 2407.06324): attention to a window, a fading and an eidetic memory at once.

    With y = norm(M(u)), the outputs of any memory M for the input u, token i makes its query of u_i
    and takes one joint softmax over keys and values of

    * the window: u at [i - w + 1, i];
    * fading tokens: y at [i - 2w + 1, i - w], before the window, which bring what M knows of all
      that is older;
    * eidetic tokens: at most E of the u that have left the window.

    All three share their projections. A token is rotated to its own position in the text,
    whichever set it is in.

    Eidetic tokens are those whose values the tokens before them predicted worst
    (`ops/innovation.py`). The text is cut into blocks of w tokens at absolute positions. Queries of
    block b find the E worst predicted of blocks 0 to b - 2: no token is in the window and kept as
    well, and all blocks are computed at once, at a cost linear in the length.

    Args:
        d_model: width D.
        memory: layer factory of the fading memory M; any layer will do.
        heads: query heads H; default 4.
        kv_heads: key-value heads G, a divisor of H; default H.
        head_dim: size K of a head; default D / H.
        window: w, tokens a query sees, itself included; default 64.
        eidetic: E, tokens that are kept; default 0, the B'MOJO-F of the authors' released code.
        rope_base: base of the rotary wavelengths, or None for no positions; default 10000.

    State: that of the memory, and 2 G K scalars for each of at most w - 1 recent and 2w - 1 fading
    tokens. With an eidetic memory, recent tokens are at most 2w - 1, the kept ones E, all these
    have a score, and the predictor is G K^2; the sequences of a batch stand at the same place,
    since the place within the block is a shape.

    Where we differ: the paper's test of innovation and policy of replacement are not known to us in
    full. Ours is the error of a delta rule on the layer's own keys and values before rotation. It
    is causal and cheap, asks nothing of M and is carried like any memory; it passes no gradient.
    Where scores are closer than rounding, feeding a text in other pieces may keep another token.
    The released code has no norm after M; ours gives tied projections inputs of one scale.

    Raises:
        ValueError: sizes that attention or the memory refuses, or `eidetic` below 0.
    """

    def __init__(
        self,
        d_model: int,
        *,
        memory: LayerFactory,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int = 64,
        eidetic: int = 0,
        rope_base: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        require_at_least(0, eidetic=eidetic)
        self.window, self.eidetic = window, eidetic
        self.memory = memory(d_model)
        self.norm = RMSNorm(d_model)
        self.attention = SoftmaxAttention(  # for its projections; which keys are seen differs
            d_model,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window,
            rope_base=rope_base,
        )

    def forward(self, x: Float[Tensor, "b t d"], state: BMojoState | None = None) -> Output:
        """Writes the memory, then attends to tokens, to its outputs and to what is kept."""
        state = self.init_state(len(x)) if state is None else state
        y, memory, aux = self.memory(x, state.memory)
        q, k, v = self._projected(x, y)
        groups = self.attention.kv_heads
        eidetic = tuple(scored(e, k[:, :, :groups], v[:, :, :groups]) for e in state.eidetic)
        q, k = self.attention.placed(q, k, state.position)
        recent, fading = torch.stack([k, v], 2).split(groups, dim=3)
        recent = torch.cat([state.recent.to(k.dtype), recent], 1)
        fading = torch.cat([state.fading.to(k.dtype), fading], 1)

        place = state.recent.shape[1] % self.window if eidetic else 0
        blocks = Blocks(self.window, place, x.shape[1])
        sets = [blocks.seen(fading, lag=self.window), blocks.seen(recent)]
        kept = [select(e, recent, blocks, self.eidetic) for e in eidetic]
        read = blocks.joined(attend(blocks.queries(q), [*sets, *(found for found, _ in kept)]))
        after = BMojoState(
            memory,
            _last(recent, self._recent(recent.shape[1])),
            _last(fading, 2 * self.window - 1),
            tuple(e for _, e in kept),
            state.position + x.shape[1],
        )
        return Output(self.attention.out_proj(read), after, join_aux({"memory": aux}))

    def init_state(self, batch_size: int) -> BMojoState:
        """A memory before its first token, and no keys."""
        attention = self.attention
        none = attention.kv_proj.weight.new_empty(
            batch_size, 0, 2, attention.kv_heads, attention.head_dim
        )
        return BMojoState(
            self.memory.init_state(batch_size),
            none,
            none,
            (nothing_kept(none),) if self.eidetic else (),
            torch.zeros(batch_size, dtype=torch.long, device=none.device),
        )

    def state_spec(self) -> BMojoState:
        """As many tokens in each set as it holds at most."""
        spec, window, eidetic = super().state_spec(), self.window, self.eidetic
        kept = tuple(
            e._replace(
                tokens=e.tokens.growing(eidetic),
                score=e.score.growing(eidetic),
                waiting=e.waiting.growing(2 * window - 1),
            )
            for e in spec.eidetic
        )
        return spec._replace(
            memory=self.memory,
            recent=spec.recent.growing(2 * window - 1 if eidetic else window - 1),
            fading=spec.fading.growing(2 * window - 1),
            eidetic=kept,
        )

    def state_size(self, seq_len: int) -> int:
        """The memory's, and keys and values of the tokens of each set."""
        groups, width = self.attention.kv_heads, self.attention.head_dim
        recent, fading = self._recent(seq_len), min(seq_len, 2 * self.window - 1)
        kept = number_kept(seq_len, self.window, self.eidetic)
        eidetic = recent + kept + groups * width**2 if self.eidetic else 0
        tokens = 2 * groups * width * (recent + fading + kept)
        return self.memory.state_size(seq_len) + tokens + eidetic + 1

    def _recent(self, tokens: int) -> int:
        """How many of the last tokens are carried."""
        if self.eidetic:
            return still_waiting(tokens, self.window)
        return min(tokens, self.window - 1)

    def _projected(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, `[B, T, H, K]`; keys and values of x, then of y, `[B, T, 2 G, K]`."""
        attention = self.attention
        q = rearrange(attention.q_proj(x), "b t (h k) -> b t h k", h=attention.heads)
        fading = self.norm(y.to(self.norm.weight.dtype)).to(x.dtype)
        kv = attention.kv_proj(torch.stack([x, fading], 2))
        k, v = rearrange(
            kv, "b t both (two g k) -> two b t (both g) k", two=2, g=attention.kv_heads
        )
        return q, k, v


def _last(tokens: Tensor, count: int) -> Tensor:
    """The last tokens, free of those before."""
    surplus = tokens.shape[1] - count
    return tokens if surplus <= 0 else tokens[:, surplus:].clone()
