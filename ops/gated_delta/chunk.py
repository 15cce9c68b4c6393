"""The gated delta rule, chunk by chunk, with a hand-written backward pass.

The derivation, cost and measurements are in the README beside this file; names follow it. All
work is on stacks of tiles [N * M, ...]: N chunks by M = B * H memories, chunks outermost. One
product serves queries and keys where it can: `x` holds the scaled queries above the keys times
-beta, and everything that follows from it has 2C rows. Without decay, what decays scale is left
alone rather than multiplied by one.

Shapes: B batch, T time, H heads, K key width, V value width, C chunk, N chunks, M = B * H.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mneme.ops.contract import accepts_nothing, carries, kept, uncompiled, without_autocast
from mneme.ops.gated_delta.naive import gated_delta_naive
from mneme.ops.tiling import Tiling

RECURRENT_UP_TO = 2  # tokens; one step costs a few small products, a chunk some sixty calls
_LEAF = 4  # side of the blocks inverted by power series
_BLOCK = 16  # joins up to this side are masked products of whole blocks: smaller ones are slow


@kept
def _level_masks(dtype: torch.dtype, device: torch.device, side: int) -> tuple[Tensor, ...]:
    """Masks [side, side] of the leaves' strict lower parts, then of what each join brings in."""
    row, column = torch.arange(side, device=device)[:, None], torch.arange(side, device=device)
    masks, done = [], row <= column
    width = _LEAF
    while width <= side:
        inside = row // width == column // width
        masks.append((inside & ~done).to(dtype))
        done = done | inside
        width *= 2
    return tuple(masks)


def _diagonal(x: Tensor, side: int) -> Tensor:
    """View [M, C / side, side, side] of the diagonal blocks of x [M, C, C]."""
    count = x.shape[-1] // side
    return x.view(-1, count, side, count, side).diagonal(0, 1, 3).movedim(-1, 1)


def _invert_blocks(n: Tensor) -> Tensor:
    """(I - N)^-1 for small blocks, N the part of n [M, c, c] below its diagonal."""
    leaves, *joins = _level_masks(n.dtype, n.device, n.shape[-1])
    leaf = n * leaves
    x = torch.bmm(leaf, leaf)
    x.diagonal(0, -2, -1).add_(1)
    x = torch.baddbmm(x, leaf, x)  # (I + N)(I + N^2), where N^4 = 0
    for join in joins:
        x = torch.baddbmm(x, torch.bmm(x, n * join), x)
    return x


def inverse_of_one_minus(n: Float[Tensor, "M C C"]) -> Float[Tensor, "M C C"]:
    """Compute (I - N)^-1 where N is the part of `n` strictly below its diagonal.

    A library's triangular solve goes through the stack one matrix at a time on a CPU; here every
    step is a product over the whole stack. Blocks of 4 are inverted by their power series, which
    ends at N^3, then pairs of blocks are joined:

        [[A, 0], [-B, D]]^-1 = [[A^-1, 0], [D^-1 B A^-1, D^-1]].

    The series is not used beyond 4 x 4: its terms grow like binomial coefficients when keys repeat,
    and cancel only in exact arithmetic. Entries on and above the diagonal of `n` have no influence,
    provided they are finite.

    Args:
        n: Stack of square matrices whose side is a power of two, at least 4.

    Returns:
        Stack of unit lower triangular matrices.
    """
    side = n.shape[-1]
    block = min(_BLOCK, side)
    x = n.new_zeros(n.shape)
    leaves = _diagonal(n, block).flatten(0, 1)
    diagonal = _diagonal(x, block)
    diagonal.copy_(_invert_blocks(leaves).view(diagonal.shape))
    while block < side:
        for start in range(0, side, 2 * block):
            top, low = slice(start, start + block), slice(start + block, start + 2 * block)
            joint = torch.bmm(x[:, low, low], n[:, low, top])
            x[:, low, top] = torch.bmm(joint, x[:, top, top])
        block *= 2
    return x


