"""The sLSTM with block-diagonal recurrence, one token at a time: the specification of every form.

Shapes: B batch, T time, H heads, D width of a head; gates in the order i, f, z, o.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from mneme.ops.contract import accepts_nothing, without_autocast


class SLSTMState(NamedTuple):
    """What an sLSTM carries from token to token, fp32 (fp64 for fp64 inputs).

    Cell and normalizer are held in units of exp(m), so that both stay bounded. A state of zeros is
    the empty one: where n is 0 nothing has been written, and c and m are not looked at.

    Attributes:
        h: Output of the last token, `[B, H, D]`.
        c: Cell, `[B, H, D]`.
        n: Normalizer, `[B, H, D]`; at least 1 from the first token on.
        m: Largest log weight of any write so far, `[B, H, D]`.
    """

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


@accepts_nothing("wx")
@without_autocast
def slstm_naive(
    wx: Float[Tensor, "B T 4 H D"],
    r: Float[Tensor, "4 H D D"],
    b: Float[Tensor, "4 H D"],
    state: SLSTMState | None = None,
) -> tuple[Float[Tensor, "B T H D"], SLSTMState]:
    """Run an sLSTM (arXiv 2405.04517), an LSTM with exponential gates and a normalizer.

    Each gate of head n sees h_{t-1} of that head alone:

        i, f, z, o = wx_t + h_{t-1} r + b
        a_t = log sigmoid(f) + m_{t-1}
        m_t = max(i, a_t)
        c_t = exp(a_t - m_t) c_{t-1} + exp(i - m_t) tanh(z)
        n_t = exp(a_t - m_t) n_{t-1} + exp(i - m_t)
        h_t = sigmoid(o) c_t / n_t

    Where nothing has been written m counts as -inf, so that the first token has m = i and a weight
    of exactly 1. One of the two factors is always 1, hence n >= 1: the bound max(n, 1) that some
    code has would change nothing.

    Args:
        wx: The inputs' part of the gates, before their non-linearities.
        r: Recurrent weights, one matrix a gate and head; h stands on the left, h @ r[gate, head].
        b: Biases.
        state: State before the first token; zeros, the empty state, when None.

    Returns:
        The outputs h_1 to h_T, in the dtype of `wx`, and the state after the last token. Arithmetic
        is done in the dtype of the state.
    """
    dtype = torch.promote_types(wx.dtype, torch.float32)
    r, b = r.to(dtype), b.to(dtype)
    if state is None:
        zeros = wx.new_zeros(wx.shape[0], *b.shape[1:], dtype=dtype)
        state = SLSTMState(zeros, zeros, zeros, zeros)
    (h, c, n, m), out = (x.to(dtype) for x in state), []
    m = m.masked_fill(n == 0, -torch.inf)
    for wx_t in wx.to(dtype).unbind(1):
        i, f, z, o = (wx_t + torch.einsum("bhd,ghde->bghe", h, r) + b).unbind(1)
        kept = logsigmoid(f) + m
        m = torch.maximum(i, kept)
        keep, write = (kept - m).exp(), (i - m).exp()
        c = keep * c + write * z.tanh()
        n = keep * n + write
        h = o.sigmoid() * c / n
        out.append(h)
    return torch.stack(out, 1).to(wx.dtype), SLSTMState(h, c, n, m)
