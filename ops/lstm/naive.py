"""The LSTM with block-diagonal recurrence, one token at a time: the specification of every form.

Shapes: B batch, T time, H heads, D width of a head; gates in the order i, f, z, o.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing, without_autocast


class LSTMState(NamedTuple):
    """What an LSTM carries from token to token, fp32 (fp64 for fp64 inputs).

    Attributes:
        h: Output of the last token, `[B, H, D]`.
        c: Cell, `[B, H, D]`.
    """

    h: Tensor
    c: Tensor


@accepts_nothing("wx")
@without_autocast
def lstm_naive(
    wx: Float[Tensor, "B T 4 H D"],
    r: Float[Tensor, "4 H D D"],
    b: Float[Tensor, "4 H D"],
    state: LSTMState | None = None,
) -> tuple[Float[Tensor, "B T H D"], LSTMState]:
    """Run an LSTM whose heads feed back into themselves only.

    Each gate of head n sees h_{t-1} of that head alone, as in FlashRNN (arXiv 2412.07752):

        i, f, z, o = wx_t + h_{t-1} r + b
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(z)
        h_t = sigmoid(o) tanh(c_t)

    Args:
        wx: The inputs' part of the gates, before their non-linearities.
        r: Recurrent weights, one matrix a gate and head; h stands on the left, h @ r[gate, head].
        b: Biases.
        state: State before the first token; zeros when None.

    Returns:
        The outputs h_1 to h_T, in the dtype of `wx`, and the state after the last token. Arithmetic
        is done in the dtype of the state.
    """
    dtype = torch.promote_types(wx.dtype, torch.float32)
    r, b = r.to(dtype), b.to(dtype)
    if state is None:
        zeros = wx.new_zeros(wx.shape[0], *b.shape[1:], dtype=dtype)
        state = LSTMState(zeros, zeros)
    (h, c), out = (x.to(dtype) for x in state), []
    for wx_t in wx.to(dtype).unbind(1):
        i, f, z, o = (wx_t + torch.einsum("bhd,ghde->bghe", h, r) + b).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out, 1).to(wx.dtype), LSTMState(h, c)
