"""The selective scan, chunk by chunk, with a hand-written backward pass.

The derivation, cost and measurements are in the README beside this file. Inside a chunk tensors
are laid out [C, B, N, D], tokens first: a token's states are contiguous, and what is shared by the
states or by the channels is broadcast along rows or within them without a copy.

Shapes: B batch, T time, D channels, N states of a channel, C tokens of a chunk.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mneme.ops.contract import accepts_nothing, carries, uncompiled, without_autocast
from mneme.ops.selective_scan.naive import selective_scan_naive

_RECURRENT_UP_TO = 2  # tokens; beyond, the calls of one chunk cost less than those of the loop


# Elements of one tensor of a chunk. What a chunk touches is to stay in the second-level cache, and
# the calls that are made once a chunk are to be few beside the one that is made for every token.
_CHUNK_ELEMENTS = 2**18
_LEAST_CHUNK, _LARGEST_CHUNK = 8, 64  # tokens; a smaller chunk keeps more states for backward


class _Chunk(NamedTuple):
    """Inputs of the tokens of a chunk."""

    x: Tensor  # [C, B, 1, D]
    step: Tensor  # [C, B, 1, D]
    write: Tensor  # [C, B, N, 1]
    read: Tensor  # [C, B, N, 1]

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], span: slice, dtype: torch.dtype) -> "_Chunk":
        """Copies of the tokens `span` of x, step [B, T, D] and B, C [B, T, N]."""
        # Contiguous, as what is computed from them takes over their order of axes in memory.
        rows = (v[:, span].transpose(0, 1).to(dtype).contiguous() for v in tensors)
        x, step, write, read = rows
        return cls(x[:, :, None], step[:, :, None], write[..., None], read[..., None])

    def states(self, rate: Tensor, before: Tensor, decay: Tensor, h: Tensor) -> None:
        """Fills `decay` and `h` [C, B, N, D], from the rates [N, D] and the state before."""
        # Powers of two, as exp is slow where its result is below the smallest normal number.
        torch.mul(self.step, rate * math.log2(math.e), out=decay).exp2_()
        torch.mul(self.write, self.step * self.x, out=h)
        for decay_t, h_t in zip(decay.unbind(0), h.unbind(0), strict=True):
            before = h_t.addcmul_(decay_t, before)


def _over_states(row: Tensor, h: Tensor) -> Tensor:
    """Sum over N of row [C, B, N, 1] times h [C, B, N, D], as [C, B, 1, D]."""
    return torch.bmm(row.flatten(0, 1).mT, h.flatten(0, 1)).view(*h.shape[:2], 1, -1)


def _over_channels(h: Tensor, row: Tensor) -> Tensor:
    """Sum over D of h [C, B, N, D] times row [C, B, 1, D], as [C, B, N, 1]."""
    return torch.bmm(h.flatten(0, 1), row.flatten(0, 1).mT).view(*h.shape[:3], 1)


class _Grads(NamedTuple):
    """Gradients of a chunk's tokens, shaped as them, of the rates and of the state before it."""

    tokens: _Chunk
    rate: Tensor  # [N, D]
    before: Tensor  # [B, N, D]


def _backward_chunk(
    chunk: _Chunk, rate: Tensor, before: Tensor, dy: Tensor, dlast: Tensor, work: Tensor
) -> _Grads:
    """Gradients of a chunk from those of its outputs [C, B, 1, D] and of the state after it."""
    decay, h, dh = work[:, : len(dy)]
    chunk.states(rate, before, decay, h)
    dread = _over_channels(h, dy)
    torch.mul(chunk.read, dy, out=dh)[-1] += dlast
    backwards = zip(dh.unbind(0)[::-1], decay.unbind(0)[::-1], strict=True)
    for (after, decay_after), (dh_t, _) in pairwise(backwards):
        dh_t.addcmul_(after, decay_after)
    dbefore = decay[0] * dh[0]
    dinput = _over_states(chunk.write, dh)  # of step * x
    dwrite = _over_channels(dh, chunk.step * chunk.x)
    # The gradient of step * A is dh times what was left of the state before: no difference is
    # taken, so that it keeps its digits however strong the decay.
    decay[1:].mul_(h[:-1])
    decay[0].mul_(before)
    dlog = decay.mul_(dh)
    dstep = torch.mul(dlog, rate, out=h).sum(2, keepdim=True).addcmul_(dinput, chunk.x)
    drate = dlog.mul_(chunk.step).sum((0, 1))
    return _Grads(_Chunk(dinput * chunk.step, dstep, dwrite, dread), drate, dbefore)


