"""DeltaNet: a matrix memory that corrects what it already holds under a key."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from mneme.layers.matrix.matrix_memory import MatrixMemory, Operands, head_size
from mneme.layers.parts.norm import l2_norm
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.registry import register
from mneme.ops.delta import delta
from mneme.ops.options import scaled_width


@register(
    default={"heads": 2},
    wide_values={"heads": 2, "head_dim": 4, "expand_v": 2.0, "output_gate": True, "chunk_size": 4},
    negative_eigenvalues={"heads": 1, "conv_size": 1, "negative_eigenvalues": True},
)
class DeltaNet(MatrixMemory):
    """The delta rule of "Parallelizing Linear Transformers with the Delta Rule" (arXiv 2406.06484).

    Per head, `S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T`, `o_t = S_t^T q_t / sqrt(K)`, with

    * q, k, v: projection, short causal convolution, SiLU; `l2_norm` of q and k;
    * beta `b_t = sigmoid(w_b . x_t)`;
    * output: RMSNorm per head, then the output projection.

    Nothing is forgotten except by writing something else under the same key.

    Args:
        d_model: width D.
        heads: H; default 4.
        head_dim: key size K of a head; default D / H.
        expand_v: value size over key size, V / K; default 1.
        conv_size: taps of the short convolution; default 4; 1 for none.
        negative_eigenvalues: doubles b, so that a write can flip the sign of what a key holds
            (arXiv 2411.12537); default False.
        output_gate: multiply the output by `silu(W_g x)`; default False.
        chunk_size: tokens per tile of the chunked form; changes speed, not the function. Default
            64.

    State: `H K V` memory scalars and `(conv_size - 1)(2 H K + H V)` of the convolution.

    Where we differ: the paper's heads have 128 keys and values; ours are set by `heads`. One
    convolution runs over the concatenated q, k and v, which is the same function as three.

    Raises:
        ValueError: heads that do not divide the width.
    """

    silu = True

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        output_gate: bool = False,
        chunk_size: int = 64,
    ) -> None:
        key_dim = head_size(d_model, heads) if head_dim is None else head_dim
        super().__init__(
            d_model,
            heads=heads,
            key_dim=key_dim,
            value_dim=scaled_width(key_dim, expand_v),
            gates=heads,
            conv_size=conv_size,
            output_gate=output_gate,
        )
        self.chunk_size = chunk_size
        self.max_beta = 2.0 if negative_eigenvalues else 1.0

    def features(
        self, x: Float[Tensor, "b t g k"], positions: Tensor | None
    ) -> Float[Tensor, "b t g k"]:
        """Divided by their norm."""
        return l2_norm(x)

    def gates(self, raw: Float[Tensor, "b t n"]) -> dict[str, Tensor]:
        """Beta, the learning rate of a write."""
        return {"beta": self.max_beta * at_least_fp32(raw).sigmoid()}

    def rule(self, operands: Operands, memory: Tensor) -> tuple[Tensor, Any]:
        """Each token corrects what its key reads, then reads with its query."""
        assert operands.beta is not None
        return delta(*operands[:3], operands.beta, memory, chunk_size=self.chunk_size)
