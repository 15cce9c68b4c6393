"""Decay by channel, chunk by chunk, with a hand-written backward pass.

The derivation, cost and measurements are in the README beside this file. All work is on stacks of
tiles [R, ...]: R = N * M, N chunks by M = B * H memories, chunks outermost.

Shapes: B batch, T time, H heads, D or K or V width, C chunk, N chunks of a segment, M = B * H.
"""

from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.diagonal_decay.mild import MildSegment
from ops.diagonal_decay.segment import Segment
from ops.diagonal_decay.strong import StrongSegment
from ops.nothing import accepts_nothing
from ops.precision import without_autocast
from ops.tiling import Tiling

# Numbers per tensor of a segment, for each thread. The steps of a segment go over some twenty such
# tensors, which should stay in cache; a smaller segment pays more for its calls than it gains.
_SEGMENT_NUMBERS = 2**17


class _Segments:
    """What the parts of a sequence are worked in: memory that parts of one size share."""

    def __init__(self, tiling: Tiling, state: Tensor, *, keep: bool) -> None:
        """Memory like that of a state [B, H, K, V]; `keep` for a backward pass."""
        self.tiling = tiling
        self.mild = cache(partial(MildSegment, state, chunk=tiling.chunk))
        self.strong = cache(partial(StrongSegment, state, chunk=tiling.chunk, keep=keep))

    def take(self, part: slice, *inputs: Tensor) -> Segment:
        """The segment that has taken in some chunks of q, k, v and g."""
        tiles = [self.tiling.read(x, part) for x in inputs]
        segment: Segment = self.mild(part.stop - part.start)
        if not segment.take(*tiles):
            segment = self.strong(part.stop - part.start)
            segment.take(*tiles)
        return segment


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
        segments = _Segments(tiling, state, keep=False)
        for part in parts:
            out, s = segments.take(part, q, k, v, g).forward(last, scale)
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
        segments = _Segments(tiling, dstate, keep=True)
        grads = [x.new_empty(x.shape) for x in (q, k, v, g)]
        ds = dstate.flatten(0, 1)
        for part, s in reversed(list(zip(ctx.parts, kept, strict=True))):
            segment = segments.take(part, q, k, v, g)
            outs, ds = segment.backward(tiling.read(dy, part), s, ds, ctx.scale)
            for grad, out in zip(grads, outs, strict=True):
                tiling.write(grad, out, part)
        return (*grads, ds.view(dstate.shape), None, None, None)


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError for a chunk that blocks of doubling size do not fill."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}; it must be a power of two")


@accepts_nothing("q", "k", "v", "g")
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
    g <= 0, however strong or uneven, minus infinity included: segments where a channel forgets much
    are worked without ever dividing by a decay, in about 1.5 times the time. The gradient is
    analytic; it cannot be differentiated again. Compiled callers see one opaque call (a graph
    break).

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
