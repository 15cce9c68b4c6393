"""The diagonal state space, one token at a time: the specification of every other form.

Shapes: B batch, T time, D channels, M modes of a channel. Complex numbers come as real tensors with
a last axis of 2, real part first.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing, without_autocast
from mneme.ops.diagonal_state_space.hold import zero_order_hold


@accepts_nothing("x")
@without_autocast
def diagonal_state_space_naive(
    x: Float[Tensor, "B T D"],
    A: Float[Tensor, "D M 2"],
    B: Float[Tensor, "D M 2"],
    C: Float[Tensor, "D M 2"],
    step: Float[Tensor, "D"],
    state: Float[Tensor, "B D M 2"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D M 2"]]:
    """Filter each channel through M damped oscillators, the same at every token.

    S4D (arXiv 2206.11893) with zero-order hold. For a channel and its mode n,

        h_t = exp(step A_n) h_{t-1} + (exp(step A_n) - 1) / A_n * B_n x_t,
        y_t = 2 Re sum_n C_n h_t.

    The modes stand for conjugate pairs, of which one is stored: M is half the paper's state size N.
    The skip D x belongs to the layer.

    Args:
        x: Inputs.
        A: Rates, real part below 0.
        B: What an input writes to each mode.
        C: What is read of it.
        step: Length of each channel's step, above 0.
        state: Modes before the first token, fp32 (fp64 for fp64 inputs); zeros when None.

    Returns:
        The reads, in the dtype of `x`, and the modes after the last token, in fp32 (fp64 for fp64
        inputs). Arithmetic is done in the dtype of the modes.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
    log, write = zero_order_hold(*(v.to(dtype) for v in (A, B, step)))
    decay, read = log.exp(), 2 * torch.view_as_complex(C.to(dtype))
    h, out = torch.view_as_complex(state.to(dtype)), []
    for x_t in x.to(dtype).unbind(1):
        h = decay * h + write * x_t[..., None]
        out.append((read * h).sum(-1).real)
    return torch.stack(out, 1).to(x.dtype), torch.view_as_real(h)
