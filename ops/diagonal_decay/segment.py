"""What is done alike for a segment of a sequence, however its inner products were worked out.

Buffers are made once and used for every segment of a sequence: fresh memory costs several times
what arithmetic on a tile does.

Shapes: R chunks of all memories, C tokens a chunk, D or K or V width, N chunks of a segment,
M memories, R = N * M.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Segment(ABC):
    """Memory for N chunks, used again for every segment of that size, and the steps on it.

    Attributes:
        reading: Queries decayed since the start of their chunk [R, C, K].
        scores: Decayed inner products of queries with keys up to their own [R, C, C], 0 beyond.
        wholes: Decay of each chunk as a whole, N times [M, K, 1].
        v: Values [R, C, V].
        y: Buffer for outputs.
        dy: Buffer for their gradients.
    """

    def __init__(self, state: Tensor, chunks: int, *, chunk: int) -> None:
        """Memory like that of a state [B, H, K, V], for N chunks of C tokens."""
        self.memories = state.shape[0] * state.shape[1]
        self.rows = chunks * self.memories
        self.v, self.y, self.dy = state.new_empty(3, self.rows, chunk, state.shape[-1])
        self.reading: Tensor
        self.scores: Tensor
        self.wholes: tuple[Tensor, ...]

    @abstractmethod
    def take(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
        """Take in chunks [N, B, H, C, D], and work out all that needs no state.

        Returns:
            Whether this kind of segment can work with such decays; if not, nothing else of it may
            be used.
        """

    @abstractmethod
    def write(self, out: Tensor) -> None:
        """What each chunk adds to its state [R, K, V]: keys decayed to its end, times values."""

    @abstractmethod
    def backward(
        self, dy: Tensor, s: Tensor, dstate: Tensor, scale: float
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of q, k, v, g [R, C, D] and of the state before [M, K, V].

        Args:
            dy: Gradients of the outputs [N, B, H, C, V].
            s: States, as returned by `forward`.
            dstate: Gradient of the last of them.
            scale: Factor on the read.
        """

    def forward(self, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Outputs [R, C, V] and states [N + 1, M, K, V] from the state before [M, K, V]."""
        s = state.new_empty(len(self.wholes) + 1, *state.shape)
        s[0] = state
        self.write(s[1:].flatten(0, 1))
        for before, after, whole in zip(s[:-1], s[1:], self.wholes, strict=True):
            after.addcmul_(before, whole)
        y = torch.bmm(self.scores, self.v, out=self.y)
        y.baddbmm_(self.reading, s[:-1].flatten(0, 1), beta=scale, alpha=scale)
        return y, s

    def backward_states(self, dy: Tensor, dstate: Tensor, scale: float) -> Tensor:
        """Gradients of the states [N + 1, M, K, V] from those of the outputs and the last one."""
        self.dy.view(dy.shape).copy_(dy).mul_(scale)
        ds = dstate.new_empty(len(self.wholes) + 1, *dstate.shape)
        torch.bmm(self.reading.mT, self.dy, out=ds[:-1].flatten(0, 1))
        ds[-1] = dstate
        chunks = list(zip(ds[:-1], ds[1:], self.wholes, strict=True))
        for before, after, whole in reversed(chunks):
            before.addcmul_(after, whole)
        return ds
