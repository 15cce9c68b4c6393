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

from mneme.ops.contract import accepts_nothing, carries, uncompiled, without_autocast
from mneme.ops.diagonal_decay.naive import diagonal_decay_naive
from mneme.ops.diagonal_decay.segment import Segment
from mneme.ops.tiling import Tiling

_RECURRENT_UP_TO = 4  # tokens; a step costs a few small products, a chunk over a hundred calls


# Elements per tensor of a segment, for each thread. The steps of a segment go over some thirty such
# tensors; a smaller segment pays more for its calls than it gains from caches.
_SEGMENT_ELEMENTS = 2**18


class _DiagonalDecay(torch.autograd.Function):
    """The chunked form with its analytic gradient, segment by segment.

    The states between chunks and the inner products in them are kept for the backward pass; the
    rest is computed again.
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
        parts = tiling.segments(_SEGMENT_ELEMENTS * torch.get_num_threads())
        last, kept = state.flatten(0, 1), []
        sized = cache(partial(Segment, state, chunk=chunk_size, keep=False))
        for part in parts:
            tiles = tuple(tiling.read(x, part) for x in (q, k, v, g))
            out, *saved = sized(part.stop - part.start).forward(tiles, last, scale)
            tiling.write(y, out, part)
            last = saved[0][-1]
            if keep:
                kept += saved
        ctx.save_for_backward(q, k, v, g, *kept)
        ctx.tiling, ctx.parts, ctx.scale = tiling, parts, scale
        return y, last.clone().view(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, *kept = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        sized = cache(partial(Segment, dstate, chunk=tiling.chunk, keep=True))
        grads = [x.new_empty(x.shape) for x in (q, k, v, g)]
        ds = dstate.flatten(0, 1)
        for part, *saved in reversed(list(zip(ctx.parts, kept[::2], kept[1::2], strict=True))):
            tiles = tuple(tiling.read(x, part) for x in (q, k, v, g))
            segment = sized(part.stop - part.start)
            dtiles = tiling.read(dy, part)
            outs, ds = segment.backward(tiles, (saved[0], saved[1]), dtiles, ds, ctx.scale)
            for grad, out in zip(grads, outs, strict=True):
                tiling.write(grad, out, part)
        return (*grads, ds.view(dstate.shape), None, None, None)


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError for a chunk that blocks of doubling size do not fill."""
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}; it must be a power of two")


@uncompiled
@accepts_nothing("q", "k", "v", "g")
@without_autocast
def diagonal_decay_chunk(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 32,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute `diagonal_decay_naive` in chunks, where most arithmetic is matrix products.

    Time is linear in T at any length, and beyond inputs and outputs the memory is that of one
    segment of a few chunks, plus T / chunk_size states and T * chunk_size elements a head when a
    gradient is wanted. Exact for any g <= 0, however strong or uneven, minus infinity included: one
    form for all, which never divides by a decay, so that no sequence, head or later token moves
    a bit of another. The gradient is analytic; it cannot be differentiated again. Compiled callers
    see one opaque call (a graph break).

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


@carries("q", "k", "v", "g")
def diagonal_decay(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 32,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the memory with decays per channel in the form cheapest for the length given.

    Up to four tokens (decoding) go through `diagonal_decay_naive`, more through
    `diagonal_decay_chunk`; both compute the same function, to rounding. Arguments and results are
    those of the chunked form; a prompt shorter than a chunk is worked in the smallest power of two
    that holds it.
    """
    check_chunk_size(chunk_size)
    tokens = k.shape[1]
    if tokens <= _RECURRENT_UP_TO:
        return diagonal_decay_naive(q, k, v, g, state, scale=scale)
    while chunk_size >= 2 * tokens:
        chunk_size //= 2
    return diagonal_decay_chunk(q, k, v, g, state, scale=scale, chunk_size=chunk_size)
