"""Normalized linear attention in chunks, on the matrix memory without decay.

A column of ones beside the values makes z a column of the state, and the sum of the weights a
column of the reads. A prefix is one product into the first state.

Shapes: B batch, T time, M tokens of the prefix, H heads, F features, V value width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import carries, uncompiled, without_autocast
from mneme.ops.linear_attention.naive import Prefix, State, linear_attention_naive
from mneme.ops.scalar_decay.chunk import check_chunk_size, scalar_decay_chunk

_RECURRENT_UP_TO = 2  # tokens; one step costs a few small products, a chunk some thirty calls


@without_autocast
def with_prefix(
    k: Float[Tensor, "B M H F"], v: Float[Tensor, "B M H V"], state: State | None
) -> State:
    """S and z after the keys and values of a prefix are written."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    s = torch.einsum("bmhf,bmhv->bhfv", k.to(dtype), v.to(dtype))
    z = k.sum(1, dtype=dtype)
    return (s, z) if state is None else (s + state[0], z + state[1])


def _widened(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [B, T, H, V] with a column of ones."""
    return torch.cat((v.to(dtype), v.new_ones(*v.shape[:-1], 1, dtype=dtype)), -1)


@uncompiled
@without_autocast
def linear_attention_chunk(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T H F"],
    v: Float[Tensor, "B T H V"],
    state: State | None = None,
    *,
    prefix: Prefix | None = None,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Compute `linear_attention_naive` in chunks, where almost all arithmetic is matrix products.

    Time is linear in T and M. The gradient cannot be differentiated again. Compiled callers see one
    opaque call (a graph break).

    Args:
        q: Features of the queries; none may be negative if the division is to be safe.
        k: Features of the keys; likewise.
        v: Values.
        state: S and z before prefix and first token, fp32 (fp64 for fp64 inputs); zeros when None.
        prefix: Features of the keys, and values, written before the first token; none when None.
        eps: Added to the sum of weights, which is 0 for a query or for keys without features.
        chunk_size: Tokens a chunk. Changes cost, not the function.

    Returns:
        The averages, in the dtype of `v`, and S and z after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the state.

    Raises:
        ValueError: If `chunk_size` is less than 1.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    if prefix is not None:
        state = with_prefix(*prefix, state)
    start = None if state is None else torch.cat((state[0], state[1][..., None]), -1).to(dtype)
    sums, end = scalar_decay_chunk(
        q, k, _widened(v, dtype), None, start, scale=1.0, chunk_size=chunk_size
    )
    y = sums[..., :-1] / (sums[..., -1:] + eps)
    return y.to(v.dtype), (end[..., :-1].contiguous(), end[..., -1].contiguous())


@carries("q", "k", "v")
def linear_attention(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T H F"],
    v: Float[Tensor, "B T H V"],
    state: State | None = None,
    *,
    prefix: Prefix | None = None,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Compute normalized linear attention in the form that is cheapest for the length given.

    One or two tokens (decoding) go through `linear_attention_naive`, after the prefix, more through
    `linear_attention_chunk`; both compute the same function, to rounding. Arguments and results are
    those of the chunked form; a chunk is never longer than the sequence.
    """
    check_chunk_size(chunk_size)
    if prefix is not None:
        state = with_prefix(*prefix, state)
    tokens = k.shape[1]
    if tokens <= _RECURRENT_UP_TO:
        return linear_attention_naive(q, k, v, state, eps=eps)
    return linear_attention_chunk(q, k, v, state, eps=eps, chunk_size=min(chunk_size, tokens))
