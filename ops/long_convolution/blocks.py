"""The long convolution in blocks: what earlier blocks bring by FFT, what a block brings itself not.

An FFT over the whole sequence would let the rounding of late inputs reach early outputs. Here no
output shares a transform with a later input. The scheme, its cost and measurements are in the
README beside this file.

Shapes: B batch, T time, D channels, L taps, S earlier inputs, N blocks, P tokens of a block,
M independent sequences of a channel.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fft import irfft, rfft
from torch.nn.functional import pad

from mneme.ops.contract import carries, uncompiled, without_autocast
from mneme.ops.long_convolution.naive import long_convolution_naive

_RECURRENT_UP_TO = 4  # tokens; each sums over the whole state, a block transforms it


_DIRECT = 128  # tokens of the smallest blocks, which are multiplied by a Toeplitz matrix
_PARTS = 8  # blocks of one size in a block of the next
_MOST_BLOCKS = 16  # of the largest size; each pair of blocks costs one product of transforms

# Inputs of the channels that are worked together, so that the transforms stay in cache.
_GROUP_ELEMENTS = 2**19
_LEAST_GROUP = 16  # channels; fewer are less than a cache line of a token


def _block_size(reach: int, total: int) -> int:
    """Tokens of the largest blocks, for outputs that reach back so far in so many inputs."""
    size = _DIRECT
    while size // 2 >= total:
        size //= 2
    while size * _MOST_BLOCKS < reach:
        size *= _PARTS
    return size


def _from_earlier_blocks(x: Tensor, kernel: Tensor, last: int) -> Tensor:
    """What the `last` blocks of x [D, M, N, P] receive from the blocks before them.

    Input block i reaches output block i + j through the taps between (j - 1) P and (j + 1) P. Of a
    circular convolution of 2P elements with those taps the second half is free of wrapping.
    """
    n, size = x.shape[2:]
    lags = min(n - 1, -(-(kernel.shape[1] - 1) // size))
    y = x.new_zeros(*x.shape[:2], last, size)
    if not lags:
        return y
    missing = (lags + 1) * size - kernel.shape[1]  # negative where taps reach beyond all inputs
    windows = pad(kernel, (0, missing)).unfold(1, 2 * size, size)  # [D, lags, 2P]
    inputs, taps = rfft(x, n=2 * size), rfft(windows)[:, None]
    received = inputs.new_zeros(*x.shape[:2], last, size + 1)
    for lag in range(1, lags + 1):
        first = max(n - last, lag)
        share = received[:, :, first - (n - last) :]
        share.addcmul_(inputs[:, :, first - lag : n - lag], taps[:, :, lag - 1 : lag])
    return irfft(received, n=2 * size)[..., size:]


def _within_blocks(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of each row of x [D, M, P] alone."""
    size = x.shape[-1]
    taps = pad(kernel, (0, size - kernel.shape[1]))  # the first P
    if size <= _DIRECT:
        toeplitz = pad(taps, (size - 1, 0)).unfold(1, size, 1).flip(1)  # (s, t): tap t - s
        return torch.bmm(x, toeplitz)
    parts = x.unflatten(2, (_PARTS, -1))
    y = _within_blocks(parts.flatten(1, 2), kernel).view(parts.shape)
    return y.add_(_from_earlier_blocks(parts, kernel, _PARTS)).flatten(2)


