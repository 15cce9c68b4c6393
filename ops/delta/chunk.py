"""The delta rule in chunks: the chunked gated delta rule with its decay left out.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from jaxtyping import Float
from torch import Tensor

from mneme.ops.gated_delta import gated_delta_chunk


def delta_chunk(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute `delta_naive` in chunks, where almost all arithmetic is matrix products.

    Time, memory and the limits of the gradient are those of `gated_delta_chunk`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        beta: Strength of each write.
        state: State before the first token, fp32 (fp64 for fp64 inputs); zeros when None.
        scale: Factor on the read; K ** -0.5 when None.
        chunk_size: Tokens a chunk, a power of two of at least 4. Changes cost, not the function.

    Returns:
        The reads, in the dtype of `v`, and the state after the last token, in fp32 (fp64 for fp64
        inputs).

    Raises:
        ValueError: If `chunk_size` is not a power of two of at least 4.
    """
    return gated_delta_chunk(q, k, v, None, beta, state, scale=scale, chunk_size=chunk_size)
