"""What the ways to join a memory and attention share (Titans, arXiv 2501.00663)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layers.protocol import Layer, Recipe, State, select_state
from layers.softmax_attention import KVCache, SoftmaxAttention

BRANCH_SCALE = 0.25  # of a branch beside its bias of one: the product is then close to a sum


class BranchGate(nn.Module):
    """`silu(norm(y) + a) * silu(norm(m) + b)`: the product of attention's output and a memory's.

    Titans normalises both with learned vectors and puts a non-linearity after; which norm, which
    non-linearity and where is open. Ours are RMSNorm and SiLU on both branches, with learned biases
    that start at one and norms that start at a quarter: the product is then close to a sum of the
    branches, and either is heard before the other has learnt anything. A bare product kept
    `MemoryAsGate` at the guess level on MQAR for as long as its memory alone takes to learn it.

    Args:
        d_model: width D of both branches.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        nn.init.constant_(self.attention_norm.weight, BRANCH_SCALE)
        self.attention_bias = nn.Parameter(torch.ones(d_model))
        self.memory_norm = nn.RMSNorm(d_model)
        nn.init.constant_(self.memory_norm.weight, BRANCH_SCALE)
        self.memory_bias = nn.Parameter(torch.ones(d_model))

    def forward(self, y: Float[Tensor, "b t d"], m: Float[Tensor, "b t d"]) -> Tensor:
        """Gates attention's output `y` and the memory's answer `m` by each other."""
        dtype = self.memory_norm.weight.dtype  # autocast hands over less than the norms have
        attended = F.silu(self.attention_norm(y.to(dtype)) + self.attention_bias)
        return attended * F.silu(self.memory_norm(m.to(dtype)) + self.memory_bias)


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
        self, d_model: int, *, memory: Recipe, heads: int, window: int, persistent: int
    ) -> None:
        super().__init__()
        self.memory = memory(d_model)
        self.attention = SoftmaxAttention(
            d_model, heads=heads, window=window, persistent=persistent
        )

    def init_state(self, batch_size: int) -> WindowState:
        """A memory that has read the persistent tokens, and an empty cache."""
        return WindowState(self._first_memory(batch_size), self.attention.init_state(batch_size))

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
        return select_state(self.memory(one).state, rows)
