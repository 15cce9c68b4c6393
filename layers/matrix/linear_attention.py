"""Linear attention: a matrix memory that adds every token and forgets none."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.layers.matrix.matrix_memory import MatrixMemory, Operands, head_size, read_matrix
from mneme.layers.parts.norm import NORM_EPS
from mneme.layers.registry import register
from mneme.ops.contract import without_autocast
from mneme.ops.linear_attention import linear_attention
from mneme.ops.scalar_decay import scalar_decay

TAYLOR_KEY = 16  # of "Based": the features grow with its square
EPS = 1e-6  # beside the sum of weights, for a memory that holds nothing


@register(
    elu={"heads": 2, "conv_size": 4},
    identity={"heads": 1, "feature_map": "identity", "conv_size": 4, "output_gate": True},
    taylor={"heads": 2, "feature_map": "taylor", "key_dim": 3, "conv_size": 4, "chunk_size": 4},
)
class LinearAttention(MatrixMemory):
    """Linear attention (arXiv 2006.16236), also with the feature map of "Based" (arXiv 2402.18668).

    Per head, `S_t = S_{t-1} + phi(k_t) v_t^T` and `z_t = z_{t-1} + phi(k_t)`, then

        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    for the maps `elu(x) + 1` and "taylor", whose inner product is `1 + s + s^2 / 2` with
    `s = q . k / sqrt(K)`, the exponential to second order. The identity has no z, as its inner
    products have either sign: `o_t = RMSNorm(S_t^T q_t / sqrt(K))` per head.

    Args:
        d_model: width D.
        heads: H; default 4.
        head_dim: width V of a head's values; default D / H.
        key_dim: width K of a head's queries and keys before the map; default 16 for "taylor", as in
            "Based", and V for the others.
        feature_map: "elu" (default), "identity" or "taylor".
        conv_size: taps of a short convolution over q, k and v; default 1, none, as in the papers.
            Without one, here or in a layer before, a key cannot be shifted onto its value.
        output_gate: multiply the output by `silu(W_g x)`; default False.
        chunk_size: tokens per tile of the chunked form; changes speed, not the function. Default
            64.

    State: with F features, `H F V` memory scalars, `H F` of z, and the convolution's tail. F is K,
    or `1 + K + K (K + 1) / 2` for "taylor".

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        key_dim: int | None = None,
        feature_map: Literal["elu", "identity", "taylor"] = "elu",
        conv_size: int = 1,
        output_gate: bool = False,
        chunk_size: int = 64,
    ) -> None:
        value_dim = head_size(d_model, heads) if head_dim is None else head_dim
        default_key = TAYLOR_KEY if feature_map == "taylor" else value_dim
        self.feature_map: Literal["elu", "identity", "taylor"] = feature_map
        self.normalized = feature_map != "identity"
        super().__init__(
            d_model,
            heads=heads,
            key_dim=default_key if key_dim is None else key_dim,
            value_dim=value_dim,
            conv_size=conv_size,
            norm_eps=NORM_EPS if feature_map == "identity" else None,
            output_gate=output_gate,
        )
        self.chunk_size = chunk_size

    @property
    def feature_dim(self) -> int:
        """Width F of a key's features."""
        return taylor_size(self.key_dim) if self.feature_map == "taylor" else self.key_dim

    def features(
        self, x: Float[Tensor, "b t g k"], positions: Tensor | None
    ) -> Float[Tensor, "b t g f"]:
        """The layer's feature map of each query or key."""
        if self.feature_map == "identity":
            return x
        return elu_map(x) if self.feature_map == "elu" else taylor_map(x)

    def rule(self, operands: Operands, memory: Any) -> tuple[Tensor, Any]:
        """Linear attention, with z or without."""
        q, k, v, *_ = operands
        if not self.normalized:
            return scalar_decay(q, k, v, None, memory, chunk_size=self.chunk_size)
        return linear_attention(q, k, v, memory, eps=EPS, chunk_size=self.chunk_size)

    def read(self, q: Float[Tensor, "b t g f"], memory: Any) -> Float[Tensor, "b t h v"]:
        """Every query against the same memory."""
        return read_normalized(q, *memory) if self.normalized else read_matrix(q, memory)

    def empty(self, batch_size: int) -> Any:
        """Zeros: S, or S and z."""
        memory = super().empty(batch_size)
        return (memory, memory.new_zeros(memory.shape[:-1])) if self.normalized else memory


@without_autocast
def read_normalized(
    q: Float[Tensor, "b t h f"], memory: Float[Tensor, "b h f v"], total: Float[Tensor, "b h f"]
) -> Float[Tensor, "b t h v"]:
    """Every query against the same memory, over its inner product with the sum of the keys."""
    weight = torch.einsum("bthf,bhf->bth", q.to(total.dtype), total)
    return read_matrix(q, memory, scale=1.0) / (weight + EPS)[..., None]


def elu_map(x: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
    """`elu(x) + 1`, above zero (arXiv 2006.16236), without the rounding to zero of that sum."""
    return x.clamp(max=0).exp() + x.relu()


def taylor_map(x: Float[Tensor, "... k"]) -> Float[Tensor, "... f"]:
    """The exponential to second order: `phi(q) . phi(k) = 1 + s + s^2 / 2`, `s = q . k / sqrt(K)`.

    The features of "Based" (arXiv 2402.18668): one, the elements, and the products of two, each
    pair once; `taylor_size` counts them.
    """
    x = x * x.shape[-1] ** -0.25
    pairs = [x[..., i : i + 1] * x[..., i + 1 :] for i in range(x.shape[-1] - 1)]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() * 0.5**0.5, *pairs], dim=-1)


def taylor_size(width: int) -> int:
    """Features that `taylor_map` makes of K elements: `1 + K + K (K + 1) / 2`."""
    return 1 + width + width * (width + 1) // 2
