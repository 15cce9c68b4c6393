"""The gated delta rule, one token at a time: the specification of every other form.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing, without_autocast


@accepts_nothing("q", "k", "v", "g", "beta")
@without_autocast
def gated_delta_naive(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None,
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Read a matrix memory that decays, then corrects what it stores under each new key.

    With a_t = exp(g_t), the recurrence of Gated DeltaNet (arXiv 2412.06464, written for
    a state whose rows are keys) is

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    y_t = scale * S_t^T q_t.

    Decay comes first: the correction v_t - a_t S_{t-1}^T k_t is made against the decayed state.

    Args:
        q: Queries.
        k: Keys. Nothing is normalized here; with b_t in [0, 2] the state is stable for |k_t| = 1.
        v: Values.
        g: Natural logarithm of the decay, at most 0; None for no decay.
        beta: Strength of each write; 0 leaves the decayed state alone, 1 replaces what was stored.
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
    g = torch.zeros_like(beta) if g is None else g
    s, out = state.to(dtype), []
    for q_t, k_t, v_t, g_t, b_t in zip(
        *(x.to(dtype).unbind(1) for x in (q, k, v, g, beta)), strict=True
    ):
        s = s * g_t.exp()[..., None, None]
        error = v_t - torch.einsum("bhkv,bhk->bhv", s, k_t)
        s = s + torch.einsum("bhk,bhv->bhkv", b_t[..., None] * k_t, error)
        out.append(scale * torch.einsum("bhkv,bhk->bhv", s, q_t))
    return (torch.stack(out, 1) if out else v).to(v.dtype), s
