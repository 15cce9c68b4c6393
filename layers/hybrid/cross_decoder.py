"""The cross-decoder: many layers that read one memory and one cache of keys and values."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.attention.softmax_attention import KVCache, SoftmaxAttention
from mneme.layers.combinators import Residual
from mneme.layers.feed_forward import MLP
from mneme.layers.hybrid.gated_memory_unit import GatedMemoryUnit
from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.matrix.linear_attention import LinearAttention
from mneme.layers.parts.rotary import rotate
from mneme.layers.protocol import (
    Layer,
    LayerFactory,
    LayerList,
    Output,
    RoutedLayer,
    SavingLayer,
    State,
    join_aux,
    require_at_least,
    start_state,
)
from mneme.layers.registry import register
from mneme.layers.state_fit import ANYTHING
from mneme.ops.attention import attention


class CrossDecoderState(NamedTuple):
    """What a cross-decoder carries, however many layers read it.

    Attributes:
        memory: of the memory.
        attention: the one cache of keys and values.
        ffns: of the feed-forward layers, in order.
    """

    memory: State
    attention: KVCache
    ffns: tuple[State, ...]


class CrossAttention(nn.Module):
    """Attention to keys and values that another layer made, with queries of its own.

    Args:
        d_model: width D.
        source: the layer that makes them; heads, rotary positions and biases are as there.
    """

    def __init__(self, d_model: int, *, source: SoftmaxAttention) -> None:
        super().__init__()
        self.heads, self.rope_base = source.heads, source.rope_base
        self.rope_scaling = source.rope_scaling
        width, bias = source.heads * source.head_dim, source.q_proj.bias is not None
        self.q_proj = nn.Linear(d_model, width, bias=bias)
        self.out_proj = nn.Linear(width, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "b t d"], saved: KVCache) -> Float[Tensor, "b t d"]:
        """Attends from each token of `x`, the last T of the cache, to the tokens up to it."""
        q = rearrange(self.q_proj(x), "b t (h k) -> b t h k", h=self.heads)
        if self.rope_base is not None:
            ages = torch.arange(x.shape[1], 0, -1, device=x.device)
            positions = saved.position[:, None] - ages
            (q,) = rotate(q, positions=positions, base=self.rope_base, scaling=self.rope_scaling)
        y = attention(q, saved.k.to(q.dtype), saved.v.to(q.dtype))
        return self.out_proj(rearrange(y, "b t h k -> b t (h k)"))


@register(
    default={
        "memory": partial(GatedDeltaNet, heads=2),
        "attention": partial(SoftmaxAttention, heads=1),
        "ffn": partial(MLP, expand=2),
    },
    plain={
        "memory": partial(LinearAttention, heads=1),
        "attention": partial(SoftmaxAttention, heads=2, kv_heads=1, rope_base=None),
        "units": 2,
        "norm": False,
    },
)
class CrossDecoder(RoutedLayer):
    """The decoder of SambaY (arXiv 2507.06607) from the memory that its later layers share.

    Each line is a pre-norm residual step, `h + f(norm(h))`:

        memory      saves m, what it read, before its own gate and output projection
        attention   full, saves its keys and values
        units times:
            GatedMemoryUnit    reads m at the same position
            CrossAttention     reads the keys and values with queries of its own

    and each is followed by a feed-forward step. Keys and values are made and carried once (as in
    YOCO, arXiv 2405.05254), and half of the later layers need none. What is written to the
    residual stream is the sum of what the steps add, `h_last - h_first`.

    Args:
        d_model: width D.
        memory: layer factory of the memory. Any layer will do; one that cannot save what it read
            (it is no `SavingLayer`) saves its output.
        attention: layer factory of a `SoftmaxAttention` without a window and persistent tokens.
        ffn: layer factory of the feed-forward layers; default None, none.
        units: pairs of a gated memory unit and a cross-attention; default 1.
        norm: RMSNorm in the gated memory units; default True. The paper has none where the memory
            is Mamba.

    State: that of the memory, and `2 G K` scalars per token and a position of the attention.

    Where we differ: the layer stands in a residual stack of its own, so the first h is normalized.
    Prefill could leave out the later layers for all but the last token; ours gives every output.

    Raises:
        ValueError: an attention that is not full softmax attention, or units below 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        memory: LayerFactory,
        attention: LayerFactory,
        ffn: LayerFactory | None = None,
        units: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, units=units)
        saving = _Saving(d_model, memory(d_model))
        source = _full(attention(d_model))
        unit = partial(GatedMemoryUnit, saved_dim=saving.saved_dim, norm=norm)
        cross = partial(CrossAttention, source=source)
        self.memory = Residual(d_model, layer=lambda _: saving)
        self.attention = Residual(d_model, layer=lambda _: source)
        self.readers = LayerList(
            Residual(d_model, layer=partial(_Reading, reader=reader))
            for _ in range(units)
            for reader in (unit, cross)
        )
        feeds = [] if ffn is None else [ffn] * (2 + len(self.readers))
        self.ffns = LayerList(Residual(d_model, layer=feed) for feed in feeds)

    def forward(self, x: Float[Tensor, "b t d"], state: CrossDecoderState | None = None) -> Output:
        """Writes the memory and the cache once, and reads them as often as there are units."""
        state = self.init_state(len(x)) if state is None else state
        fed: list[State] = []
        auxes = {}

        def feed(h: Tensor) -> Tensor:
            if not len(self.ffns):
                return h
            i = len(fed)
            h, (inner,), auxes[f"ffn/{i}"] = self.ffns[i](h, (state.ffns[i],))
            fed.append(inner)
            return h

        h, ((memory, saved),), auxes["memory"] = self.memory(x, (state.memory,))
        h, (cache,), auxes["attention"] = self.attention(feed(h), (state.attention,))
        h = feed(h)
        for reader, read in zip(self.readers, cycle([saved, cache]), strict=False):
            h = feed(reader(h, (read,)).y)
        return Output(h - x, CrossDecoderState(memory, cache, tuple(fed)), join_aux(auxes))

    def init_state(self, batch_size: int, route: Any = None) -> CrossDecoderState:
        """A memory and a cache before the first token."""
        (memory,) = start_state(self.memory, batch_size, route)
        (cache,) = start_state(self.attention, batch_size, route)
        fed = tuple(inner for ffn in self.ffns for inner in start_state(ffn, batch_size, route))
        return CrossDecoderState(memory, cache, fed)

    def state_spec(self) -> CrossDecoderState:
        """What fits the layers that carry something."""
        steps = (self.memory, self.attention, *self.ffns)
        memory, source, *ffns = (step.parts[0] for step in steps)
        return CrossDecoderState(memory, source, tuple(ffns))

    def state_size(self, seq_len: int) -> int:
        """The memory's, and keys and values of every token."""
        return sum(step.state_size(seq_len) for step in (self.memory, self.attention, *self.ffns))


