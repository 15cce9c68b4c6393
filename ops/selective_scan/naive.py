"""The selective scan, one token at a time: the specification of every other form.

Shapes: B batch, T time, D channels, N states of a channel.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing, without_autocast


@accepts_nothing("x", "step", "B", "C")
@without_autocast
def selective_scan_naive(
    x: Float[Tensor, "B T D"],
    step: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B D N"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D N"]]:
    """Filter each channel through N decaying states whose step, write and read the tokens choose.

    The recurrence S6 of Mamba (arXiv 2312.00752, algorithm 2), for channel d and state n:

        h_t = exp(step_td A_dn) h_{t-1} + step_td B_tn x_td,    y_td = sum_n C_tn h_t.

    As in the authors' code, A is discretized by zero-order hold and B by Euler's rule. The skip
    D x of the paper belongs to the layer.

    Args:
        x: Inputs.
        step: Length of each token's step, at least 0; 0 leaves the states alone.
        A: Rate of each state, below 0.
        B: What a token writes to the states of every channel.
        C: What it reads of them.
        state: States before the first token, fp32 (fp64 for fp64 inputs); zeros when None.

    Returns:
        The reads, in the dtype of `x`, and the states after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the states.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
    h, rate, out = state.to(dtype), A.to(dtype), []
    tokens = zip(*(v.to(dtype).unbind(1) for v in (x, step, B, C)), strict=True)
    for x_t, step_t, b_t, c_t in tokens:
        h = h * (step_t[..., None] * rate).exp() + (step_t * x_t)[..., None] * b_t[:, None]
        out.append(torch.einsum("bdn,bn->bd", h, c_t))
    return torch.stack(out, 1).to(x.dtype), h
