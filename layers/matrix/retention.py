"""Retention: a matrix memory in which each head forgets at a fixed rate."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.layers.matrix.matrix_memory import MatrixMemory, Operands, head_size
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.rotary import rotate
from mneme.layers.registry import register
from mneme.ops.options import scaled_width
from mneme.ops.scalar_decay import scalar_decay


@register(
    default={"heads": 2},
    bare={"heads": 1, "head_dim": 4, "expand_v": 1.0, "output_gate": False},
    convolved={"heads": 2, "conv_size": 4, "chunk_size": 4},
)
class Retention(MatrixMemory):
    """Multi-scale retention of "Retentive Network" (arXiv 2307.08621).

    Per head h = 0 .. H - 1, `S_t = gamma_h S_{t-1} + k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, with

    * q, k: projection and rotation to their positions; v: projection;
    * decay `gamma_h = 1 - 2**(-5 - h)`, not learned: half-lives of 22, 44, 88, ... tokens;
    * output: RMSNorm per head, times `silu(W_g x_t)`, then the output projection.

    Args:
        d_model: width D.
        heads: H; default 4. They also say how far the memory reaches: the slowest head's half-life
            is about 22 * 2**(H - 1) tokens.
        head_dim: key size K of a head, even; default D / H.
        expand_v: value size over key size, V / K; default 2.
        rope_base: base of the rotary wavelengths; default 10000.
        conv_size: taps of a short convolution over q, k and v; default 1, none, as in the paper.
        output_gate: multiply the output by `silu(W_g x)`; default True.
        chunk_size: tokens per tile of the chunked form; changes speed, not the function. Default
            64.

    State: `H K V` memory scalars, one position, and the convolution's tail.

    Where we differ: wavelengths are `rope_base**(2 i / K)`, i < K / 2, where the released code
    spaces them up to `rope_base` itself. The norm has a weight, shared by heads. The released code
    also divides scores by their sums, which the norm cancels.

    Raises:
        ValueError: heads that do not divide the width, or an odd key size.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        rope_base: float = 10_000.0,
        conv_size: int = 1,
        output_gate: bool = True,
        chunk_size: int = 64,
    ) -> None:
        key_dim = head_size(d_model, heads) if head_dim is None else head_dim
        if key_dim % 2:
            raise ValueError(f"rotary positions need an even key size, got {key_dim}")
        super().__init__(
            d_model,
            heads=heads,
            key_dim=key_dim,
            value_dim=scaled_width(key_dim, expand_v),
            conv_size=conv_size,
            output_gate=output_gate,
        )
        self.chunk_size, self.rotary_base = chunk_size, rope_base

    def features(
        self, x: Float[Tensor, "b t g k"], positions: Tensor | None
    ) -> Float[Tensor, "b t g k"]:
        """Queries or keys rotated to their positions."""
        assert positions is not None
        assert self.rotary_base is not None
        return rotate(x, positions=positions, base=self.rotary_base)[0]

    def gates(self, raw: Float[Tensor, "b t n"]) -> dict[str, Tensor]:
        """The same log decays for every token."""
        # made anew at each call: a buffer would be rounded with the parameters of a bf16 model
        head = at_least_fp32(torch.arange(self.heads, device=raw.device, dtype=raw.dtype))
        return {"log_decay": torch.log1p(-(2.0 ** -(5 + head))).expand(*raw.shape[:2], -1)}

    def rule(self, operands: Operands, memory: Tensor) -> tuple[Tensor, Any]:
        """Linear attention with a decay per head."""
        q, k, v, g, *_ = operands
        return scalar_decay(q, k, v, g, memory, chunk_size=self.chunk_size)