def _cut(tokens: int, state: Tensor, tensors: int) -> tuple[list[slice], Tensor]:
    """Cuts T tokens into chunks, with room to work on one: [tensors, C, B, N, D].

    Memory that is freed and asked for again in every chunk goes back to the system in between, and
    the pages that come back cost more than the arithmetic on them.
    """
    size = min(max(_CHUNK_ELEMENTS // state.numel(), _LEAST_CHUNK), _LARGEST_CHUNK, tokens)
    spans = [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]
    return spans, state.new_empty(tensors, size, *state.shape)


class _SelectiveScan(torch.autograd.Function):
    """The chunked form with its analytic gradient; rates and states are [N, D], channels last.

    Only the states between chunks are kept for the backward pass; the rest is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        write: Tensor,
        read: Tensor,
        state: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        before, kept = state, []
        spans, work = _cut(x.shape[1], state, 2)
        for span in spans:
            chunk = _Chunk.of((x, step, write, read), span, state.dtype)
            decay, h = work[:, : len(chunk.x)]
            chunk.states(rate, before, decay, h)
            y[:, span] = _over_states(chunk.read, h)[:, :, 0].transpose(0, 1)
            if keep:
                kept.append(before)
            before = h[-1].clone()  # the next chunk overwrites h
        ctx.save_for_backward(x, step, rate, write, read, *kept)
        return y, before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, step, rate, write, read, *kept = ctx.saved_tensors
        tokens = (x, step, write, read)
        grads = tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in tokens)
        drate = torch.zeros_like(rate)
        spans, work = _cut(x.shape[1], dstate, 3)
        for span, before in reversed(list(zip(spans, kept, strict=True))):
            chunk = _Chunk.of(tokens, span, dstate.dtype)
            dy_c = dy[:, span].transpose(0, 1).to(dstate.dtype).contiguous()[:, :, None]
            grad = _backward_chunk(chunk, rate, before, dy_c, dstate, work)
            for out, part in zip(grads, grad.tokens, strict=True):
                out[:, span] = part.flatten(2).transpose(0, 1)
            drate += grad.rate
            dstate = grad.before
        return grads[0], grads[1], drate, grads[2], grads[3], dstate, None


def check_shapes(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    """Raise ValueError for arguments that would broadcast or index past one another."""
    batch, tokens, channels = x.shape
    states = A.shape[-1]
    wanted = {
        "step": (step, x.shape),
        "A": (A, (channels, states)),
        "B": (B, (batch, tokens, states)),
        "C": (C, (batch, tokens, states)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; x {tuple(x.shape)} with {states} states "
                f"a channel (the last axis of A) needs {tuple(shape)}"
            )


@uncompiled
@accepts_nothing("x", "step", "B", "C")
@without_autocast
def selective_scan_chunk(
    x: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Compute `selective_scan_naive` in chunks of 8 to 64 tokens that fit in cache.

    Decays, writes and reads are computed for a chunk at once; only one fused multiply-add is left
    for each token. No tensor has both all T tokens and all D N states: beyond inputs and outputs
    the memory is that of a few tensors of one chunk, plus one state a chunk when a gradient is
    wanted. Exact for any step * A <= 0. The gradient is analytic; it cannot be differentiated
    again. Compiled callers see one opaque call (a graph break).

    Args:
        x: Inputs.
        step: Length of each token's step, at least 0; 0 leaves the states alone.
        A: Rate of each state, below 0.
        B: What a token writes to the states of every channel.
        C: What it reads of them.
        state: States before the first token, fp32 (fp64 for fp64 inputs); zeros when None.

    Returns:
        The reads, in the dtype of `x`, and the states after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the states.

    Raises:
        ValueError: If the shapes of step, A, B and C do not fit.
    """
    check_shapes(x, step, A, B, C)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
    rate, start = (v.to(dtype).mT.contiguous() for v in (A, state))
    tensors = (x, step, rate, B, C, start)
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)
    y, last = _SelectiveScan.apply(*tensors, keep)
    return y, last.mT.contiguous()


@carries("x", "step", "B", "C")
def selective_scan(
    x: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Compute the selective scan in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `selective_scan_naive`, more through
    `selective_scan_chunk`; both compute the same function, to rounding. Arguments, results and
    errors are those of the chunked form.
    """
    check_shapes(x, step, A, B, C)
    if x.shape[1] <= _RECURRENT_UP_TO:
        return selective_scan_naive(x, step, A, B, C, state)
    return selective_scan_chunk(x, step, A, B, C, state)