class _Decay(NamedTuple):
    """Decays in tiles [N * M, C, 1], powers of 2, as exp is slow where it underflows."""

    log: Tensor  # G, inclusive sum of the base-2 log decays since the chunk's first token
    since: Tensor  # 2^G, decay from before the chunk to each token; twice, [N * M, 2C, 1], as in x
    until: Tensor  # 2^(G_C - G), decay from each token to the chunk's end
    whole: Tensor  # 2^(G_C), [N * M, 1, 1]

    @classmethod
    def of(cls, g: Tensor, tiling: Tiling) -> "_Decay":
        """Decays of all chunks, from g [B, T, H]."""
        log = tiling.tiles(g[..., None], tiling.all).mul(math.log2(math.e)).cumsum(1)
        last = log[:, -1:]
        return cls(log, log.exp2().repeat(1, 2, 1), (last - log).exp2(), last.exp2())

    def between(self) -> Tensor:
        """Decay 2^(G_i - G_j) from token j to token i >= j, 0 for i < j, [N * M, 1, C, C]."""
        # Masked before exp2 so that no exponent is positive, and after it to leave exact zeros.
        return (self.log - self.log.mT).tril_().exp2_().tril_()[:, None]


class _Gates(NamedTuple):
    """Betas and decays of a range of chunks, in tiles."""

    beta: Tensor  # [N * M, C, 1]
    decay: _Decay | None

    @classmethod
    def of(cls, g: Tensor | None, beta: Tensor, tiling: Tiling) -> "_Gates":
        """Gates of all chunks, from g and beta [B, T, H]."""
        beta = tiling.tiles(beta[..., None], tiling.all)
        return cls(beta, None if g is None else _Decay.of(g, tiling))

    def part(self, part: slice, memories: int) -> "_Gates":
        """Gates of some chunks."""
        rows = slice(part.start * memories, part.stop * memories)
        decay = None if self.decay is None else _Decay(*(x[rows] for x in self.decay))
        return _Gates(self.beta[rows], decay)

    def mask(self) -> Tensor:
        """Factors on the scores [N * M, 2, C, C]: decays, 0 above the diagonal."""
        if self.decay is not None:
            return self.decay.between()
        side = self.beta.shape[1]
        return self.beta.new_ones(side, side).tril_()

    def wholes(self, memories: int) -> Sequence[Tensor | None]:
        """Decay over each chunk, `[M, 1, 1]`; None for each without decay."""
        if self.decay is not None:
            return self.decay.whole.split(memories)
        return [None] * (len(self.beta) // memories)


class _Operands(NamedTuple):
    """What a segment needs before its first state is known."""

    x: Tensor  # [N * M, 2C, K], scaled queries above keys times -beta
    k: Tensor  # [N * M, C, K]
    mask: Tensor
    scores: Tensor  # [N * M, 2, C, C], x k^T times mask: what is read, what is corrected
    inverse: Tensor  # [N * M, C, C], of one minus the corrections: the solve within a chunk

    @classmethod
    def of(cls, q: Tensor, k: Tensor, gates: _Gates, scale: float) -> "_Operands":
        """Operands from the tiled views q and k [N, B, H, C, K]."""
        n, b, h, c, width = k.shape
        x = k.new_empty(n, b, h, 2 * c, width)
        torch.mul(q, scale, out=x[..., :c, :])
        torch.mul(k, gates.beta.neg().view(n, b, h, c, 1), out=x[..., c:, :])
        x, k = x.view(-1, 2 * c, width), k.reshape(-1, c, width)
        mask = gates.mask()
        scores = torch.bmm(x, k.mT).view(-1, 2, c, c).mul_(mask)
        return cls(x, k, mask, scores, inverse_of_one_minus(scores[:, 1]))


def _forward_segment(
    ops: _Operands, v: Tensor, gates: _Gates, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [N * M, C, V] and states [N + 1, M, K, V] of a segment; overwrites ops.x and v."""
    m, c = len(state), v.shape[1]
    xs, target, written = ops.x, v.mul_(gates.beta), ops.k
    if gates.decay is not None:
        xs, written = xs.mul_(gates.decay.since), written * gates.decay.until
    u = torch.empty_like(v)
    s = state.new_empty(len(v) // m + 1, *state.shape)
    s[0] = state
    operands = (target, xs[:, c:], ops.inverse, u, written.mT)
    chunks = zip(*(x.split(m) for x in operands), gates.wholes(m), s[:-1], s[1:], strict=True)
    for target_n, read, inverse, u_n, write, whole, before, after in chunks:
        torch.bmm(inverse, target_n.baddbmm_(read, before), out=u_n)
        kept = before if whole is None else torch.mul(before, whole, out=after)
        torch.baddbmm(kept, write, u_n, out=after)
    y = torch.bmm(xs[:, :c], s[:-1].flatten(0, 1)).baddbmm_(ops.scores[:, 0], u)
    return y, s


def _backward_scan(
    ops: _Operands, xs: Tensor, gates: _Gates, dy: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the solves' right sides [N * M, C, V] and of the states [N + 1, M, K, V]."""
    m, c = len(dstate), dy.shape[1]
    du = torch.bmm(ops.scores[:, 0].mT, dy)
    written = ops.k if gates.decay is None else ops.k * gates.decay.until
    dr = torch.empty_like(du)
    ds = dstate.new_empty(len(dy) // m + 1, *dstate.shape)
    torch.bmm(xs[:, :c].mT, dy, out=ds[:-1].flatten(0, 1))
    ds[-1] = dstate
    operands = (du, written, ops.inverse.mT, dr, xs[:, c:].mT)
    chunks = list(
        zip(*(x.split(m) for x in operands), gates.wholes(m), ds[:-1], ds[1:], strict=True)
    )
    for du_n, write, inverse, dr_n, read, whole, before, after in reversed(chunks):
        torch.bmm(inverse, du_n.baddbmm_(write, after), out=dr_n)
        before = before.add_(after) if whole is None else before.addcmul_(after, whole)
        before.baddbmm_(read, dr_n)
    return dr, ds


class _Grads(NamedTuple):
    """Gradients of a segment in tiles; that of the state before it is [M, K, V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor
    state: Tensor


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows, [..., C, D] -> [..., C, 1]."""
    return torch.linalg.vecdot(a, b)[..., None]


def _decay_gradient(
    whole: Tensor, read: Tensor, written: Tensor, passed: Tensor, carried: Tensor
) -> Tensor:
    """Gradient [N * M, C, 1] of g from the shares of the result that its decays scale.

    Every use of token i as a reader carries exp(G_i), every use as a writer exp(-G_i) or, in the
    state handed on (`passed`), exp(G_C - G_i). The sums below add only terms that g_t scales, so
    that nothing larger than the result cancels, however strong the decay.
    """
    dg = (read - written).flip(1).cumsum(1).flip(1)
    dg[:, 1:] += passed[:, :-1].cumsum(1)
    return dg.add_(whole * carried)


def _backward_segment(
    ops: _Operands, s: Tensor, v: Tensor, gates: _Gates, dy: Tensor, dstate: Tensor
) -> _Grads:
    """Gradients of a segment from those of its outputs and last state; q's lacks the scale."""
    x, k, c, decay = ops.x, ops.k, dy.shape[1], gates.decay
    xs, before = x if decay is None else x * decay.since, s[:-1].flatten(0, 1)
    u = torch.bmm(ops.inverse, (v * gates.beta).baddbmm_(xs[:, c:], before))
    dr, ds = _backward_scan(ops, xs, gates, dy, dstate)
    after = ds[1:].flatten(0, 1)

    rows = torch.cat((dy, dr), 1)  # gradients of what the rows of x read
    dscores = torch.bmm(rows, u.mT).view(-1, 2, c, c).mul_(ops.mask)
    diagonal = dscores.diagonal(0, -2, -1)
    own = diagonal[:, 0, :, None].clone()  # a token reading its own write: no decay is involved
    diagonal.zero_()
    dscores = dscores.view(-1, 2 * c, c)
    rows = rows if decay is None else rows.mul_(decay.since)
    dx = torch.bmm(dscores, k).baddbmm_(rows, before.mT)
    dk = torch.bmm(dscores.mT, x)
    dwritten = torch.bmm(u, after.mT)

    dq, dread = dx[:, :c], dx[:, c:]
    corrected = _dot(k, dread)
    dbeta = _dot(v, dr) - corrected
    dg = None
    if decay is None:
        dk.add_(dwritten)
    else:
        read = _dot(x[:, :c], dq) - corrected * gates.beta
        passed = _dot(k, dwritten) * decay.until
        carried = (before * after).sum((1, 2), keepdim=True)
        dg = _decay_gradient(decay.whole, read, _dot(k, dk), passed, carried)
        dk.addcmul_(dwritten, decay.until)
    dk.addcmul_(dread, gates.beta, value=-1).addcmul_(own, x[:, :c])
    dq.addcmul_(own, k)
    return _Grads(dq, dk, dr.mul_(gates.beta), dg, dbeta, ds[0])


class _GatedDelta(torch.autograd.Function):
    """The chunked form with its analytic gradient, segment by segment.

    Only the states between chunks are kept for the backward pass; the rest is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        state: Tensor,
        scale: float,
        chunk_size: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        tiling = Tiling.of(k, v, chunk_size, state.dtype)
        gates = _Gates.of(g, beta, tiling)
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        last, kept = state.flatten(0, 1), []
        for part in tiling.segments():
            gate = gates.part(part, tiling.memories)
            ops = _Operands.of(tiling.read(q, part), tiling.read(k, part), gate, scale)
            out, s = _forward_segment(ops, tiling.tiles(v, part), gate, last)
            tiling.write(y, out, part)
            last = s[-1]
            if keep:
                kept.append(s)
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.tiling, ctx.scale = tiling, scale
        return y, last.clone().view(state.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, *kept = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        gates = _Gates.of(g, beta, tiling)
        grads = [None if x is None else x.new_empty(x.shape) for x in (q, k, v, g, beta)]
        ds = dstate.flatten(0, 1)
        for part, s in reversed(list(zip(tiling.segments(), kept, strict=True))):
            gate = gates.part(part, tiling.memories)
            ops = _Operands.of(tiling.read(q, part), tiling.read(k, part), gate, ctx.scale)
            v_n, dy_n = tiling.tiles(v, part), tiling.tiles(dy, part)
            grad = _backward_segment(ops, s, v_n, gate, dy_n, ds)
            grad.q.mul_(ctx.scale)
            for out, tiles in zip(grads, grad[:5], strict=True):
                if out is not None and tiles is not None:
                    tiling.write(out if out.ndim == 4 else out[..., None], tiles, part)
            ds = grad.state
        return (*grads, ds.view(dstate.shape), None, None, None)


def check_chunk_size(chunk_size: int) -> None:
    """Raise ValueError for a chunk that the blockwise inverse cannot be built for."""
    if chunk_size < 4 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size is {chunk_size}; it must be a power of two, at least 4")


@uncompiled
@accepts_nothing("q", "k", "v", "g", "beta")
@without_autocast
def gated_delta_chunk(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute `gated_delta_naive` in chunks, where almost all arithmetic is matrix products.

    Time is linear in T at any length, and beyond inputs and outputs the memory is that of one
    segment of a few chunks, plus T / chunk_size states when a gradient is wanted. Exact for any
    g <= 0, however strong: only differences of log decays of known sign are exponentiated.
    The gradient is analytic; it cannot be differentiated again. Compiled callers see one opaque
    call (a graph break).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        g: Natural logarithm of the decay, at most 0; None for no decay, which also costs less.
        beta: Strength of each write.
        state: State before the first token, fp32 (fp64 for fp64 inputs); zeros when None.
        scale: Factor on the read; K ** -0.5 when None.
        chunk_size: Tokens a chunk, a power of two of at least 4. Changes cost, not the function.

    Returns:
        The reads, in the dtype of `v`, and the state after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the state.

    Raises:
        ValueError: If `chunk_size` is not a power of two of at least 4.
    """
    check_chunk_size(chunk_size)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        batch, _, heads, width = k.shape
        state = v.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    tensors = (q, k, v, g, beta, state.to(dtype))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)
    return _GatedDelta.apply(*tensors, scale, chunk_size, keep)


@carries("q", "k", "v", "g", "beta")
def gated_delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the gated delta rule in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `gated_delta_naive`, more through `gated_delta_chunk`;
    both compute the same function, to rounding. Arguments and results are those of the chunked
    form; a prompt shorter than a chunk is worked in the smallest power of two that holds it.
    """
    check_chunk_size(chunk_size)
    tokens = k.shape[1]
    if tokens <= RECURRENT_UP_TO:
        return gated_delta_naive(q, k, v, g, beta, state, scale=scale)
    while chunk_size >= 2 * tokens and chunk_size > 4:
        chunk_size //= 2
    return gated_delta_chunk(q, k, v, g, beta, state, scale=scale, chunk_size=chunk_size)
