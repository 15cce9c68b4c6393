"""Causal softmax attention, one query at a time: the specification.

Shapes: B batch, T queries, S keys, H query heads, Hkv key heads, D key width, Dv value width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing


@accepts_nothing("q", "k", "v")
def attention_naive(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S Hkv D"],
    v: Float[Tensor, "B S Hkv Dv"],
    *,
    window: int | None = None,
    prefix: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "B T H Dv"]:
    """Average the values a query may see, weighted by softmax(scale * q k^T).

    The keys are `prefix` persistent ones, which every query sees, then the sequence, whose last T
    positions are those of the queries. A query sees itself and what came before it, back to
    `window` positions in all. Query head h reads key head h // (H / Hkv).

    Args:
        q: Queries of the last T positions.
        k: Keys of the prefix, the past and the last T positions, in this order.
        v: Values, as the keys.
        window: Positions a query sees, itself included; all earlier ones when None.
        prefix: Number of persistent keys.
        scale: Factor on the scores; D ** -0.5 when None.

    Returns:
        The averages, in the dtype of `v`; arithmetic is in fp32, fp64 for fp64 inputs.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(v.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.to(dtype).repeat_interleave(groups, 2) for x in (k, v))
    index, past = torch.arange(k.shape[1], device=k.device), k.shape[1] - q.shape[1]
    out = []
    for position, q_t in enumerate(q.to(dtype).unbind(1), start=past):
        hidden = index > position
        if window is not None:
            hidden |= (index >= prefix) & (index <= position - window)
        scores = scale * torch.einsum("bhd,bshd->bhs", q_t, keys)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("bhs,bshv->bhv", weights, values))
    return torch.stack(out, 1).to(v.dtype)
