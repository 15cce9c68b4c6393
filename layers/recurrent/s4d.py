"""S4D: a diagonal state space per channel, the same at every token."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.step_gate import STEP_RANGE, log_uniform
from mneme.layers.protocol import Layer, Output, ParamOptions
from mneme.layers.recurrent.gated_output import GatedOutput
from mneme.layers.registry import register
from mneme.ops.diagonal_state_space import diagonal_state_space

Rates = Literal["lin", "inv", "legs", "real"]

OF_THE_RATES = ParamOptions(decays=False, max_lr=1e-3)


class S4DState(NamedTuple):
    """The modes after the last token: `[B, D, M, 2]`, complex as pairs, fp32 (fp64 in fp64)."""

    modes: Tensor


@register(
    lin={"state_dim": 8},
    inv={"state_dim": 4, "init": "inv"},
    legs={"state_dim": 6, "init": "legs"},
    real={"state_dim": 2, "init": "real"},
)
class S4D(Layer):
    """The diagonal state space of S4D (arXiv 2206.11893), then GELU and a gated linear unit.

    Per channel with step s, for M = N / 2 modes that stand for conjugate pairs,

        h_t = exp(s A_n) h_{t-1} + (exp(s A_n) - 1) / A_n x_t,    y_t = 2 Re sum_n C_n h_t + D x_t

    and the output is `(W_o g + b_o) * sigmoid(W_g g + b_g)` with `g = GELU(y)`. Nothing in the
    recurrence depends on the tokens, so it cannot recall by content. The real part of A is held as
    `-exp(A_log)`, in fp32; C starts complex normal, D normal, steps log-uniform in [0.001, 0.1].
    A and the steps are not decayed and learn at 1e-3 at most; C is treated like any linear layer.

    Args:
        d_model: width D.
        state_dim: N, an even number of states of a channel; default 64.
        init: the first A_n, n = 0 .. M - 1. "lin" (default): `-1/2 + i pi n`. "inv":
            `-1/2 + i N / pi (N / (2 n + 1) - 1)`. "legs": eigenvalues of the normal part of
            HiPPO-LegS. "real": `-(n + 1)`.

    State: `N D` scalars.

    Where we differ: B is one and is not learnt, as only its product with C enters. That of
    S4D-LegS, half of HiPPO's in the basis of the eigenvectors, is in the size with which C starts;
    its phase would change nothing, as that of C is random. (The released code has B = 1 for all
    rates unless asked, and learns it in the kernel with all options.)

    Raises:
        ValueError: a state size that is not even and positive.
    """

    param_options: ClassVar[Mapping[str, ParamOptions]] = dict.fromkeys(
        ("A_log", "A_imag", "log_step"), OF_THE_RATES
    )

    def __init__(self, d_model: int, *, state_dim: int = 64, init: Rates = "lin") -> None:
        super().__init__()
        if state_dim < 2 or state_dim % 2:
            raise ValueError(f"state_dim must be even, 2 or more, got {state_dim}")
        real, imag = first_rates(init, state_dim)
        self.A_log = nn.Parameter((-real).log().repeat(d_model, 1))
        self.A_imag = nn.Parameter(imag.repeat(d_model, 1))
        size = first_sizes(init, state_dim)[:, None] * 0.5**0.5
        self.C = nn.Parameter(torch.randn(d_model, state_dim // 2, 2) * size)
        self.log_step = nn.Parameter(log_uniform(d_model, *STEP_RANGE).log())
        self.D = nn.Parameter(torch.randn(d_model))
        self.output = GatedOutput(d_model)

    def forward(self, x: Float[Tensor, "b t d"], state: S4DState | None = None) -> Output:
        """Filters each channel, then mixes channels."""
        (modes,) = self.init_state(len(x)) if state is None else state
        rate = torch.stack((-at_least_fp32(self.A_log).exp(), at_least_fp32(self.A_imag)), dim=-1)
        write = torch.tensor([1.0, 0.0], dtype=rate.dtype, device=rate.device).expand_as(rate)
        step = at_least_fp32(self.log_step).exp()
        y, modes = diagonal_state_space(x, rate, write, at_least_fp32(self.C), step, modes)
        y = (y + self.D * x).to(self.D.dtype)
        return Output(self.output(y), S4DState(modes))

    def init_state(self, batch_size: int) -> S4DState:
        """Modes of zero, `[B, D, M, 2]`."""
        return S4DState(at_least_fp32(self.C.new_zeros(batch_size, *self.C.shape)))

    def state_size(self, seq_len: int) -> int:
        """Two scalars per mode, whatever the length."""
        return self.C.numel()


def first_rates(init: Rates, state_dim: int) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Real and imaginary parts of a channel's first A."""
    n = torch.arange(state_dim // 2, dtype=torch.float32)
    half = torch.full_like(n, -0.5)
    match init:
        case "lin":
            return half, math.pi * n
        case "inv":
            return half, state_dim / math.pi * (state_dim / (2 * n + 1) - 1)
        case "legs":
            return half, _legs_modes(state_dim)[0]
        case "real":
            return -1 - n, torch.zeros_like(n)


def first_sizes(init: Rates, state_dim: int) -> Float[Tensor, " m"]:
    """Root mean squares of a channel's first C: |B| of the modes."""
    return _legs_modes(state_dim)[1] if init == "legs" else torch.ones(state_dim // 2)


def _legs_modes(state_dim: int) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Frequencies of HiPPO-LegS's normal part, ascending, and |B| of each mode.

    That matrix is `A + P P^T`, with `P_n = sqrt(n + 1/2)`: -1/2 on the diagonal, and beside it
    `-P_n P_k` below and `P_n P_k` above, which is skew-symmetric. Frequencies are the positive
    imaginary parts of its eigenvalues. HiPPO's B is `sqrt(2) P`; without the low-rank part half of
    it drives the modes, by as much as it has of each eigenvector.
    """
    p = (torch.arange(state_dim, dtype=torch.float64) + 0.5).sqrt()
    below = torch.outer(p, p).tril(-1)
    frequencies, vectors = torch.linalg.eigh((below.mT - below) * 1j)
    parts = (vectors.mH @ (0.5**0.5 * p).to(vectors)).abs()
    modes = slice(state_dim // 2, None)
    return frequencies[modes].float(), parts[modes].float()
