"""Memory as a gate and as a layer: any memory joined with attention over a window, as in Titans."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.attention.softmax_attention import KVCache, SoftmaxAttention
from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.parts.norm import RMSNorm
from mneme.layers.parts.telemetry import unrecorded
from mneme.layers.protocol import Layer, LayerFactory, Output, State, join_aux, select_state
from mneme.layers.registry import register

PERSISTENT_STD = 0.1  # with 1, attention's own, a small model learnt to recall much more slowly
EXAMPLES: Any = {
    "default": {
        "memory": partial(GatedDeltaNet, heads=2),
        "heads": 2,
        "window": 5,
        "persistent": 3,
    },
    "not_persistent": {
        "memory": partial(GatedDeltaNet, heads=1, conv_size=1),
        "heads": 2,
        "window": 4,
        "persistent": 0,
    },
}


class BranchGate(nn.Module):
    """`(1 + norm(y)) * (1 + norm(m)) - 1`: attention's output and a memory's gate each other.

    That is their product plus both, so that either branch is heard before the other has learnt
    anything. Titans normalizes both with learned vectors, then puts a non-linearity; which, where,
    and which norm is open. Ours is RMSNorm and no other non-linearity than the product. Measured on
    MQAR with a Gated DeltaNet as the memory (accuracy after 300 updates, one seed): this 0.69,
    `norm(y) * silu(norm(m))` 0.41, `silu(1 + norm(y)) * silu(1 + norm(m))` 0.30. There is no output
    projection: both branches end in one; with a second after it even their sum stayed at 0.02.

    Args:
        d_model: width D of both branches.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model)
        self.memory_norm = RMSNorm(d_model)

    def forward(self, y: Float[Tensor, "b t d"], m: Float[Tensor, "b t d"]) -> Tensor:
        """Joins attention's output `y` and the memory's output `m`."""
        dtype = self.memory_norm.weight.dtype  # autocast hands over less than the norms have
        y, m = self.attention_norm(y.to(dtype)), self.memory_norm(m.to(dtype))
        return y + m + y * m


class WindowState(NamedTuple):
    """What the memory and the attention hold.

    Attributes:
        memory: of the memory, which began with the persistent tokens.
        attention: keys and values of the last tokens.
    """

    memory: State
    attention: KVCache


class _MemoryWithWindow(Layer):
    """A memory and sliding-window attention that begin with the same persistent tokens.

    Attention sees them from everywhere; the memory has read them before the first token.
    """

    def __init__(
        self,
        d_model: int,
        *,
        memory: LayerFactory,
        heads: int = 4,
        window: int = 64,
        persistent: int = 4,
    ) -> None:
        super().__init__()
        self.memory = memory(d_model)
        self.attention = SoftmaxAttention(
            d_model, heads=heads, window=window, persistent=persistent
        )
        self._make_join(d_model)

    def _make_join(self, d_model: int) -> None:
        """The modules with which a layer joins the two."""
        raise TypeError(f"{type(self).__name__} does not define _make_join")

    def init_state(self, batch_size: int) -> WindowState:
        """A memory that has read the persistent tokens, and an empty cache."""
        return WindowState(self._first_memory(batch_size), self.attention.init_state(batch_size))

    def state_spec(self) -> WindowState:
        """What fits the memory and the attention."""
        parts: tuple[Any, Any] = self.memory, self.attention
        return WindowState(*parts)

    def state_size(self, seq_len: int) -> int:
        """That of the memory, after the persistent tokens too, and of the attention."""
        tokens = self.attention.persistent
        read = seq_len + (0 if tokens is None else len(tokens))
        return self.memory.state_size(read) + self.attention.state_size(seq_len)

    def _first_memory(self, batch_size: int) -> State:
        """The same for every sequence, so the persistent tokens are read once."""
        tokens = self.attention.persistent
        if tokens is None:
            return self.memory.init_state(batch_size)
        one = torch.stack([tokens])  # no view: without gradients, FLOP counting trips over views
        rows = torch.zeros(batch_size, dtype=torch.long, device=tokens.device)
        with unrecorded():
            return select_state(self.memory(one).state, rows)


@register(**EXAMPLES)
class MemoryAsGate(_MemoryWithWindow):
    """The gate ("MAG") of Titans (arXiv 2501.00663, section 4.2): two readers of the same input.

    With `x~ = [p_1 .. p_P ; x]`, persistent tokens p before the sequence,

        y = SW-Attn(x~),    m = M(x~),    o = gate(y, m)

    * attention is precise about the last `window` tokens and sees p from everywhere;
    * the memory reads every token and, before the first, has read p: the same parameters.

    Args:
        d_model: width D.
        memory: layer factory of the memory M; any layer will do.
        heads: of the attention; default 4.
        window: tokens that attention sees, the current one included; default 64.
        persistent: learned tokens P before the sequence; default 4.

    State: that of the memory, and of sliding-window attention (`SoftmaxAttention`).

    Where the paper is silent: the gate is that of `BranchGate`. Persistent tokens start with unit
    variance, the scale of the normalized input that they are put before, and carry no position.

    Raises:
        ValueError: sizes that attention or the memory refuses.
    """

    def _make_join(self, d_model: int) -> None:
        self.gate = BranchGate(d_model)

    def forward(self, x: Float[Tensor, "b t d"], state: WindowState | None = None) -> Output:
        """Gates what attention sees in the window by what the memory reads."""
        state = self.init_state(len(x)) if state is None else state
        y, cache, _ = self.attention(x, state.attention)
        m, memory, aux = self.memory(x, state.memory)
        return Output(self.gate(y, m), WindowState(memory, cache), join_aux({"memory": aux}))


@register(**EXAMPLES)
class MemoryAsLayer(_MemoryWithWindow):
    """The layer ("MAL") of Titans (arXiv 2501.00663, section 4.3): attention after a memory.

    With `x~ = [p_1 .. p_P ; x]`, persistent tokens p before the sequence,

        m = M(x~),    o = SW-Attn([p ; norm(m)])

    The memory condenses the past into each token before attention looks at the last `window` of
    them; what lies further back reaches the output through the memory alone.

    Args:
        d_model: width D.
        memory: layer factory of the memory M; any layer will do.
        heads: of the attention; default 4.
        window: tokens that attention sees, the current one included; default 64.
        persistent: learned tokens P before the sequence; default 4.

    State: that of the memory, and of sliding-window attention (`SoftmaxAttention`).

    Where we differ: attention sees the persistent tokens themselves, where the paper's equations
    give it what the memory reads for them. Either is one learned vector per token, the same in
    every sequence, but the reads would have to be worked out again at every call. And an RMSNorm
    stands between memory and attention, so that reads have unit scale whatever the memory's own
    output projection does. The layer ends in attention's `out_proj`.

    Raises:
        ValueError: sizes that attention or the memory refuses.
    """

    def _make_join(self, d_model: int) -> None:
        self.norm = RMSNorm(d_model)
        if self.attention.persistent is not None:
            nn.init.normal_(self.attention.persistent, std=PERSISTENT_STD)

    def forward(self, x: Float[Tensor, "b t d"], state: WindowState | None = None) -> Output:
        """Attends to what the memory reads."""
        state = self.init_state(len(x)) if state is None else state
        m, memory, aux = self.memory(x, state.memory)
        y, cache, _ = self.attention(self.norm(m.to(self.norm.weight.dtype)), state.attention)
        return Output(y, WindowState(memory, cache), join_aux({"memory": aux}))
