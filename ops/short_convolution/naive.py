"""The causal depthwise convolution, one token at a time: the specification.

Shapes: B batch, T time, D channels, W width of the filter.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import accepts_nothing


@accepts_nothing("x")
def short_convolution_naive(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    state: Float[Tensor, "B W-1 D"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B W-1 D"]]:
    """Filter each channel over its last W tokens: y_t = sum_j weight[:, j] * x_{t - W + 1 + j}.

    The last column of `weight` multiplies the current token; there is no bias and no activation.

    Args:
        x: Inputs.
        weight: One filter a channel, oldest tap first.
        state: The W - 1 inputs before the first one, oldest first; zeros when None.

    Returns:
        The filtered inputs in the dtype of `x` (summed in fp32 or more), and the last W - 1 inputs,
        some of them from `state` if T < W - 1.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, width - 1, channels)
    history = torch.cat((state, x), 1)
    exact = torch.promote_types(x.dtype, torch.float32)
    out = [(history[:, t : t + width].to(exact) * weight.T.to(exact)).sum(1) for t in range(tokens)]
    return torch.stack(out, 1).to(x.dtype), history[:, tokens:]
