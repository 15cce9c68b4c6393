"""Normalized linear attention, one token at a time: the specification of every other form.

Shapes: B batch, T time, M tokens of the prefix, H heads, F features, V value width.
"""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import in_graph_of, without_autocast

State: TypeAlias = tuple[Float[Tensor, "B H F V"], Float[Tensor, "B H F"]]
Prefix: TypeAlias = tuple[Float[Tensor, "B M H F"], Float[Tensor, "B M H V"]]


@without_autocast
def linear_attention_naive(
    q: Float[Tensor, "B T H F"],
    k: Float[Tensor, "B T H F"],
    v: Float[Tensor, "B T H V"],
    state: State | None = None,
    *,
    prefix: Prefix | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Average all values so far, weighted by the inner products of query and key features.

    The recurrence of linear attention (arXiv 2006.16236), for queries and keys that a feature map
    has already been applied to, is

        S_t = S_{t-1} + k_t v_t^T,    z_t = z_{t-1} + k_t,    y_t = S_t^T q_t / (z_t . q_t + eps).

    A prefix is written as a whole before the first token, so that every query sees all of it. With
    keys and values that an encoder makes of the first M tokens, this is the prefix linear attention
    of JRT-RNN (arXiv 2407.05483).

    Args:
        q: Features of the queries; none may be negative if the division is to be safe.
        k: Features of the keys; likewise.
        v: Values.
        state: S and z before prefix and first token, fp32 (fp64 for fp64 inputs); zeros when None.
        prefix: Features of the keys, and values, written before the first token; none when None.
        eps: Added to the sum of weights, which is 0 for a query or for keys without features.

    Returns:
        The averages, in the dtype of `v`, and S and z after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the state.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    if state is None:
        batch, _, heads, features = k.shape
        z = v.new_zeros(batch, heads, features, dtype=dtype)
        state = z.new_zeros(*z.shape, v.shape[-1]), z
    s, z = (x.to(dtype) for x in state)
    for k_t, v_t in zip(*(x.to(dtype).unbind(1) for x in prefix or ()), strict=True):
        s, z = s + torch.einsum("bhf,bhv->bhfv", k_t, v_t), z + k_t
    out = []
    for q_t, k_t, v_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v)), strict=True):
        s, z = s + torch.einsum("bhf,bhv->bhfv", k_t, v_t), z + k_t
        weight = torch.einsum("bhf,bhf->bh", z, q_t)[..., None]
        out.append(torch.einsum("bhfv,bhf->bhv", s, q_t) / (weight + eps))
    y = torch.stack(out, 1).to(v.dtype) if out else in_graph_of(v, q, k, s, z)
    return y, (s, z)
