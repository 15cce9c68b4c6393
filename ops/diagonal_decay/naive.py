"""A memory that forgets channel by channel, one token at a time: the specification of other forms.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing, without_autocast


@accepts_nothing("q", "k", "v", "g")
@without_autocast
def diagonal_decay_naive(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Read a matrix memory whose rows, one per key channel, each decay at their own rate.

    With a_t = exp(g_t), the recurrence of gated linear attention (arXiv 2312.06635) is

        S_t = diag(a_t) S_{t-1} + k_t v_t^T,    y_t = scale * S_t^T q_t.

    A token reads after it has written, and its own write does not decay.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        g: Natural logarithm of the decay of each key channel, at most 0.
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
    for q_t, k_t, v_t, g_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v, g)), strict=True):
        s = s * g_t.exp()[..., None] + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        out.append(scale * torch.einsum("bhkv,bhk->bhv", s, q_t))
    return (torch.stack(out, 1) if out else v).to(v.dtype), s
