"""Decay by channel, chunk by chunk, with a hand-written backward pass.

The derivation, cost and measurements are in the README beside this file. All work is on stacks of
tiles [R, ...]: R = N * M, N chunks by M = B * H memories, chunks outermost.

Shapes: B batch, T time, H heads, D or K or V width, C chunk, N chunks of a segment, M = B * H.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.diagonal_decay.levels import Descent, Ladder
from ops.precision import without_autocast
from ops.tiling import Tiling

# Numbers per tensor of a segment, for each thread. The steps of a segment go over some twenty such
# tensors, which should stay in cache; a smaller segment pays more for its calls than it gains.
_SEGMENT_NUMBERS = 2**17


class _Segment:
    """Memory for N chunks, used again for every segment of that size, and the steps on it."""

    def __init__(self, tiling: Tiling, chunks: int, state: Tensor, *, keep: bool) -> None:
        """Memory like that of a state [B, H, K, V]; `keep` for a backward pass."""
        rows, (key, value) = chunks * tiling.memories, state.shape[-2:]
        self.ladder = Ladder(state, rows, tiling.chunk, key, keep=keep)
        self.q, self.k = state.new_empty(2, rows, tiling.chunk, key)
        self.v, self.y, self.dy = state.new_empty(3, rows, tiling.chunk, value)
        self.own = self.ladder.scores.diagonal(0, -2, -1)
        self.wholes = self.ladder.whole[..., None].split(tiling.memories)
        self.descent = Descent(self.ladder) if keep else None

    def read(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
        """Take in chunks [N, B, H, C, D] and work out all that needs no state."""
        ladder = self.ladder
        for tiles, chunks in ((self.q, q), (self.k, k), (self.v, v), (ladder.decay, g)):
            tiles.view(chunks.shape).copy_(chunks)
        ladder.decay.mul_(math.log2(math.e)).exp2_()  # exp is slow where it underflows
        torch.sum(torch.mul(self.q, self.k, out=ladder.x[0]), -1, out=self.own)
        ladder.x[0].copy_(self.k)
        torch.mul(self.q, ladder.decay, out=ladder.x[1])
        ladder.climb()

    def forward(self, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Outputs [R, C, V] and states [N + 1, M, K, V] from the state before [M, K, V]."""
        until, since = self.ladder.x
        s = state.new_empty(len(self.wholes) + 1, *state.shape)
        s[0] = state
        torch.bmm(until.mT, self.v, out=s[1:].flatten(0, 1))
        for before, after, whole in zip(s[:-1], s[1:], self.wholes, strict=True):
            after.addcmul_(before, whole)
        y = torch.bmm(self.ladder.scores, self.v, out=self.y)
        y.baddbmm_(since, s[:-1].flatten(0, 1), beta=scale, alpha=scale)
        return y, s

    def _backward_states(self, dstate: Tensor) -> Tensor:
        """Gradients of the states [N + 1, M, K, V] from those of the outputs and the last one."""
        ds = dstate.new_empty(len(self.wholes) + 1, *dstate.shape)
        torch.bmm(self.ladder.x[1].mT, self.dy, out=ds[:-1].flatten(0, 1))
        ds[-1] = dstate
        chunks = list(zip(ds[:-1], ds[1:], self.wholes, strict=True))
        for before, after, whole in reversed(chunks):
            before.addcmul_(after, whole)
        return ds

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
        ladder, descent = self.ladder, self.descent
        assert descent is not None
        self.dy.view(dy.shape).copy_(dy).mul_(scale)
        ds = self._backward_states(dstate)
        before, after = s[:-1].flatten(0, 1), ds[1:].flatten(0, 1)
        dv = torch.bmm(ladder.scores.mT, self.dy, out=self.y).baddbmm_(ladder.x[0], after)
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


def _memory(tiling: Tiling, parts: list[slice], state: Tensor, *, keep: bool) -> list[_Segment]:
    """What each part of a sequence is worked in; parts of one size share it."""
    sizes = [part.stop - part.start for part in parts]
    memory = {size: _Segment(tiling, size, state, keep=keep) for size in set(sizes)}
    return [memory[size] for size in sizes]


class _DiagonalDecay(torch.autograd.Function):
    """The chunked form with its analytic gradient, segment by segment.

    Only the states between chunks are kept for the backward pass; the rest is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        state: Tensor,
        scale: float,
        chunk_size: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        tiling = Tiling.of(k, v, chunk_size, state.dtype)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        parts = tiling.segments(_SEGMENT_NUMBERS * torch.get_num_threads())
        last, kept = state.flatten(0, 1), []
        for part, segment in zip(parts, _memory(tiling, parts, state, keep=False), strict=True):
            segment.read(*(tiling.read(x, part) for x in (q, k, v, g)))
            out, s = segment.forward(last, scale)
            tiling.write(y, out, part)
            last = s[-1]
            if keep:
                kept.append(s)
        ctx.save_for_backward(q, k, v, g, *kept)
        ctx.tiling, ctx.parts, ctx.scale = tiling, parts, scale
        return y, last.clone().view(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, *kept = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        memory = _memory(tiling, ctx.parts, dstate, keep=True)
        grads = [x.new_empty(x.shape) for x in (q, k, v, g)]
        ds = dstate.flatten(0, 1)
        for part, segment, s in reversed(list(zip(ctx.parts, memory, kept, strict=True))):
            segment.read(*(tiling.read(x, part) for x in (q, k, v, g)))
            outs, ds = segment.backward(tiling.read(dy, part), s, ds, ctx.scale)
            for grad, out in zip(grads, outs, strict=True):
                tiling.write(grad, out, part)
        return (*grads, ds.view(dstate.shape), None, None, None)


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError for a chunk that blocks of doubling size do not fill."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}; it must be a power of two")


@torch.compiler.disable
@without_autocast
def diagonal_decay_chunk(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute `diagonal_decay_naive` in chunks, where most arithmetic is matrix products.

    Time is linear in T at any length, and beyond inputs and outputs the memory is that of one
    segment of a few chunks, plus T / chunk_size states when a gradient is wanted. Exact for any
    g <= 0, however strong or uneven, minus infinity included: no decay is ever divided by, nor any
    exponent positive. The gradient is analytic; it cannot be differentiated again. Compiled
    callers see one opaque call (a graph break).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        g: Natural logarithm of the decay of each key channel, at most 0.
        state: State before the first token, fp32 (fp64 for fp64 inputs); zeros when None.
        scale: Factor on the read; K ** -0.5 when None.
        chunk_size: Tokens a chunk, a power of two. Changes cost, not the function.

    Returns:
        The reads, in the dtype of `v`, and the state after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the state.

    Raises:
        ValueError: If `chunk_size` is not a power of two.
    """
    check_chunk_size(chunk_size)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        batch, _, heads, width = k.shape
        state = v.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    tensors = (q, k, v, g, state.to(dtype))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _DiagonalDecay.apply(*tensors, scale, chunk_size, keep)
