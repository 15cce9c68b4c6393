"""A few chunks of a sequence at once: what they read and write, and its gradient.

Buffers are made once and used for every segment of a sequence: fresh memory costs several times
what arithmetic on a tile does.

Shapes: R chunks of all memories, C tokens a chunk, D or K or V width, N chunks of a segment,
M memories, R = N * M.
"""

import math

import torch
from torch import Tensor

from mneme.ops.contract import uncompiled
from mneme.ops.diagonal_decay.levels import Descent, Ladder

_BITS = math.log2(math.e)


def _by_token(x: Tensor) -> Tensor:
    """View chunks [N, B, H, C, D] as [C, N, B, H, D]."""
    return x.movedim(3, 0)


class Segment:
    """Memory for N chunks, used again for every segment of that size, and the steps on it.

    Attributes:
        until: Keys decayed to the end of their chunk [R, C, K].
        reading: Queries decayed since the start of their chunk [R, C, K].
        wholes: Decay of each chunk as a whole, N times [M, K, 1].
        v: Values [R, C, V].
        y: Buffer for outputs.
        dy: Buffer for their gradients.
        products: Buffer for gradients of keys and of queries [R, C, K].
    """

    def __init__(self, state: Tensor, chunks: int, *, chunk: int, keep: bool) -> None:
        """Memory like that of a state [B, H, K, V], for N chunks; `keep` for a backward pass."""
        self.memories = state.shape[0] * state.shape[1]
        rows, key = chunks * self.memories, state.shape[-2]
        self.v, self.y, self.dy = state.new_empty(3, rows, chunk, state.shape[-1])
        self.ladder = Ladder(state, rows, chunk, key, keep=keep)
        self.until, self.reading = self.ladder.x.transpose(1, 2)
        self.wholes = self.ladder.whole[..., None].split(self.memories)
        self.descent = Descent(self.ladder) if keep else None
        self.products = state.new_empty(rows, chunk, key) if keep else None

    def _take(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
        """Take in chunks [N, B, H, C, D]."""
        q, k, g = (_by_token(x) for x in (q, k, g))
        decay, (keys, queries) = self.ladder.decay.view(g.shape), self.ladder.x
        torch.mul(g, _BITS, out=decay).exp2_()  # exp is slow where it underflows
        keys.view(k.shape).copy_(k)
        torch.mul(q, decay, out=queries.view(q.shape))
        self.v.view(v.shape).copy_(v)

    @uncompiled  # it writes to views of other strides
    def forward(
        self, inputs: tuple[Tensor, ...], state: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs from chunks of q, k, v and g [N, B, H, C, D] and the state before [M, K, V].

        Returns:
            Outputs [R, C, V], states [N + 1, M, K, V], and decayed inner products of queries with
            keys up to their own [R, C, C], 0 beyond.
        """
        self._take(*inputs)
        chunk, rows, _ = self.ladder.decay.shape
        scores = state.new_zeros(rows, chunk, chunk)
        q, k = (_by_token(x) for x in inputs[:2])
        own = torch.mul(q, k, out=self.ladder.terms.view(q.shape)).sum(-1)  # undecayed
        scores.diagonal(0, -2, -1).copy_(own.view(chunk, rows).T)
        self.ladder.climb(scores)
        s = state.new_empty(len(self.wholes) + 1, *state.shape)
        s[0] = state
        torch.bmm(self.until.mT, self.v, out=s[1:].flatten(0, 1))
        for before, after, whole in zip(s[:-1], s[1:], self.wholes, strict=True):
            after.addcmul_(before, whole)
        y = torch.bmm(scores, self.v, out=self.y)
        y.baddbmm_(self.reading, s[:-1].flatten(0, 1), beta=scale, alpha=scale)
        return y, s, scores

    @uncompiled
    def backward(
        self,
        inputs: tuple[Tensor, ...],
        saved: tuple[Tensor, Tensor],
        dy: Tensor,
        dstate: Tensor,
        scale: float,
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of q, k, v, g [R, C, D] and of the state before [M, K, V].

        Args:
            inputs: Chunks of q, k, v and g, as `forward` was given.
            saved: States and scores, as it returned them.
            dy: Gradients of the outputs [N, B, H, C, V].
            dstate: Gradient of the last state.
            scale: Factor on the read.
        """
        ladder, descent, (s, scores) = self.ladder, self.descent, saved
        assert descent is not None
        self._take(*inputs)
        ladder.climb(None)
        ds = self._backward_states(dy, dstate, scale)
        before, after = s[:-1].flatten(0, 1), ds[1:].flatten(0, 1)
        dv = torch.bmm(scores.mT, self.dy, out=self.y).baddbmm_(self.until, after)
        torch.bmm(self.dy, self.v.mT, out=descent.dscores)
        dk, dq = descent.dx
        dk.copy_(torch.bmm(self.v, after.mT, out=self.products).transpose(0, 1))
        dq.copy_(torch.bmm(self.dy, before.mT, out=self.products).transpose(0, 1))
        torch.sum(before * after, -1, out=descent.dwhole).mul_(ladder.whole)
        descent.descend()
        q, k = (_by_token(x) for x in inputs[:2])
        own = descent.dscores.diagonal(0, -2, -1).T.reshape(q.shape[:-1])[..., None]
        descent.dlog.view(q.shape).addcmul_(dq.mul_(ladder.decay).view(q.shape), q)
        dq.view(q.shape).addcmul_(own, k)  # a token reading its own write
        dk.view(q.shape).addcmul_(own, q)
        return [dq.transpose(0, 1), dk.transpose(0, 1), dv, descent.dlog.transpose(0, 1)], ds[0]

    def _backward_states(self, dy: Tensor, dstate: Tensor, scale: float) -> Tensor:
        """Gradients of the states [N + 1, M, K, V] from those of the outputs and the last one."""
        torch.mul(dy, scale, out=self.dy.view(dy.shape))
        ds = dstate.new_empty(len(self.wholes) + 1, *dstate.shape)
        torch.bmm(self.reading.mT, self.dy, out=ds[:-1].flatten(0, 1))
        ds[-1] = dstate
        chunks = list(zip(ds[:-1], ds[1:], self.wholes, strict=True))
        for before, after, whole in reversed(chunks):
            before.addcmul_(after, whole)
        return ds
