"""Mamba-2: a matrix memory whose heads share keys and queries and forget by a step of their own."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.matrix.matrix_memory import MatrixMemory, Operands, read_matrix
from mneme.layers.parts.norm import NORM_EPS, RMSNorm
from mneme.layers.parts.step_gate import NO_LIMIT, StepGate
from mneme.layers.protocol import require_at_least
from mneme.layers.registry import register
from mneme.ops.scalar_decay import scalar_decay

RATES = (1.0, 16.0)  # A at the start, as in the released code


@register(
    default={"head_dim": 8, "state_dim": 6},
    bare={"expand": 1, "head_dim": 16, "state_dim": 4, "conv_size": 1, "chunk_size": 4},
    grouped={"head_dim": 8, "state_dim": 6, "groups": 2, "step_limit": (0.01, 0.1)},
    biased={"head_dim": 8, "state_dim": 3, "conv_bias": True, "bias": True},
)
class Mamba2(MatrixMemory):
    """The state-space dual layer of Mamba-2 (arXiv 2405.21060).

    Per head, with N x P states and a step `d_t = softplus(w_d . x_t + dt_bias)`,

        S_t = exp(-A d_t) S_{t-1} + d_t B_t x_t^T,    y_t = S_t^T C_t + D x_t

    where

    * x, B, C: projection, short causal convolution, SiLU; B and C are the same for all heads of a
      group;
    * A = exp(A_log), in fp32, and D are one scalar per head;
    * output: RMSNorm of `y_t silu(W_z u_t)` over the heads of each group (after the gate, unlike
      the other matrix memories), then the output projection.

    As a matrix memory: C are queries, B keys, x values, and d the beta of a write.

    Args:
        d_model: width of the input u.
        expand: width of all heads together over `d_model`; default 2.
        head_dim: width P of a head, which must divide `expand * d_model`; default 64.
        state_dim: state size N, the width of B and C; default 128.
        groups: G, groups of neighboring heads; default 1, all heads.
        conv_size: taps of the short convolution; default 4; 1 for none.
        conv_bias: a bias of the convolution, as released models have; default False.
        bias: biases of the linear layers; default False.
        step_limit: smallest and largest step d_t; default (0, inf), none.
        norm_eps: epsilon of the output's norm; default 1e-5.
        chunk_size: tokens per tile of the chunked form; changes speed, not the function. Default
            64.

    State: `expand * d_model * N` memory scalars, and `(conv_size - 1)(2 G N + expand * d_model)` of
    the convolution.

    Where we differ: rates start stratified (see `StepGate`). What is recalled from a memory without
    writing is `S^T C`, without the skip D x.

    Raises:
        ValueError: a head's width that does not divide that of all heads, groups that do not divide
            the heads, or a step limit that is none.
    """

    silu = True

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state_dim: int = 128,
        groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = False,
        bias: bool = False,
        step_limit: tuple[float, float] = NO_LIMIT,
        norm_eps: float = NORM_EPS,
        chunk_size: int = 64,
    ) -> None:
        require_at_least(1, expand=expand, head_dim=head_dim, state_dim=state_dim, groups=groups)
        width = expand * d_model
        if width % head_dim:
            raise ValueError(f"head_dim ({head_dim}) must divide expand * d_model ({width})")
        heads = width // head_dim
        if heads % groups:
            raise ValueError(f"groups ({groups}) must divide the heads ({heads})")
        super().__init__(
            d_model,
            heads=heads,
            key_dim=state_dim,
            value_dim=head_dim,
            groups=groups,
            gates=heads,
            conv_size=conv_size,
            conv_bias=conv_bias,
            bias=bias,
        )
        self.chunk_size = chunk_size
        self.decay = StepGate(heads, rates=RATES, limit=step_limit)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(width, norm_eps)

    def gates(self, raw: Float[Tensor, "b t h"]) -> dict[str, Tensor]:
        """Log decays, and steps as the betas."""
        decay, step = self.decay(raw)
        return {"log_decay": decay, "beta": step}

    def rule(self, operands: Operands, memory: Tensor) -> tuple[Tensor, Any]:
        """Linear attention with a decay per head and values scaled by the step; then the skip."""
        q, k, x, g, step = operands
        assert step is not None
        v = x * step[..., None]
        y, memory = scalar_decay(q, k, v, g, memory, scale=1.0, chunk_size=self.chunk_size)
        return y + self.D[:, None] * x, memory

    def read(self, q: Float[Tensor, "b t g n"], memory: Tensor) -> Float[Tensor, "b t h p"]:
        """Every C against the same memory."""
        return read_matrix(q, memory, scale=1.0)

    def readout(
        self, y: Float[Tensor, "b t h p"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """What was read as an output: gated by `x`, normalized over groups of heads, mixed."""
        assert self.gate_proj is not None
        y = rearrange(y.to(self.out_proj.weight.dtype), "b t h p -> b t (h p)")
        return self.out_proj(self._normalized(y * F.silu(self.gate_proj(x))))

    def _normalized(self, y: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        """RMSNorm over the heads of each group."""
        assert self.norm is not None
        if self.groups == 1:
            return self.norm(y)
        y = rearrange(y, "b t (g w) -> b t g w", g=self.groups)
        y = F.rms_norm(y, y.shape[-1:], eps=self.norm.eps)
        return rearrange(y, "b t g w -> b t (g w)") * self.norm.weight
