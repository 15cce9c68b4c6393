"""The steps of an LSTM, forward and back, in place.

Shapes: B batch, T time, H heads, D width of a head; gates in the order i, f, z, o.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries, uncompiled, without_autocast
from mneme.ops.lstm.naive import LSTMState, lstm_naive
from mneme.ops.lstm.scan import RECURRENT_UP_TO, Cell, check_weights, scan


class _LSTM(Cell):
    """The loops of an LSTM; `gates` ends as the gates behind their non-linearities."""

    states = 2

    def forward(
        self, wx: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, states: Sequence[Tensor]
    ) -> None:
        h, c = (x[:, 0] for x in states)
        recurrent = h.new_empty(*h.shape[:2], weight.shape[-1])
        bias, added = bias.expand_as(recurrent), recurrent.view(gates[:, 0].shape)
        rows = (wx, gates, gates[:, :, :, :2], *gates.unbind(3), *(x[:, 1:] for x in states))
        steps = zip(*(x.unbind(1) for x in rows), strict=True)
        for wx_t, gates_t, i_and_f, i, f, z, o, h_t, c_t in steps:
            torch.baddbmm(bias, h, weight, out=recurrent)
            torch.add(wx_t, added, out=gates_t)
            i_and_f.sigmoid_()
            z.tanh_()
            o.sigmoid_()
            torch.mul(i, z, out=c_t).addcmul_(f, c)
            torch.tanh(c_t, out=h_t).mul_(o)
            h, c = h_t, c_t

    def backward(
        self,
        gates: Tensor,
        weight: Tensor,
        states: Sequence[Tensor],
        dh: Tensor,
        dstates: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        i, f, z, o = gates.unbind(3)
        c, (dc,) = states[1], dstates
        shown = c[:, 1:].tanh()
        slope = torch.ops.aten.tanh_backward(o, shown)  # of h by c
        slopes = (  # of c, for the last gate of h, by the gates
            torch.ops.aten.sigmoid_backward(z, i),
            torch.ops.aten.sigmoid_backward(c[:, :-1], f),
            torch.ops.aten.tanh_backward(i, z),
            torch.ops.aten.sigmoid_backward(shown, o),
        )
        dgates = torch.stack(slopes, 3)
        by_c, by_h = dgates[:, :, :, :3], dgates[:, :, :, 3]
        rows = (dgates.flatten(3), by_c, by_h, slope, f, dh[:, 1:], dh[:, :-1])
        steps = reversed(list(zip(*(x.unbind(1) for x in rows), strict=True)))
        back, recurrent = weight.mT, torch.empty_like(dc)
        for dgates_t, by_c_t, by_h_t, slope_t, f_t, dh_t, dh_before in steps:
            dc.addcmul_(dh_t, slope_t)
            by_c_t.mul_(dc[:, :, None])
            by_h_t.mul_(dh_t)
            dc.mul_(f_t)
            dh_before.add_(torch.bmm(dgates_t, back, out=recurrent))
        return dgates, (dc,)


@uncompiled
@without_autocast
def lstm_scan(
    wx: Float[Tensor, "B T 4 H D"],
    r: Float[Tensor, "4 H D D"],
    b: Float[Tensor, "4 H D"],
    state: LSTMState | None = None,
) -> tuple[Float[Tensor, "B T H D"], LSTMState]:
    """Compute `lstm_naive` with one call a step for each operation, and its gradient by hand.

    Time and, where a gradient is wanted, memory are linear in T; otherwise memory beyond inputs and
    outputs is that of a few steps. The gradient cannot be differentiated again. Compiled callers
    see one opaque call (a graph break).

    Args:
        wx: The inputs' part of the gates, before their non-linearities, in the order i, f, z, o.
        r: Recurrent weights, one matrix a gate and head; h stands on the left, h @ r[gate, head].
        b: Biases.
        state: State before the first token; zeros when None.

    Returns:
        The outputs h_1 to h_T, in the dtype of `wx`, and the state after the last token, in fp32
        (fp64 for fp64 inputs). Arithmetic is done in the dtype of the state.

    Raises:
        ValueError: If `r` or `b` does not fit `wx`.
    """
    y, last = scan(_LSTM(), wx, r, b, state)
    return y, LSTMState(*last)


@carries("wx")
def lstm(
    wx: Float[Tensor, "B T 4 H D"],
    r: Float[Tensor, "4 H D D"],
    b: Float[Tensor, "4 H D"],
    state: LSTMState | None = None,
) -> tuple[Float[Tensor, "B T H D"], LSTMState]:
    """Compute the LSTM in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `lstm_naive`, more through `lstm_scan`; both compute the
    same function, to rounding. Arguments and results are those of `lstm_scan`.
    """
    check_weights(wx, r, b)
    form = lstm_naive if wx.shape[1] <= RECURRENT_UP_TO else lstm_scan
    return form(wx, r, b, state)
