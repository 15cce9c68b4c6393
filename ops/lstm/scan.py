"""Recurrences with four gates and block-diagonal recurrent weights, with their gradient by hand.

A cell supplies the two loops over time; what surrounds them is here. The loops work in place on
buffers that hold many steps, so that the gradient of the weights is one product over those.

Shapes: B batch, T time, H heads, D width of a head. Inside, heads come first and the batch after
time, [H, T, B, ...], as the recurrent product goes over all heads at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RECURRENT_UP_TO = 2  # tokens; rearranging the weights costs more than it saves

# Elements per gate of a segment of the backward pass. A larger segment hides the overhead of each
# call better and a smaller one stays in cache.
_SEGMENT_ELEMENTS = 2**15


class Cell(ABC):
    """The loops of one kind of recurrence.

    Attributes:
        states: Number of state tensors, h included.
    """

    states: ClassVar[int]

    @abstractmethod
    def forward(
        self, wx: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, states: Sequence[Tensor]
    ) -> None:
        """Take all steps.

        Args:
            wx: [H, T, B, 4, D], a view of the inputs.
            weight: [H, D, 4 D].
            bias: [H, 1, 4 D].
            gates: [H, T, B, 4, D], for what `backward` needs of the gates.
            states: [H, T + 1, B, D] each, h first, filled in from their initial values in row 0.
        """

    @abstractmethod
    def backward(
        self,
        gates: Tensor,
        weight: Tensor,
        states: Sequence[Tensor],
        dh: Tensor,
        dstates: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Take some steps back.

        Args:
            gates: As `forward` left them.
            weight: [H, D, 4 D].
            states: As `forward` left them.
            dh: [H, T + 1, B, D], gradients of h as an output; what else they get is added to them.
            dstates: Gradients [H, B, D] of the other states after the last step; overwritten.

        Returns:
            Gradients of the gates [H, T, B, 4, D], and of the other initial states.
        """


def _segments(y: Tensor) -> list[slice]:
    """Ranges of steps of [B, T, H, D] that are worked together, in order."""
    batch, tokens, heads, width = y.shape
    steps = max(1, _SEGMENT_ELEMENTS // max(1, batch * heads * width))
    return [slice(i, min(i + steps, tokens)) for i in range(0, tokens, steps)]


class _Scan(torch.autograd.Function):
    """All steps of a cell; activations and states are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, wx: Tensor, r: Tensor, b: Tensor, keep: bool, *state: Tensor
    ) -> tuple[Tensor, ...]:
        batch, tokens, _, heads, width = wx.shape
        dtype = state[0].dtype
        weight = r.to(dtype).permute(1, 2, 0, 3).flatten(2)
        bias = b.to(dtype).transpose(0, 1).flatten(1)[:, None]
        y = wx.new_empty(batch, tokens, heads, width)
        last, kept = [x.transpose(0, 1) for x in state], []
        for part in _segments(y):
            inputs = wx[:, part].permute(3, 1, 0, 2, 4)
            gates = torch.empty_like(inputs, dtype=dtype, memory_format=torch.contiguous_format)
            shape = heads, inputs.shape[1] + 1, batch, width
            states = [gates.new_empty(shape) for _ in last]
            for x, start in zip(states, last, strict=True):
                x[:, 0] = start
            cell.forward(inputs, weight, bias, gates, states)
            y[:, part] = states[0][:, 1:].permute(2, 1, 0, 3)
            last = [x[:, -1] for x in states]
            if keep:
                kept += [gates, *states]
        ctx.save_for_backward(weight, *kept)
        ctx.cell, ctx.dtypes = cell, (r.dtype, b.dtype)
        copied = (x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in last)
        return y, *copied

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *dstate: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        parts, each = _segments(dy), 1 + len(dstate)
        batch, tokens, heads, width = dy.shape
        dwx = dy.new_empty(batch, tokens, 4, heads, width)
        dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
        dlast, *dlasts = (x.transpose(0, 1).clone() for x in dstate)
        for number, part in reversed(list(enumerate(parts))):
            gates, *states = kept[number * each : (number + 1) * each]
            dh = torch.zeros_like(states[0])
            dh[:, 1:] = dy[:, part].permute(2, 1, 0, 3)
            dh[:, -1] += dlast
            dgates, dlasts = ctx.cell.backward(gates, weight, states, dh, dlasts)
            dlast = dh[:, 0]
            dwx[:, part] = dgates.permute(2, 1, 3, 0, 4)
            dgates = dgates.flatten(3).flatten(1, 2)
            dweight.baddbmm_(states[0][:, :-1].flatten(1, 2).mT, dgates)
            dbias += dgates.sum(1)
        of_r, of_b = ctx.dtypes
        dr = dweight.unflatten(2, (4, width)).permute(2, 0, 1, 3).to(of_r)
        db = dbias.unflatten(1, (4, width)).transpose(0, 1).to(of_b)
        return None, dwx, dr, db, None, *(x.transpose(0, 1) for x in (dlast, *dlasts))


def check_weights(wx: Tensor, r: Tensor, b: Tensor) -> None:
    """Raise ValueError for weights that do not fit the inputs."""
    gates, heads, width = wx.shape[2:]
    expected = (gates, heads, width, width), (gates, heads, width)
    if (tuple(r.shape), tuple(b.shape)) != expected:
        raise ValueError(
            f"r has shape {tuple(r.shape)} and b {tuple(b.shape)}; wx {tuple(wx.shape)}, that is "
            f"batch, time, gates, heads and their width, needs {expected[0]} and {expected[1]}"
        )


def scan(
    cell: Cell, wx: Tensor, r: Tensor, b: Tensor, state: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Run a cell over `wx` [B, T, 4, H, D].

    Args:
        cell: The recurrence.
        wx: The inputs' part of the gates.
        r: Recurrent weights [4, H, D, D].
        b: Biases [4, H, D].
        state: Tensors [B, H, D] before the first token, h first; zeros when None.

    Returns:
        The outputs [B, T, H, D] in the dtype of `wx`, and the state after the last token.

    Raises:
        ValueError: If `r` or `b` does not fit `wx`.
    """
    check_weights(wx, r, b)
    dtype = torch.promote_types(wx.dtype, torch.float32)
    if state is None:
        state = [wx.new_zeros(wx.shape[0], *wx.shape[3:], dtype=dtype)] * cell.states
    state = [x.to(dtype) for x in state]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (wx, r, b, *state))
    y, *last = _Scan.apply(cell, wx, r, b, keep, *state)
    return y, last
