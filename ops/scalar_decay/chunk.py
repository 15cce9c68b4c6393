"""A matrix memory with one decay per head, chunk by chunk, with a hand-written backward pass.

The derivation, cost and measurements are in the README beside this file; names follow it. All
work is on stacks of tiles [N * M, ...]: N chunks by M = B * H memories, chunks outermost. The R
heads of a group share their queries and keys, which have N * B * G tiles; a product of theirs with
something of every head is one wide product. States are transposed, [V, K], so that those of a
group lie below each other: as they are in memory they are also one state [R * V, K] of the group.

Shapes: B batch, T time, H heads, G groups, R = H / G, K key width, V value width, C chunk,
N chunks, M = B * H.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mneme.ops.contract import accepts_nothing, carries, uncompiled, without_autocast
from mneme.ops.scalar_decay.naive import heads_per_group, scalar_decay_naive
from mneme.ops.tiling import Tiling

_RECURRENT_UP_TO = 2  # tokens; one step costs a few small products, a chunk some thirty calls


class Decay(NamedTuple):
    """Decays in tiles [N * M, C, 1]: powers of 2, as exp is slow where it underflows."""

    log: Tensor  # G, inclusive sum of the base-2 log decays since the chunk's first token
    since: Tensor  # 2^G, decay from before the chunk to each token
    until: Tensor  # 2^(G_C - G), decay from each token to the chunk's end
    whole: Tensor  # 2^(G_C), [N * M, 1, 1]

    @classmethod
    def of(cls, g: Tensor, tiling: Tiling) -> "Decay":
        """Decays of all chunks, from g [B, T, H]."""
        log = tiling.tiles(g[..., None], tiling.all).mul_(math.log2(math.e)).cumsum(1)
        last = log[:, -1:]
        return cls(log, log.exp2(), (last - log).exp2(), last.exp2())

    def part(self, part: slice, memories: int) -> "Decay":
        """Decays of some chunks."""
        rows = slice(part.start * memories, part.stop * memories)
        return Decay(*(x[rows] for x in self))

    def between(self) -> Tensor:
        """Decays [N * M, C, C] from token j to token i, 2^(G_i - G_j); 0 above the diagonal."""
        side = self.log.shape[1]
        future = self.log.new_full((side, side), -math.inf).triu_(1)
        return (self.log - self.log.mT).add_(future).exp2_()

    def gradient(self, read: Tensor, passed: Tensor, carried: Tensor, pairs: Tensor) -> Tensor:
        """Gradient [N * M, C, 1] of g from the shares of the result that its decays scale.

        Every use of token i as a reader carries 2^(G_i), every use as a writer 2^(-G_i) or, in the
        state handed on, 2^(G_C - G_i). The sums below add only terms that g_t scales, so that
        nothing larger than the result cancels, however strong the decay.

        Args:
            read: Share of what each token reads from before the chunk, [N * M, C, 1].
            passed: Share of what each token leaves in the state handed on, [N * M, C, 1].
            carried: Share of what passes through the chunk, [N * M, 1, 1].
            pairs: Share of what each token reads of each token, [N * M, C, C]; its diagonal, which
                no decay scales, is set to zero here.
        """
        pairs.diagonal(0, -2, -1).zero_()
        through = read + pairs.sum(2, keepdim=True) - pairs.sum(1)[..., None]
        dg = through.flip(1).cumsum(1).flip(1)
        dg[:, 1:] += passed[:, :-1].cumsum(1)
        return dg.add_(carried)


class _Tiles(NamedTuple):
    """Queries, keys, values and decays of a segment, in tiles."""

    q: Tensor  # [N * B * G, C, K], times the scale
    k: Tensor  # [N * B * G, C, K]
    v: Tensor  # [N * M, C, V]
    decay: Decay | None

    @property
    def shared(self) -> int:
        """Number of heads in a group, R."""
        return len(self.v) // len(self.k)


class _Sequence(NamedTuple):
    """The inputs, of which segments are cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Decay | None
    scale: float
    tiling: Tiling

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, tiling: Tiling
    ) -> "_Sequence":
        """Cut the decays, all at once; the rest is cut as it is needed."""
        return cls(q, k, v, None if g is None else Decay.of(g, tiling), scale, tiling)

    def tiles(self, part: slice) -> _Tiles:
        """The tiles of some chunks."""
        q, k, v = (self.tiling.tiles(x, part) for x in (self.q, self.k, self.v))
        decay = None if self.decay is None else self.decay.part(part, self.tiling.memories)
        return _Tiles(q.mul_(self.scale), k, v, decay)


def _wide(x: Tensor, shared: int) -> Tensor:
    """Put the heads of a group side by side, [N * M, C, V] -> [N * B * G, C, R * V]."""
    return x.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2)


