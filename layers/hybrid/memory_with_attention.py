"""What the ways to join a memory and attention share (Titans, arXiv 2501.00663)."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.attention.softmax_attention import KVCache, SoftmaxAttention
from mneme.layers.parts.norm import RMSNorm
from mneme.layers.parts.telemetry import unrecorded
from mneme.layers.protocol import Layer, LayerFactory, State, select_state


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
        """Joins attention's output `y` and the memory's answer `m`."""
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
        self, d_model: int, *, memory: LayerFactory, heads: int, window: int, persistent: int
    ) -> None:
        super().__init__()
        self.memory = memory(d_model)
        self.attention = SoftmaxAttention(
            d_model, heads=heads, window=window, persistent=persistent
        )

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
