"""The delta rule in chunks: the chunked gated delta rule with its decay left out.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries
from mneme.ops.delta.naive import delta_naive
from mneme.ops.gated_delta import RECURRENT_UP_TO, check_chunk_size, gated_delta, gated_delta_chunk


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


@carries("q", "k", "v", "beta")
def delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Compute the delta rule in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `delta_naive`, more through the chunked form; both
    compute the same function, to rounding. Arguments and results are those of `delta_chunk`.
    """
    check_chunk_size(chunk_size)
    if k.shape[1] <= RECURRENT_UP_TO:
        return delta_naive(q, k, v, beta, state, scale=scale)
    return gated_delta(q, k, v, None, beta, state, scale=scale, chunk_size=chunk_size)
