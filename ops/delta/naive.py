"""The delta rule, one token at a time: the specification of every other form.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing, without_autocast


@accepts_nothing("q", "k", "v", "beta")
@without_autocast
def delta_naive(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Read a matrix memory that corrects what it stores under each new key and keeps the rest.

    The recurrence of DeltaNet (arXiv 2406.06484, after arXiv 2102.11174), for a state whose rows
    are keys, is

        S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T,    y_t = scale * S_t^T q_t.

    Args:
        q: Queries.
        k: Keys. Nothing is normalized here; with b_t in [0, 2] the state is stable for |k_t| = 1.
        v: Values.
        beta: Strength of each write; 0 leaves the state alone, 1 replaces what was stored, 2
            reflects it.
        state: State before the first token, fp32 (fp64 for fp64 inputs); zeros when None.
        scale: Factor on the read; K ** -0.5 when None.

    Returns:
        The reads, in the dtype of `v`, and the state after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the state.
    """
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, _, heads, width = k.shape
    if state is None:
        state = v.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype)
    s, out = state.to(dtype), []
    for q_t, k_t, v_t, b_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v, beta)), strict=True):
        error = v_t - torch.einsum("bhkv,bhk->bhv", s, k_t)
        s = s + torch.einsum("bhk,bhv->bhkv", b_t[..., None] * k_t, error)
        out.append(scale * torch.einsum("bhkv,bhk->bhv", s, q_t))
    return (torch.stack(out, 1) if out else v).to(v.dtype), s
