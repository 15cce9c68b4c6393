"""The long convolution, one token at a time: the specification of every other form.

Shapes: B batch, T time, D channels, L taps of a kernel, S earlier inputs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import in_graph_of, without_autocast


@without_autocast
def long_convolution_naive(
    x: Float[Tensor, "B T D"],
    kernel: Float[Tensor, "D L"],
    state: Float[Tensor, "B S D"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S_new D"]]:
    """Convolve each channel with a free kernel over its last L tokens.

    With the inputs in `state` standing before the first token, the causal convolution of "Simple
    Hardware-Efficient Long Convolutions for Sequence Modeling" (arXiv 2302.06646) is

        y_t = sum_{l < L} kernel_l x_{t - l},    x = 0 before the first input.

    Kernel dropout and squashing, and the skip D x, belong to the layer.

    Args:
        x: Inputs.
        kernel: Taps of each channel; the first multiplies the current token.
        state: Up to L - 1 inputs before the first token, oldest first; none when None. Inputs
            before them are zeros.

    Returns:
        The sums and the last L - 1 inputs, or all if there are fewer, in the dtype of `x`.
        Arithmetic is fp32 (fp64 for fp64 inputs).
    """
    tokens, taps = x.shape[1], kernel.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x[:, :0]
    history = torch.cat((state.to(x.dtype), x), 1)
    inputs, newest_last = history.to(dtype), kernel.to(dtype).T.flip(0).contiguous()  # [L, D]
    out = []
    for stop in range(history.shape[1] - tokens + 1, history.shape[1] + 1):
        seen = min(stop, taps)
        out.append((inputs[:, stop - seen : stop] * newest_last[taps - seen :]).sum(1))
    y = torch.stack(out, 1).to(x.dtype) if out else in_graph_of(x, history, kernel)
    return y, history[:, max(0, history.shape[1] - taps + 1) :]
