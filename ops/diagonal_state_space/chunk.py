"""The diagonal state space, chunk by chunk, as products of small matrices.

The derivation, cost and measurements are in the README beside this file. A mode is complex; where
it enters a product it is two real numbers, so that 2M of them make a state.

Shapes: B batch, T time, D channels, M modes of a channel, C tokens of a chunk, N chunks.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mneme.ops.contract import accepts_nothing, carries, uncompiled, without_autocast
from mneme.ops.diagonal_state_space.hold import zero_order_hold
from mneme.ops.diagonal_state_space.naive import diagonal_state_space_naive

_RECURRENT_UP_TO = 2  # tokens


# Inputs of the channels that are worked together: their tiles stay in cache from one product to
# the next. Channels do not meet, so that any number of them may be taken at a time.
_GROUP_ELEMENTS = 2**20
_LEAST_GROUP = 16  # channels; fewer are less than a cache line of a token


class _Maps(NamedTuple):
    """The linear layers of a chunk, for each channel."""

    within: Tensor  # [D, C, C], from inputs to outputs; row s, column t
    write: Tensor  # [D, C, 2M], from inputs to the state after the chunk
    read: Tensor  # [D, 2M, C], from the state before the chunk to outputs
    decay: Tensor  # [D, M], complex, of the state over the chunk

    @classmethod
    def of(cls, decays: Tensor, write: Tensor, read: Tensor) -> "_Maps":
        """The maps for decays over 0 to C tokens, [D, C + 1, M], and a token's write and read."""
        # Conjugates, as the real part of a product is an inner product with a conjugate.
        reads = torch.view_as_real((2 * read[:, None] * decays).conj().resolve_conj()).flatten(2)
        taps = reads[:, :-1] @ torch.view_as_real(write).flatten(1)[..., None]
        writes = torch.view_as_real(write[:, None] * decays[:, :-1].flip(1)).flatten(2)
        chunk = writes.shape[1]
        padded = torch.nn.functional.pad(taps[..., 0], (chunk - 1, 0))
        within = padded.unfold(1, chunk, 1).flip(1)  # entry (s, t) is tap t - s
        return cls(within, writes, reads[:, 1:].mT.contiguous(), decays[:, -1])

    def shorter(self, decays: Tensor, chunk: int) -> "_Maps":
        """The maps of a chunk of fewer tokens, from the decays over 0 to C tokens."""
        within, write, read, _ = self
        start = within.shape[1] - chunk
        return _Maps(
            within[:, :chunk, :chunk], write[:, start:], read[..., :chunk], decays[:, chunk]
        )


def _decays(log: Tensor, chunk: int) -> Tensor:
    """Decays over 0 to C tokens, complex [D, C + 1, M], from the logarithm of one, [D, M]."""
    power, log = torch.arange(chunk + 1, device=log.device)[:, None], log[:, None]
    # Powers of two, as exp is slow where its result is below the smallest normal number.
    size = (log.real * math.log2(math.e) * power).exp2()
    return torch.polar(size, log.imag * power)


def _tiles(x: Tensor, chunk: int) -> Tensor:
    """Copy x [B, N * C, D] to [D, N * B, C]."""
    return x.unflatten(1, (-1, chunk)).permute(3, 1, 0, 2).flatten(1, 2).contiguous()


def _write(out: Tensor, tiles: Tensor) -> None:
    """Write tiles [D, N * B, C] to out [B, N * C, D]."""
    chunk = tiles.shape[-1]
    tiles = tiles.unflatten(1, (-1, len(out)))
    out.unflatten(1, (-1, chunk)).copy_(tiles.permute(2, 1, 3, 0))


def _modes(states: Tensor, batch: int) -> Tensor:
    """View states [D, (N + 1) * B, 2M] as complex [D, N + 1, B, M]."""
    return torch.view_as_complex(states.unflatten(2, (-1, 2))).unflatten(1, (-1, batch))


