"""Mamba: a selective state space per channel, inside a gated block."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.short_convolution import ConvState, ShortConvolution
from mneme.layers.parts.step_gate import STEP_RANGE, inverse_softplus, log_uniform
from mneme.layers.protocol import Layer, Output, ParamOptions, require_at_least
from mneme.layers.registry import register
from mneme.ops.selective_scan import selective_scan


class MambaState(NamedTuple):
    """What Mamba carries, for W channels.

    Attributes:
        memory: `[B, W, N]`, fp32 (fp64 in fp64).
        conv: the convolution's tail, `[B, conv_size - 1, W]`.
    """

    memory: Tensor
    conv: ConvState


@register(
    default={"state_dim": 4},
    narrow={"expand": 1, "state_dim": 3, "conv_size": 1, "step_rank": 5},
    biased={"expand": 1, "state_dim": 3, "conv_bias": True, "bias": True},
)
class Mamba(Layer):
    """The block of Mamba (arXiv 2312.00752), whose memory is the selective state space S6.

    With `x = silu(conv(W_x u))`, z = W_z u and, for channel d and state n,

        h_t = exp(A_dn s_td) h_{t-1} + s_td B_tn x_td,    y_td = sum_n C_tn h_t + D_d x_td

    where

    * steps: `s = softplus(W_s r + dt_bias)`; r of low rank, B and C are linear layers of x, so that
      each token chooses how much is forgotten, what it writes and what it reads;
    * A = -exp(A_log), in fp32, starts at -1 to -N in every channel; steps start log-uniform in
      [0.001, 0.1] and W_s uniform in `+-rank**-0.5`; D starts at one;
    * output: `W_o (y * silu(z))`.

    Args:
        d_model: width of the input u.
        expand: channels W of x over `d_model`; default 2.
        state_dim: states N of a channel; default 16.
        conv_size: taps of the short convolution; default 4.
        step_rank: width of r; default `d_model / 16`, rounded up.
        conv_bias: a bias of the convolution, as released models have; default False.
        bias: biases of the first and the last linear layer; default False.

    State: `N W` memory scalars and `(conv_size - 1) W` of the convolution.

    What it hands on to later layers is y.

    Raises:
        ValueError: sizes below one.
    """

    param_options: ClassVar[Mapping[str, ParamOptions]] = {"A_log": ParamOptions(decays=False)}

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 2,
        state_dim: int = 16,
        conv_size: int = 4,
        step_rank: int | None = None,
        conv_bias: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        rank = -(-d_model // 16) if step_rank is None else step_rank
        require_at_least(1, expand=expand, state_dim=state_dim, step_rank=rank)
        width = expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * width, bias=bias)
        self.conv = ShortConvolution(width, conv_size=conv_size, bias=conv_bias)
        self.widths = rank, state_dim, state_dim
        self.select_proj = nn.Linear(width, sum(self.widths), bias=False)
        self.step_proj = nn.Linear(rank, width, bias=False)  # PyTorch's start is the paper's
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(width, *STEP_RANGE)))
        rates = torch.arange(1.0, state_dim + 1).repeat(width, 1)
        self.A_log = nn.Parameter(rates.log())
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "b t d"], state: MambaState | None = None) -> Output:
        """Filters each channel, and gates what is read by the current token."""
        return self.forward_saving(x, state)[0]

    @property
    def saved_dim(self) -> int:
        """Width of what is read: all channels."""
        return self.out_proj.in_features

    def forward_saving(
        self, x: Float[Tensor, "b t d"], state: MambaState | None = None
    ) -> tuple[Output, Float[Tensor, "b t w"]]:
        """As `forward`, with what was read, before z gates it."""
        state = self.init_state(len(x)) if state is None else state
        inner, z = self.in_proj(x).chunk(2, dim=-1)
        inner, conv, _ = self.conv(inner, state.conv)
        y, memory = self.scan(F.silu(inner), state.memory)
        y = y.to(self.out_proj.weight.dtype)
        return Output(self.out_proj(y * F.silu(z)), MambaState(memory, conv)), y

    def scan(
        self, x: Float[Tensor, "b t w"], memory: Float[Tensor, "b w n"]
    ) -> tuple[Float[Tensor, "b t w"], Float[Tensor, "b w n"]]:
        """The selective state space, with its skip."""
        low, write, read = self.select_proj(x).split(self.widths, dim=-1)
        step = F.softplus(at_least_fp32(self.step_proj(low)) + self.dt_bias)
        rate = -at_least_fp32(self.A_log).exp()
        y, memory = selective_scan(x, step, rate, write, read, memory)
        return y + self.D * x, memory

    def init_state(self, batch_size: int) -> MambaState:
        """States `[B, D, N]` and the convolution's tail, both zero."""
        memory = at_least_fp32(self.A_log.new_zeros(batch_size, *self.A_log.shape))
        return MambaState(memory, self.conv.init_state(batch_size))

    def state_size(self, seq_len: int) -> int:
        """Memory and convolution tail, whatever the length."""
        return self.A_log.numel() + self.conv.state_size(seq_len)