def _apart(x: Tensor, shared: int) -> Tensor:
    """Take the heads of a group apart, [N * B * G, C, R * V] -> [N * M, C, V]."""
    return x.unflatten(2, (shared, -1)).transpose(1, 2).flatten(0, 1)


def _summed(x: Tensor, shared: int) -> Tensor:
    """Sum over the heads of a group, [N * M, ...] -> [N * B * G, ...]."""
    return x if shared == 1 else x.unflatten(0, (-1, shared)).sum(1)


def _carry(states: Sequence[Tensor], decay: Decay | None, *, back: bool = False) -> None:
    """Add to each of the states [M, V, K] what the decay leaves of the last, in place."""
    order = slice(None, None, -1 if back else 1)
    if decay is None:
        for last, state in pairwise(states[order]):
            state.add_(last)
        return
    whole = decay.whole.split(len(states[0]))
    for (last, state), left in zip(pairwise(states[order]), whole[order], strict=True):
        state.addcmul_(last, left)


def _forward_segment(x: _Tiles, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [N * M, C, V] and states [N + 1, M, V, K] of a segment."""
    q, k, v, decay = x
    scores, written = torch.bmm(q, k.mT), v
    if decay is None:
        weights = scores.tril_()
    else:
        weights = decay.between()
        weights.unflatten(0, (-1, x.shared)).mul_(scores[:, None])
        written = v * decay.until

    s = state.new_empty(len(v) // len(state) + 1, *state.shape)
    s[0] = state
    groups = (len(k), -1, k.shape[-1])
    torch.bmm(_wide(written, x.shared).mT, k, out=s[1:].view(groups))
    _carry(s.unbind(), decay)

    y = _apart(torch.bmm(q, s[:-1].view(groups).mT), x.shared)
    if decay is not None:
        y.mul_(decay.since)
    return y.baddbmm_(weights, v), s


class _Grads(NamedTuple):
    """Gradients of a segment's inputs, in tiles, and of the state before it."""

    q: Tensor  # of the scaled queries
    k: Tensor
    v: Tensor
    g: Tensor | None
    state: Tensor


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows, [..., C, D] -> [..., C, 1]."""
    return torch.linalg.vecdot(a, b)[..., None]


def _backward_states(x: _Tiles, read: Tensor, dstate: Tensor) -> Tensor:
    """Gradients of the states [N + 1, M, V, K] from those of what is read of them."""
    ds = dstate.new_empty(len(read) // len(dstate) + 1, *dstate.shape)
    ds[-1] = dstate
    torch.bmm(_wide(read, x.shared).mT, x.q, out=ds[:-1].view(len(x.q), -1, x.q.shape[-1]))
    _carry(ds.unbind(), x.decay, back=True)
    return ds


def _backward_without_decay(x: _Tiles, s: Tensor, dy: Tensor, dstate: Tensor) -> _Grads:
    """`_backward_segment` where nothing decays and R is 1."""
    ds = _backward_states(x, dy, dstate)
    before, after = s[:-1].flatten(0, 1), ds[1:].flatten(0, 1)
    weights, dweights = torch.bmm(x.q, x.k.mT).tril_(), torch.bmm(dy, x.v.mT).tril_()
    dq = torch.bmm(dy, before).baddbmm_(dweights, x.k)
    dk = torch.bmm(x.v, after).baddbmm_(dweights.mT, x.q)
    dv = torch.bmm(x.k, after.mT).baddbmm_(weights.mT, dy)
    return _Grads(dq, dk, dv, None, ds[0])


def _backward_with_decay(x: _Tiles, decay: Decay, s: Tensor, dy: Tensor, dstate: Tensor) -> _Grads:
    """`_backward_segment` with decays."""
    q, k, v, shared = x.q, x.k, x.v, x.shared
    read, written = dy * decay.since, v * decay.until
    ds = _backward_states(x, read, dstate)
    before, after = s[:-1].flatten(0, 1), ds[1:].flatten(0, 1)
    of_group = after.view(len(k), -1, k.shape[-1])

    scores = torch.bmm(q, k.mT)[:, None]
    weights = decay.between()
    dscores = torch.bmm(dy, v.mT).mul_(weights)
    weights.unflatten(0, (-1, shared)).mul_(scores)
    all_dscores = _summed(dscores, shared)

    dq = torch.bmm(read, before)
    by_read = _dot(dq.unflatten(0, (-1, shared)), q[:, None]).flatten(0, 1)
    dq = _summed(dq, shared).baddbmm_(all_dscores, k)
    dk = torch.bmm(_wide(written, shared), of_group).baddbmm_(all_dscores.mT, q)
    dv = _apart(torch.bmm(k, of_group.mT), shared).mul_(decay.until)
    passed = _dot(v, dv)
    dv.baddbmm_(weights.mT, dy)

    pairs = dscores
    pairs.unflatten(0, (-1, shared)).mul_(scores)
    carried = (before * after).sum((1, 2), keepdim=True).mul_(decay.whole)
    return _Grads(dq, dk, dv, decay.gradient(by_read, passed, carried, pairs), ds[0])


def _backward_segment(x: _Tiles, s: Tensor, dy: Tensor, dstate: Tensor) -> _Grads:
    """Gradients of a segment from those of its outputs and last state."""
    if x.decay is None:
        return _backward_without_decay(x, s, dy, dstate)
    return _backward_with_decay(x, x.decay, s, dy, dstate)


class _ScalarDecay(torch.autograd.Function):
    """The chunked form with its analytic gradient, segment by segment.

    Only the states between chunks are kept for the backward pass; the rest is computed again.
    States are transposed, [M, V, K].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        state: Tensor,
        scale: float,
        chunk_size: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        tiling = Tiling.of(k, v, chunk_size, state.dtype)
        inputs = _Sequence.of(q, k, v, g, scale, tiling)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        last, kept = state, []
        for part in tiling.segments():
            out, s = _forward_segment(inputs.tiles(part), last)
            tiling.write(y, out, part)
            last = s[-1]
            if keep:
                kept.append(s)
        ctx.save_for_backward(q, k, v, g, *kept)
        ctx.tiling, ctx.scale = tiling, scale
        return y, last.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, *kept = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        inputs = _Sequence.of(q, k, v, g, ctx.scale, tiling)
        grads = [x if x is None else x.new_empty(x.shape) for x in (q, k, v, g)]
        for part, s in reversed(list(zip(tiling.segments(), kept, strict=True))):
            tiles, dy_n = inputs.tiles(part), tiling.tiles(dy, part)
            grad = _backward_segment(tiles, s, dy_n, dstate)
            grad.q.mul_(ctx.scale)
            for out, of_tiles in zip(grads, grad[:4], strict=True):
                if out is not None and of_tiles is not None:
                    tiling.write(out if out.dim() == 4 else out[..., None], of_tiles, part)
            dstate = grad.state
        return (*grads, dstate, None, None, None)


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError for a chunk without tokens."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")


