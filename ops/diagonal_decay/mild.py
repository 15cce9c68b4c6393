"""Segments in which no channel forgets very much: one product for all pairs of a chunk's tokens.

The decay from token j to token i of a chunk is since_i / since_j, with since_i the decay from the
chunk's first token to i. Where no since falls below `exp(-LIMIT)`, q_i since_i and k_j / since_j
are numbers of a common size, and their products are all inner products of the chunk at once. What
lies above the diagonal is no inner product and up to `exp(LIMIT)` too large; it is set to 0.

Shapes: R chunks of all memories, C tokens a chunk, D or K or V width, N chunks of a segment,
M memories, R = N * M.
"""

import math

import torch
from torch import Tensor

from ops.diagonal_decay.segment import Segment

LIMIT = 16.0  # e^-16 of a channel is what fp32 would round away beside one
_BITS = math.log2(math.e)


class MildSegment(Segment):
    """A segment of mild decays.

    Attributes:
        since: Decay since the start of the chunk [R, C, K].
        rising: Keys over `since` [R, C, K].
    """

    def __init__(self, state: Tensor, chunks: int, *, chunk: int) -> None:
        """Memory like that of a state [B, H, K, V], for N chunks of C tokens."""
        super().__init__(state, chunks, chunk=chunk)
        self.since, self.reading, self.rising = state.new_empty(
            3, self.rows, chunk, state.shape[-2]
        )
        self.scores, self.dscores = state.new_empty(2, self.rows, chunk, chunk)
        self.whole = self.since[:, -1, :, None]
        self.wholes = self.whole.split(self.memories)

    @torch.compiler.disable  # it branches on numbers, and writes to views of other strides
    def take(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
        """Take in chunks, if decays are mild."""
        since = torch.cumsum(g, -2, out=self.since.view(g.shape))
        if not since.is_meta and not since[..., -1, :].amin() >= -LIMIT:  # or is not a number
            return False
        since.mul_(_BITS).exp2_()
        torch.mul(q, since, out=self.reading.view(q.shape))
        torch.div(k, since, out=self.rising.view(k.shape))
        self.v.view(v.shape).copy_(v)
        torch.bmm(self.reading, self.rising.mT, out=self.scores).tril_()
        return True

    def write(self, out: Tensor) -> None:
        """What each chunk adds to its state."""
        torch.bmm(self.rising.mT, self.v, out=out).mul_(self.whole)

    def backward(
        self, dy: Tensor, s: Tensor, dstate: Tensor, scale: float
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of q, k, v, g and of the state before."""
        ds = self.backward_states(dy, dstate, scale)
        before, after = s[:-1].flatten(0, 1), ds[1:].flatten(0, 1)
        passed = (s[1:].flatten(0, 1) * after).sum(-1)  # the gradient of log whole
        after = after * self.whole
        torch.bmm(self.dy, self.v.mT, out=self.dscores).tril_()
        dq = torch.bmm(self.dy, before.mT).baddbmm_(self.dscores, self.rising)
        dk = torch.bmm(self.v, after.mT).baddbmm_(self.dscores.mT, self.reading)
        dv = torch.bmm(self.rising, after, out=self.y).baddbmm_(self.scores.mT, self.dy)
        dlog = self.reading.mul_(dq).addcmul_(self.rising, dk, value=-1)  # of since
        dlog[:, -1] += passed
        dg = dlog.flip(1).cumsum(1).flip(1)
        return [dq.mul_(self.since), dk.div_(self.since), dv, dg], ds[0]