def _forward_group(x: Tensor, maps: _Maps, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [D, N * B, C] and states between chunks [D, (N + 1) * B, 2M] of some channels.

    Args:
        x: Inputs [D, N * B, C].
        maps: Maps of these channels.
        state: State before the first chunk [B, D, 2M].
    """
    rows, batch = x.shape[1], len(state)
    s = x.new_empty(len(x), rows + batch, state.shape[-1])
    s[:, :batch] = state.transpose(0, 1)
    torch.bmm(x, maps.write, out=s[:, batch:])
    chunks, decay = _modes(s, batch).unbind(1), maps.decay[:, None]
    for before, after in pairwise(chunks):
        after.addcmul_(before, decay)
    return torch.bmm(x, maps.within).baddbmm_(s[:, :rows], maps.read), s


def _backward_group(
    x: Tensor, s: Tensor, maps: _Maps, dy: Tensor, dstate: Tensor
) -> tuple[Tensor, _Maps, Tensor]:
    """Gradients of x [D, N * B, C], of the maps and of the state before the first chunk."""
    rows, batch = x.shape[1], len(dstate)
    ds = torch.empty_like(s)
    ds[:, rows:] = dstate.transpose(0, 1)
    torch.bmm(dy, maps.read.mT, out=ds[:, :rows])
    chunks, decay = _modes(ds, batch).unbind(1)[::-1], maps.decay.conj().resolve_conj()[:, None]
    for after, before in pairwise(chunks):
        before.addcmul_(after, decay)
    before, after = s[:, :rows], ds[:, batch:]
    ddecay = torch.linalg.vecdot(
        _modes(before, batch).flatten(1, 2), _modes(after, batch).flatten(1, 2), dim=1
    )
    dmaps = _Maps(torch.bmm(x.mT, dy), torch.bmm(x.mT, after), torch.bmm(before.mT, dy), ddecay)
    dx = torch.bmm(dy, maps.within.mT).baddbmm_(after, maps.write.mT)
    return dx, dmaps, ds[:, :batch].transpose(0, 1)


class _Chunks(torch.autograd.Function):
    """Whole chunks under given maps, a group of channels at a time.

    The states between chunks are kept for the backward pass; inputs are tiled again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        within: Tensor,
        write: Tensor,
        read: Tensor,
        decay: Tensor,
        state: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        maps, chunk = _Maps(within, write, read, decay), within.shape[1]
        y, last, kept = torch.empty_like(x), torch.empty_like(state), []
        for group in _groups(x):
            tiles = _tiles(x[..., group].to(state.dtype), chunk)
            out, s = _forward_group(tiles, _Maps(*(m[group] for m in maps)), state[:, group])
            _write(y[..., group], out)
            last[:, group] = s[:, -len(x) :].transpose(0, 1)
            if keep:
                kept.append(s)
        ctx.save_for_backward(x, *maps, *kept)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, within, write, read, decay, *kept = ctx.saved_tensors
        maps, chunk, dtype = _Maps(within, write, read, decay), within.shape[1], dlast.dtype
        dx, dstate = torch.empty_like(x), torch.empty_like(dlast)
        dmaps = _Maps(*(torch.empty_like(m) for m in maps))
        for group, s in zip(_groups(x), kept, strict=True):
            tiles, dtiles = (_tiles(v[..., group].to(dtype), chunk) for v in (x, dy))
            some = _Maps(*(m[group] for m in maps))
            out, parts, dstate[:, group] = _backward_group(tiles, s, some, dtiles, dlast[:, group])
            _write(dx[..., group], out)
            for whole, part in zip(dmaps, parts, strict=True):
                whole[group] = part
        return dx, *dmaps, dstate, None


def _groups(x: Tensor) -> list[slice]:
    """Cuts the channels of x [B, T, D] into groups."""
    batch, tokens, channels = x.shape
    size = max(_GROUP_ELEMENTS // (batch * tokens), _LEAST_GROUP)
    return [slice(i, i + size) for i in range(0, channels, size)]


def check(x: Tensor, A: Tensor, B: Tensor, C: Tensor, step: Tensor, chunk_size: int) -> None:
    """Raise ValueError for shapes that do not fit, or a chunk of no tokens."""
    channels, modes = x.shape[-1], A.shape[1]
    for name, tensor in {"A": A, "B": B, "C": C}.items():
        if tensor.shape != (channels, modes, 2):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; x with {channels} channels and {modes} "
                f"modes (axis 1 of A) needs {(channels, modes, 2)}, real and imaginary parts last"
            )
    if step.shape != (channels,):
        raise ValueError(f"step has shape {tuple(step.shape)}; x has {channels} channels")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")


@uncompiled
@accepts_nothing("x")
@without_autocast
def diagonal_state_space_chunk(
    x: Float[Tensor, "B T D"],
    A: Float[Tensor, "D M 2"],
    B: Float[Tensor, "D M 2"],
    C: Float[Tensor, "D M 2"],
    step: Float[Tensor, "D"],
    state: Float[Tensor, "B D M 2"] | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D M 2"]]:
    """Compute `diagonal_state_space_naive` in chunks, where most arithmetic is matrix products.

    Time is linear in T. Outputs depend on nothing later, not even by rounding. Exact for any real
    part of A below 0. The gradient of the chunks is analytic; it cannot be differentiated again.
    With gradients, the modes between chunks are kept: 2 M / chunk_size elements a token and
        channel.
    Compiled callers see one opaque call (a graph break).

    Args:
        x: Inputs.
        A: Rates, real part below 0; real and imaginary parts last, as in all complex arguments.
        B: What an input writes to each mode.
        C: What is read of it.
        step: Length of each channel's step, above 0.
        state: Modes before the first token, fp32 (fp64 for fp64 inputs); zeros when None.
        chunk_size: Tokens a chunk, at least 1. Changes cost, not the function.

    Returns:
        The reads, in the dtype of `x`, and the modes after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the modes.

    Raises:
        ValueError: If the shapes of A, B, C and step do not fit, or `chunk_size` is below 1.
    """
    check(x, A, B, C, step, chunk_size)
    batch, tokens, _ = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(batch, *A.shape, dtype=dtype)
    log, write = zero_order_hold(*(v.to(dtype) for v in (A, B, step)))
    chunk = min(chunk_size, tokens)
    decays = _decays(log, chunk)
    maps = _Maps.of(decays, write, torch.view_as_complex(C.to(dtype)))
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in (x, *maps, state))
    s, rest = state.to(dtype).flatten(2), tokens % chunk
    y, s = _Chunks.apply(x[:, : tokens - rest], *maps, s, keep)
    if rest:
        y_rest, s = _Chunks.apply(x[:, tokens - rest :], *maps.shorter(decays, rest), s, keep)
        y = torch.cat((y, y_rest), 1)
    return y, s.unflatten(2, (-1, 2))


@carries("x")
def diagonal_state_space(
    x: Float[Tensor, "B T D"],
    A: Float[Tensor, "D M 2"],
    B: Float[Tensor, "D M 2"],
    C: Float[Tensor, "D M 2"],
    step: Float[Tensor, "D"],
    state: Float[Tensor, "B D M 2"] | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D M 2"]]:
    """Compute the diagonal state space in the form that is cheapest for the size given.

    One or two tokens (decoding) go through `diagonal_state_space_naive`, more through
    `diagonal_state_space_chunk`; both compute the same function, to rounding. Arguments, results
    and errors are those of the chunked form. Chunks are halved while their square exceeds B T, as
    the maps of a chunk cost M C elements a channel, and the states between chunks M B T / C.
    """
    check(x, A, B, C, step, chunk_size)
    batch, tokens, _ = x.shape
    if tokens <= _RECURRENT_UP_TO:
        return diagonal_state_space_naive(x, A, B, C, step, state)
    while chunk_size**2 > batch * tokens and chunk_size > 1:
        chunk_size //= 2
    return diagonal_state_space_chunk(x, A, B, C, step, state, chunk_size=chunk_size)