@uncompiled
@accepts_nothing("q", "k", "v", "g")
@without_autocast
def scalar_decay_chunk(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute `scalar_decay_naive` in chunks, where almost all arithmetic is matrix products.

    Time is linear in T at any length, and beyond inputs and outputs the memory is that of one
    segment of a few chunks, plus T / chunk_size states when a gradient is wanted. Exact for any
    g <= 0, however strong: only differences of log decays of known sign are exponentiated.
    The gradient is analytic; it cannot be differentiated again. Compiled callers see one opaque
    call (a graph break).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        g: Natural logarithm of the decay, at most 0; None, where nothing decays, costs least.
        state: State before the first token, fp32 (fp64 for fp64 inputs); zeros when None.
        scale: Factor on the read; K ** -0.5 when None.
        chunk_size: Tokens a chunk. Changes cost, not the function.

    Returns:
        The reads, in the dtype of `v`, and the state after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the state.

    Raises:
        ValueError: If `chunk_size` is less than 1, or G does not divide H.
    """
    check_chunk_size(chunk_size)
    batch, tokens, groups, width = k.shape
    heads = v.shape[2]
    heads_per_group(groups, heads)
    scale = width**-0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        state = v.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    # Without decay nothing tells the heads of a group apart: they are one head with wider values.
    values = v if g is not None else v.reshape(batch, tokens, groups, -1)
    memories = batch * values.shape[2]
    tensors = (q, k, values, g, state.to(dtype).mT.reshape(memories, -1, width))
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, last = _ScalarDecay.apply(*tensors, scale, chunk_size, keep)
    return y.view(v.shape), last.view(batch, heads, -1, width).mT.contiguous()


@carries("q", "k", "v", "g")
def scalar_decay(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the memory with scalar decay in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `scalar_decay_naive`, more through
    `scalar_decay_chunk`; both compute the same function, to rounding. Arguments and results are
    those of the chunked form; a chunk is never longer than the sequence.
    """
    check_chunk_size(chunk_size)
    tokens = k.shape[1]
    if tokens <= _RECURRENT_UP_TO:
        return scalar_decay_naive(q, k, v, g, state, scale=scale)
    chunk_size = min(chunk_size, tokens)
    return scalar_decay_chunk(q, k, v, g, state, scale=scale, chunk_size=chunk_size)
