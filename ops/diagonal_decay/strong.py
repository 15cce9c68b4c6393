"""Segments of any decays, however strong, whose inner products are joined level by level.

Shapes: R chunks of all memories, C tokens a chunk, D or K or V width, N chunks of a segment,
M memories, R = N * M.
"""

import math

import torch
from torch import Tensor

from ops.diagonal_decay.levels import Descent, Ladder
from ops.diagonal_decay.segment import Segment


class StrongSegment(Segment):
    """A segment of decays of any strength."""

    def __init__(self, state: Tensor, chunks: int, *, chunk: int, keep: bool) -> None:
        """Memory like that of a state [B, H, K, V], for N chunks; `keep` for a backward pass."""
        super().__init__(state, chunks, chunk=chunk)
        key = state.shape[-2]
        self.ladder = Ladder(state, self.rows, chunk, key, keep=keep)
        self.q, self.k = state.new_empty(2, self.rows, chunk, key)
        self.until, self.reading = self.ladder.x
        self.scores = self.ladder.scores
        self.own = self.scores.diagonal(0, -2, -1)
        self.wholes = self.ladder.whole[..., None].split(self.memories)
        self.descent = Descent(self.ladder) if keep else None

    def take(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
        """Take in chunks of any decays."""
        ladder, keys, queries = self.ladder, self.until, self.reading
        for tiles, chunks in ((self.q, q), (self.k, k), (self.v, v), (ladder.decay, g)):
            tiles.view(chunks.shape).copy_(chunks)
        ladder.decay.mul_(math.log2(math.e)).exp2_()  # exp is slow where it underflows
        torch.sum(torch.mul(self.q, self.k, out=keys), -1, out=self.own)
        keys.copy_(self.k)
        torch.mul(self.q, ladder.decay, out=queries)
        ladder.climb()
        return True

    def write(self, out: Tensor) -> None:
        """What each chunk adds to its state."""
        torch.bmm(self.until.mT, self.v, out=out)

    def backward(
        self, dy: Tensor, s: Tensor, dstate: Tensor, scale: float
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of q, k, v, g and of the state before."""
        ladder, descent = self.ladder, self.descent
        assert descent is not None
        ds = self.backward_states(dy, dstate, scale)
        before, after = s[:-1].flatten(0, 1), ds[1:].flatten(0, 1)
        dv = torch.bmm(self.scores.mT, self.dy, out=self.y).baddbmm_(self.until, after)
        torch.bmm(self.dy, self.v.mT, out=descent.dscores)
        dk, dq = descent.dx
        torch.bmm(self.v, after.mT, out=dk)
        torch.bmm(self.dy, before.mT, out=dq)
        torch.sum(before * after, -1, out=descent.dwhole).mul_(ladder.whole)
        descent.descend()
        own = descent.dscores.diagonal(0, -2, -1)[..., None]  # a token reading its own write
        dg = descent.dlog.addcmul_(dq.mul_(ladder.decay), self.q)
        dq.addcmul_(own, self.k)
        dk.addcmul_(own, self.q)
        return [dq, dk, dv, dg], ds[0]
