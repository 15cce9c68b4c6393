"""Gated DeltaNet: a matrix memory that forgets by a gate and corrects what it already holds."""

from typing import Any

from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mneme.layers.matrix.matrix_memory import MatrixMemory, Operands, head_size
from mneme.layers.parts.norm import NORM_EPS, l2_norm
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.step_gate import StepGate
from mneme.layers.protocol import require_at_least
from mneme.layers.registry import register
from mneme.ops.gated_delta import gated_delta
from mneme.ops.options import scaled_width

RATES = (0.0, 16.0)  # A at the start, as in the released code


@register(
    default={"heads": 2},
    wide_values={"heads": 2, "expand_v": 2.0, "chunk_size": 4},
    negative_eigenvalues={"heads": 2, "head_dim": 4, "negative_eigenvalues": True},
    bare={"heads": 1, "conv_size": 1, "output_gate": False},
    grouped={"heads": 4, "key_heads": 2, "head_dim": 4, "expand_v": 0.5},
)
class GatedDeltaNet(MatrixMemory):
    """The gated delta rule of "Gated Delta Networks" (arXiv 2412.06464).

    Per head, `S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`,
    `o_t = S_t^T q_t / sqrt(K)`, with

    * q, k, v: projection, short causal convolution, SiLU; `l2_norm` of q and k;
    * decay `log a_t = -exp(A_log) softplus(w_a . x_t + dt_bias)`, in fp32;
    * beta `b_t = sigmoid(w_b . x_t)`;
    * output: RMSNorm per head, times `silu(W_g x_t)`, then the output projection.

    Args:
        d_model: width D.
        heads: H; default 4.
        key_heads: G, heads of q and k, each read by H / G neighboring heads; default H.
        head_dim: key size K of a head; default D / H.
        expand_v: value size over key size, V / K; default 1.
        conv_size: taps of the short convolution; default 4; 1 for none.
        negative_eigenvalues: doubles b, so that a write can flip the sign of what a key holds
            (arXiv 2411.12537); default False.
        output_gate: multiply the output by `silu(W_g x)`; default True.
        norm_eps: epsilon of the output's norm; default 1e-5; Qwen3-Next has 1e-6.
        chunk_size: tokens per tile of the chunked form; changes speed, not the function. Default
            64.

    State: `H K V` memory scalars and `(conv_size - 1)(2 G K + H V)` of the convolution.

    Where we differ: the paper's model has K = 256, 0.75 D key features and V = 2K; ours are set by
    `head_dim` and `expand_v`. The decay rates start stratified (see `StepGate`). One convolution
    runs over the concatenated q, k and v, which is the same function as three.

    Raises:
        ValueError: heads that do not divide the width, or key heads that do not divide the heads.
    """

    silu = True

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        key_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        output_gate: bool = True,
        norm_eps: float = NORM_EPS,
        chunk_size: int = 64,
    ) -> None:
        key_dim = head_size(d_model, heads) if head_dim is None else head_dim
        groups = heads if key_heads is None else key_heads
        require_at_least(1, key_heads=groups)
        if heads % groups:
            raise ValueError(f"key_heads ({groups}) must divide heads ({heads})")
        super().__init__(
            d_model,
            heads=heads,
            groups=groups,
            key_dim=key_dim,
            value_dim=scaled_width(key_dim, expand_v),
            gates=2 * heads,
            conv_size=conv_size,
            norm_eps=norm_eps,
            output_gate=output_gate,
        )
        self.chunk_size = chunk_size
        self.max_beta = 2.0 if negative_eigenvalues else 1.0
        self.decay = StepGate(heads, rates=RATES)

    def features(
        self, x: Float[Tensor, "b t g k"], positions: Tensor | None
    ) -> Float[Tensor, "b t g k"]:
        """Divided by their norm."""
        return l2_norm(x)

    def gates(self, raw: Float[Tensor, "b t n"]) -> dict[str, Tensor]:
        """`log_decay` and `beta`, `[B, T, H]` each."""
        decay, beta = raw.chunk(2, dim=-1)
        beta = self.max_beta * at_least_fp32(beta).sigmoid()
        return {"log_decay": self.decay(decay)[0], "beta": beta}

    def rule(self, operands: Operands, memory: Tensor) -> tuple[Tensor, Any]:
        """Each token decays the memory, corrects what its key reads, and reads with its query."""
        q, k, v, g, beta = operands
        assert g is not None
        assert beta is not None
        if self.groups != self.heads:
            q, k = (
                repeat(t, "b t g k -> b t (g n) k", n=self.heads // self.groups) for t in (q, k)
            )
        return gated_delta(q, k, v, g, beta, memory, chunk_size=self.chunk_size)
