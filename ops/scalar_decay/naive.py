"""A matrix memory with one decay per head, one token at a time: the specification of every form.

Shapes: B batch, T time, H heads, G groups of heads, K key width, V value width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing, without_autocast


def heads_per_group(groups: int, heads: int) -> int:
    """How many heads share one query and key; ValueError where they cannot be shared evenly."""
    if groups < 1 or heads % groups:
        raise ValueError(
            f"q and k have {groups} heads and v has {heads}; the heads of q and k must divide "
            "those of v, so that each is shared by the same number of them"
        )
    return heads // groups


@accepts_nothing("q", "k", "v", "g")
@without_autocast
def scalar_decay_naive(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Add each write to a matrix memory that decays by one factor per head, then read it.

    With a_t = exp(g_t), the recurrence is

        S_t = a_t S_{t-1} + k_t v_t^T,    y_t = scale * S_t^T q_t.

    Without g it is linear attention without a normalizer (arXiv 2006.16236); with a constant g per
    head, RetNet (arXiv 2307.08621); with q = C, k = B, v = dt x and g = dt A, Mamba-2 (arXiv
    2405.21060), where the heads of a group share q and k. Head h reads and writes with q and k of
    group h // (H / G).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        g: Natural logarithm of the decay, at most 0; nothing decays when None.
        state: State before the first token, fp32 (fp64 for fp64 inputs); zeros when None.
        scale: Factor on the read; K ** -0.5 when None.

    Returns:
        The reads, in the dtype of `v`, and the state after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the state.

    Raises:
        ValueError: If G does not divide H.
    """
    batch, tokens, groups, width = k.shape
    heads = v.shape[2]
    shared = heads_per_group(groups, heads)
    scale = width**-0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is None:
        state = v.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    q, k = (x.to(dtype).repeat_interleave(shared, 2) for x in (q, k))
    s, out = state.to(dtype), []
    for t in range(tokens):
        if g is not None:
            s = s * g[:, t].to(dtype).exp()[..., None, None]
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t].to(dtype))
        out.append(scale * torch.einsum("bhkv,bhk->bhv", s, q[:, t]))
    return (torch.stack(out, 1) if out else v).to(v.dtype), s
