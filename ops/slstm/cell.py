"""The steps of an sLSTM, forward and back, in place.

Shapes: B batch, T time, H heads, D width of a head; gates in the order i, f, z, o. Names follow the
README beside this file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries, uncompiled, without_autocast
from mneme.ops.lstm.scan import RECURRENT_UP_TO, Cell, check_weights, scan
from mneme.ops.slstm.naive import SLSTMState, slstm_naive


def _closed(lost: Tensor) -> Tensor:
    """1 - sigmoid(f), the slope of log sigmoid(f), from -log sigmoid(f)."""
    return lost.neg().expm1_().neg_()


def _unit_gradient(i: Tensor, lost: Tensor, m: Tensor, du: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient of the last m itself, apart from the unit it is of c and n, passes back.

    Args:
        i: Log weight of each write, [H, T, B, D].
        lost: -log sigmoid(f), [H, T, B, D].
        m: Stabilizers, [H, T + 1, B, D].
        du: Gradient of the last m at fixed c exp(m) and n exp(m), [H, B, D].

    Returns:
        Gradients of i, of log sigmoid(f), and of the first m.
    """
    passed = (m[:, :-1] - lost > i).to(i.dtype)  # 1 where m comes from before, 0 from this write
    since = passed.flip(1).cumprod(1).flip(1)
    after = torch.cat((since[:, 1:], torch.ones_like(since[:, :1])), 1)
    since, after = since * du[:, None], after * du[:, None]
    return after - since, since, since[:, 0]


class _Slopes(NamedTuple):
    """What the gradient of a result is multiplied by on its way back, [H, T, B, ., D]."""

    o: Tensor  # of h, to o, [H, T, B, D]
    h: Tensor  # of h, to c and n
    c: Tensor  # of c, to i, f and z
    n: Tensor  # of n, to i and f
    keep: Tensor  # of c and n, to those before

    @classmethod
    def of(cls, gates: Tensor, states: Sequence[Tensor]) -> "_Slopes":
        i, lost, z, o = gates.unbind(3)
        h, c, n, m = states
        write, keep = (i - m[:, 1:]).exp_(), (m[:, :-1] - lost - m[:, 1:]).exp_()
        kept = keep * _closed(lost)
        return cls(
            torch.ops.aten.sigmoid_backward(c[:, 1:] / n[:, 1:], o),
            torch.stack((o, -h[:, 1:]), 3).div_(n[:, 1:, :, None]),
            torch.stack((write * z, kept * c[:, :-1], torch.ops.aten.tanh_backward(write, z)), 3),
            torch.stack((write, kept * n[:, :-1]), 3),
            keep[:, :, :, None],
        )


