"""Gated linear attention: a matrix memory whose key channels each forget at their own rate."""

from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.matrix.matrix_memory import MatrixMemory, Operands, head_size
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.registry import register
from mneme.ops.diagonal_decay import diagonal_decay
from mneme.ops.options import scaled_width

RANK = 16  # of the map from a token to its decays
TEMPERATURE = 16.0  # root taken of a gate, so that at the start half-lives are near 16 tokens


@register(
    default={"heads": 2},
    convolved={"heads": 1, "head_dim": 4, "expand_v": 1.0, "conv_size": 4, "chunk_size": 4},
    bare={"heads": 2, "output_gate": False},
)
class GatedLinearAttention(MatrixMemory):
    """Gated linear attention, GLA (arXiv 2312.06635).

    Per head, `S_t = diag(a_t) S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, with

    * q, k, v: projections, without feature map;
    * decay of each key channel `log a_t = logsigmoid(W_2 W_1 x_t + b) / 16`, through rank 16;
    * output: RMSNorm per head, times `silu(W_g x_t)`, then the output projection.

    Args:
        d_model: width D.
        heads: H; default 4.
        head_dim: key size K of a head; default D / 2H.
        expand_v: value size over key size, V / K; default 2.
        conv_size: taps of a short convolution over q, k and v; default 1, none, as in the paper.
        output_gate: multiply the output by `silu(W_g x)`; default True.
        chunk_size: tokens per tile of the chunked form, a power of two; changes speed, not the
            function. Default 32.

    State: `H K V` memory scalars, and the convolution's tail.

    Where we differ: projections start as linear layers of PyTorch do, the first release's from a
    narrower distribution. In a mixture of memories, each has its own W_1; W_2 and b are shared.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        conv_size: int = 1,
        output_gate: bool = True,
        chunk_size: int = 32,
    ) -> None:
        key_dim = head_size(d_model, heads) // 2 if head_dim is None else head_dim
        super().__init__(
            d_model,
            heads=heads,
            key_dim=key_dim,
            value_dim=scaled_width(key_dim, expand_v),
            gates=RANK,
            conv_size=conv_size,
            output_gate=output_gate,
        )
        self.chunk_size = chunk_size
        self.decay_proj = nn.Linear(RANK, heads * key_dim)

    def gates(self, raw: Float[Tensor, "b t n"]) -> dict[str, Tensor]:
        """`log_decay` of each key channel, `[B, T, H, K]`."""
        logits = at_least_fp32(self.decay_proj(raw))
        decay = F.logsigmoid(logits) / TEMPERATURE
        return {"log_decay": rearrange(decay, "b t (h k) -> b t h k", h=self.heads)}

    def rule(self, operands: Operands, memory: Tensor) -> tuple[Tensor, Any]:
        """Linear attention with a decay per key channel."""
        q, k, v, g, *_ = operands
        assert g is not None
        return diagonal_decay(q, k, v, g, memory, chunk_size=self.chunk_size)