def _convolve(history: Tensor, kernel: Tensor, tokens: int) -> Tensor:
    """The last T outputs, [D, B, T], for history [D, B, S + T] and kernel [D, L]."""
    size = _block_size(min(tokens, kernel.shape[1]), history.shape[-1])
    before, last = history.shape[-1] - tokens, -(-tokens // size)
    # Zeros in front and behind, so that the first of the last T inputs begins a block.
    blocks = pad(history, (-before % size, last * size - tokens)).unflatten(2, (-1, size))
    new = blocks[:, :, -last:]
    y = _within_blocks(new.flatten(1, 2), kernel).view(new.shape)
    y += _from_earlier_blocks(blocks, kernel, last)
    return y.flatten(2)[..., :tokens]


def _fast_length(least: int) -> int:
    """The smallest of 2^n and 3 * 2^n from `least` on: lengths that an FFT likes."""
    power = 1 << (least - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= least else power


def _correlate(dy: Tensor, history: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of history [D, B, S + T] and kernel [D, L] from dy [D, B, T].

    Nothing here has to be causal, so that one transform spans the sequence.
    """
    total, taps = history.shape[-1], min(kernel.shape[1], history.shape[-1])
    n = _fast_length(total + taps - 1)
    along_y = rfft(pad(dy, (total - dy.shape[-1], 0)), n=n)
    of_kernel = rfft(kernel[:, :taps], n=n)[:, None].conj()
    dhistory = irfft(along_y * of_kernel, n=n)[..., :total]
    dkernel = irfft((along_y * rfft(history, n=n).conj()).sum(1), n=n)[:, :taps]
    return dhistory, pad(dkernel, (0, kernel.shape[1] - taps))


def _groups(x: Tensor) -> list[slice]:
    """Cuts the channels of x [B, T, D] into groups."""
    batch, tokens, channels = x.shape
    size = max(_GROUP_ELEMENTS // (batch * tokens), _LEAST_GROUP)
    return [slice(i, i + size) for i in range(0, channels, size)]


def _channels_first(x: Tensor, group: slice, dtype: torch.dtype) -> Tensor:
    """Copy some channels of x [B, T, D] to [D, B, T]."""
    return x[..., group].permute(2, 0, 1).to(dtype).contiguous()


class _LongConvolution(torch.autograd.Function):
    """The blocked form with its analytic gradient, a group of channels at a time."""

    @staticmethod
    def forward(ctx: Any, history: Tensor, kernel: Tensor, tokens: int) -> Tensor:
        y = history.new_empty(history.shape[0], tokens, history.shape[2])
        for group in _groups(history):
            inputs = _channels_first(history, group, kernel.dtype)
            y[..., group] = _convolve(inputs, kernel[group], tokens).permute(1, 2, 0)
        ctx.save_for_backward(history, kernel)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        history, kernel = ctx.saved_tensors
        dhistory, dkernel = torch.empty_like(history), torch.empty_like(kernel)
        for group in _groups(history):
            dy_g, inputs = (_channels_first(v, group, kernel.dtype) for v in (dy, history))
            dinputs, dkernel[group] = _correlate(dy_g, inputs, kernel[group])
            dhistory[..., group] = dinputs.permute(1, 2, 0)
        return dhistory, dkernel, None


def check(x: Tensor, kernel: Tensor, state: Tensor | None) -> None:
    """Raise ValueError for a kernel or a state that does not fit `x`."""
    batch, _, channels = x.shape
    if kernel.shape[0] != channels:
        raise ValueError(f"kernel filters {kernel.shape[0]} channels, but x has {channels}")
    most = kernel.shape[1] - 1
    if state is not None and (
        (state.shape[0], state.shape[2]) != (batch, channels) or state.shape[1] > most
    ):
        raise ValueError(
            f"state has shape {tuple(state.shape)}; a kernel of {most + 1} taps over x "
            f"{tuple(x.shape)} needs ({batch}, at most {most}, {channels})"
        )


@uncompiled
@without_autocast
def long_convolution_blocks(
    x: Float[Tensor, "B T D"],
    kernel: Float[Tensor, "D L"],
    state: Float[Tensor, "B S D"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S_new D"]]:
    """Compute `long_convolution_naive` in blocks, at a cost of O(log L) a token.

    An output depends on nothing later, not even by rounding. The gradient is analytic and cannot be
    differentiated again; it is computed with transforms of the whole sequence. Compiled callers see
    one opaque call (a graph break).

    Args:
        x: Inputs.
        kernel: Taps of each channel; the first multiplies the current token.
        state: Up to L - 1 inputs before the first token, oldest first; none when None. Inputs
            before them are zeros.

    Returns:
        The sums and the last L - 1 inputs, or all if there are fewer, in the dtype of `x`.
        Arithmetic is fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: If `kernel` or `state` does not fit `x`.
    """
    check(x, kernel, state)
    if not x.numel():
        return long_convolution_naive(x, kernel, state)
    history = x if state is None else torch.cat((state.to(x.dtype), x), 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = _LongConvolution.apply(history, kernel.to(dtype), x.shape[1])
    # Copied, as a view would hold on to the whole history, or be a view of x.
    return y, history[:, max(0, history.shape[1] - kernel.shape[1] + 1) :].clone()


@carries("x")
def long_convolution(
    x: Float[Tensor, "B T D"],
    kernel: Float[Tensor, "D L"],
    state: Float[Tensor, "B S D"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S_new D"]]:
    """Compute the long convolution in the form that is cheapest for the length given.

    Up to four tokens (decoding) go through `long_convolution_naive`, more through
    `long_convolution_blocks`; both compute the same function, to rounding. Arguments, results and
    errors are those of the blocked form.
    """
    check(x, kernel, state)
    if x.shape[1] <= _RECURRENT_UP_TO:
        return long_convolution_naive(x, kernel, state)
    return long_convolution_blocks(x, kernel, state)