class _Saving(Layer):
    """A memory whose state, as it is returned, comes with what it saved."""

    def __init__(self, d_model: int, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.saved_dim = layer.saved_dim if isinstance(layer, SavingLayer) else d_model

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """The layer's output, and `(state, saved)`."""
        if isinstance(self.layer, SavingLayer):
            output, saved = self.layer.forward_saving(x, state)
        else:
            output = self.layer(x, state)
            saved = output.y
        return output._replace(state=(output.state, saved))

    def init_state(self, batch_size: int) -> State:
        """The state of the layer inside, without what is saved."""
        return self.layer.init_state(batch_size)

    def state_spec(self) -> Layer:
        """The layer inside, whose states fit."""
        return self.layer

    def state_size(self, seq_len: int) -> int:
        """That of the layer inside."""
        return self.layer.state_size(seq_len)


class _Reading(Layer):
    """A reader as the layer of a residual step, given as its state what another step saved."""

    def __init__(self, d_model: int, *, reader: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.reader = reader(d_model)

    def forward(self, x: Float[Tensor, "b t d"], state: Any = None) -> Output:
        """What is read; nothing is carried."""
        return Output(self.reader(x, state))

    def state_spec(self) -> Any:
        """What was saved is no state and comes from the step before."""
        return ANYTHING


def _full(attention: Layer) -> SoftmaxAttention:
    """The attention, if every later token can read all that it keeps."""
    if not isinstance(attention, SoftmaxAttention):
        raise ValueError(f"attention must be SoftmaxAttention, got {type(attention).__name__}")
    if attention.window is not None or attention.persistent is not None:
        raise ValueError("attention must have neither a window nor persistent tokens")
    return attention