class _SLSTM(Cell):
    """The loops of an sLSTM; `gates` ends as i, -log sigmoid(f), tanh(z) and sigmoid(o)."""

    states = 4

    def forward(
        self, wx: Tensor, weight: Tensor, bias: Tensor, gates: Tensor, states: Sequence[Tensor]
    ) -> None:
        h, c, n, m = (x[:, 0] for x in states)
        m.masked_fill_(n == 0, -torch.inf)
        recurrent, zero = h.new_empty(*h.shape[:2], weight.shape[-1]), h.new_zeros(())
        bias, added = bias.expand_as(recurrent), recurrent.view(gates[:, 0].shape)
        factors = h.new_empty(2, *h.shape)
        keep, write = factors
        rows = (wx, gates, *gates.unbind(3), *(x[:, 1:] for x in states))
        steps = zip(*(x.unbind(1) for x in rows), strict=True)
        for wx_t, gates_t, i, f, z, o, h_t, c_t, n_t, m_t in steps:
            torch.baddbmm(bias, h, weight, out=recurrent)
            torch.add(wx_t, added, out=gates_t)
            lost = torch.logaddexp(f.neg_(), zero, out=f)  # -log sigmoid(f)
            z.tanh_()
            o.sigmoid_()
            torch.sub(m, lost, out=keep)
            torch.maximum(i, keep, out=m_t)
            keep.sub_(m_t)
            torch.sub(i, m_t, out=write)
            factors.exp_()
            torch.mul(write, z, out=c_t).addcmul_(keep, c)
            torch.addcmul(write, keep, n, out=n_t)
            torch.div(c_t, n_t, out=h_t).mul_(o)
            h, c, n, m = h_t, c_t, n_t, m_t

    def backward(
        self,
        gates: Tensor,
        weight: Tensor,
        states: Sequence[Tensor],
        dh: Tensor,
        dstates: Sequence[Tensor],
    ) -> tuple[Tensor, Sequence[Tensor]]:
        slopes = _Slopes.of(gates, states)
        (c, n, m), (dc, dn, dm) = states[1:], dstates
        i, lost = gates[:, :, :, 0], gates[:, :, :, 1]
        di, df, du = _unit_gradient(i, lost, m, dm - dc * c[:, -1] - dn * n[:, -1])
        dgates = torch.stack((di, df * _closed(lost), torch.zeros_like(di), slopes.o), 3)
        d = torch.stack((dc, dn), 2)
        dc, dn = d.split(1, 2)

        to_ifz, to_if, to_o = dgates[:, :, :, :3], dgates[:, :, :, :2], dgates[:, :, :, 3]
        rows = (dgates.flatten(3), to_ifz, to_if, to_o, *slopes[1:], dh[:, 1:], dh[:, :-1])
        steps = reversed(list(zip(*(x.unbind(1) for x in rows), strict=True)))
        back, recurrent = weight.mT, torch.empty_like(dh[:, 0])
        for dgates_t, ifz, i_and_f, o, of_h, of_c, of_n, keep, dh_t, dh_before in steps:
            d.addcmul_(dh_t[:, :, None], of_h)
            ifz.addcmul_(dc, of_c)
            i_and_f.addcmul_(dn, of_n)
            o.mul_(dh_t)
            d.mul_(keep)
            dh_before.add_(torch.bmm(dgates_t, back, out=recurrent))
        dc, dn = d.unbind(2)
        return dgates, (dc, dn, du + dc * c[:, 0] + dn * n[:, 0])


@uncompiled
@without_autocast
def slstm_scan(
    wx: Float[Tensor, "B T 4 H D"],
    r: Float[Tensor, "4 H D D"],
    b: Float[Tensor, "4 H D"],
    state: SLSTMState | None = None,
) -> tuple[Float[Tensor, "B T H D"], SLSTMState]:
    """Compute `slstm_naive` with one call a step for each operation, and its gradient by hand.

    Time and, where a gradient is wanted, memory are linear in T; otherwise memory beyond inputs and
    outputs is that of a few steps. The gradient cannot be differentiated again. Compiled callers
    see one opaque call (a graph break).

    Args:
        wx: The inputs' part of the gates, before their non-linearities, in the order i, f, z, o.
        r: Recurrent weights, one matrix a gate and head; h stands on the left, h @ r[gate, head].
        b: Biases.
        state: State before the first token; zeros, the empty state, when None.

    Returns:
        The outputs h_1 to h_T, in the dtype of `wx`, and the state after the last token, in fp32
        (fp64 for fp64 inputs). Arithmetic is done in the dtype of the state.

    Raises:
        ValueError: If `r` or `b` does not fit `wx`.
    """
    y, last = scan(_SLSTM(), wx, r, b, state)
    return y, SLSTMState(*last)


@carries("wx")
def slstm(
    wx: Float[Tensor, "B T 4 H D"],
    r: Float[Tensor, "4 H D D"],
    b: Float[Tensor, "4 H D"],
    state: SLSTMState | None = None,
) -> tuple[Float[Tensor, "B T H D"], SLSTMState]:
    """Compute the sLSTM in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `slstm_naive`, more through `slstm_scan`; both compute
    the same function, to rounding. Arguments and results are those of `slstm_scan`.
    """
    check_weights(wx, r, b)
    form = slstm_naive if wx.shape[1] <= RECURRENT_UP_TO else slstm_scan
    return form(wx, r, b, state)
