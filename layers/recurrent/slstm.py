"""sLSTM and LSTM with heads: recurrence through non-linear gates, one token after the other."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.matrix.matrix_memory import head_size
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.short_convolution import ConvState, ShortConvolution
from mneme.layers.protocol import Layer, Output, ParamOptions, require_at_least
from mneme.layers.registry import register
from mneme.ops.lstm import LSTMState, lstm
from mneme.ops.slstm import SLSTMState, slstm

FORGET_BIAS = (1.0, 6.0)  # half-lives from 2 to 280 tokens, where the other gates are neutral
RECURRENT_GAIN = 0.1  # of the recurrent weights at the start; small, so gates begin nearly free


class RecurrentState(NamedTuple):
    """What the layer carries.

    Attributes:
        cell: h and c of an LSTM, and n and m besides of an sLSTM, each `[B, H, K]`, fp32 (fp64 in
            fp64).
        conv: the convolution's tail, `[B, conv_size - 1, D]`.
    """

    cell: LSTMState | SLSTMState
    conv: ConvState


@register(
    slstm={"heads": 2},
    lstm={"heads": 2, "cell": "lstm"},
    narrow={"heads": 3, "head_dim": 4, "conv_size": 1},
)
class SLSTM(Layer):
    """The sLSTM of xLSTM (arXiv 2405.04517), or the LSTM, with block-diagonal recurrence.

    Heads feed back into their own gates only, as in FlashRNN (arXiv 2412.07752). Per head, with
    `i, f = W_if silu(conv(x_t)) + h_{t-1} R_if + b_if` and `z, o = W_zo x_t + h_{t-1} R_zo + b_zo`,

        c_t = sigmoid(f) c_{t-1} + exp(i) tanh(z)
        n_t = sigmoid(f) n_{t-1} + exp(i)
        h_t = sigmoid(o) c_t / n_t

    (c and n in units that keep the exponentials bounded), or, with `cell="lstm"`,

        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(z),    h_t = sigmoid(o) tanh(c_t)

    and the output is `W_o GroupNorm(h_t)`: mean and variance of each head, a weight per unit and no
    bias, as in the released code. Gates depend on h, so the layer can follow a state, such as
    parity, that memories which only decay cannot; for the same reason its time is a loop over
    tokens.

    Args:
        d_model: width D.
        heads: H; default 4.
        head_dim: width K of a head, 2 or more; default D / H.
        cell: "slstm" (default) or "lstm".
        conv_size: taps of the short convolution before the gates i and f; default 4.

    State: `4 H K` scalars, `2 H K` of an LSTM, and the convolution's tail.

    Where we differ: the layer is what the paper's block holds up to its per-head norm, then an
    output projection; the up-projection after it is the model's feed-forward layer. The maps W are
    full, where the released code's are one block a head. Forget biases start evenly spaced from 1
    to 6 over the units of each head, the other biases at 0, and R small.

    Raises:
        ValueError: heads that do not divide the width, or heads of one unit.
    """

    param_options: ClassVar[Mapping[str, ParamOptions]] = {"bias": ParamOptions(decays=False)}

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        cell: Literal["slstm", "lstm"] = "slstm",
        conv_size: int = 4,
    ) -> None:
        super().__init__()
        width = head_size(d_model, heads) if head_dim is None else head_dim
        require_at_least(2, head_dim=width)  # of one unit the norm leaves nothing
        self.cell, self.heads = cell, heads
        self.conv = ShortConvolution(d_model, conv_size=conv_size)
        self.gate_proj = nn.Linear(d_model, 2 * heads * width, bias=False)
        self.in_proj = nn.Linear(d_model, 2 * heads * width, bias=False)
        gain = RECURRENT_GAIN * width**-0.5
        self.recurrent = nn.Parameter(gain * torch.randn(4, heads, width, width))
        bias = torch.zeros(4, heads, width)
        bias[1] = torch.linspace(*FORGET_BIAS, width)
        self.bias = nn.Parameter(bias)
        self.norm = nn.GroupNorm(heads, heads * width)
        self.norm.register_parameter("bias", None)  # an argument for it is newer than torch 2.11
        self.out_proj = nn.Linear(heads * width, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], state: RecurrentState | None = None) -> Output:
        """Runs the cell over the tokens of `x`, then normalizes each head and mixes them."""
        state = self.init_state(len(x)) if state is None else state
        local, conv, _ = self.conv(x, state.conv)
        gates = torch.cat((self.gate_proj(F.silu(local)), self.in_proj(x)), dim=-1)
        gates = rearrange(gates, "b t (g h k) -> b t g h k", g=4, h=self.heads)
        h, cell = self.recur(gates, state.cell)
        h = rearrange(h.to(self.out_proj.weight.dtype), "b t h k -> (b t) (h k)")
        y = self.norm(h).unflatten(0, x.shape[:2])  # a token is a sample of its own
        return Output(self.out_proj(y), RecurrentState(cell, conv))

    def recur(
        self, gates: Float[Tensor, "b t 4 h k"], cell: Any
    ) -> tuple[Float[Tensor, "b t h k"], LSTMState | SLSTMState]:
        """The cell's outputs, and its state after the last token."""
        if self.cell == "lstm":
            return lstm(gates, self.recurrent, self.bias, cell)
        return slstm(gates, self.recurrent, self.bias, cell)

    def init_state(self, batch_size: int) -> RecurrentState:
        """Zeros, which is an empty cell."""
        zeros = at_least_fp32(self.bias.new_zeros(batch_size, *self.bias.shape[1:]))
        cell = LSTMState if self.cell == "lstm" else SLSTMState
        empty = cell(*(zeros.clone() for _ in cell._fields))
        return RecurrentState(empty, self.conv.init_state(batch_size))

    def state_size(self, seq_len: int) -> int:
        """Cell and convolution tail, whatever the length."""
        tensors = len(LSTMState._fields if self.cell == "lstm" else SLSTMState._fields)
        return tensors * self.bias[0].numel() + self.conv.state_size(seq_len)
