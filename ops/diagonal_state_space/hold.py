"""Zero-order hold: from a continuous diagonal system to one step of a recurrence.

Shapes: D channels, M modes of a channel. Complex arguments are real tensors with a last axis of 2.
"""

import torch
from torch import Tensor


def zero_order_hold(A: Tensor, B: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Discretize h' = A h + B x, with x held during each step.

    The new state is exp(step A) h + (exp(step A) - 1) / A * B x. At ordinary steps the exponential
    is close to 1; the difference is therefore computed without forming it, or fp32 would lose
    about half of its digits.

    Args:
        A: Rates [D, M, 2], not 0.
        B: Writes [D, M, 2].
        step: Lengths of the steps [D].

    Returns:
        step A, the logarithm of the decay, and (exp(step A) - 1) / A * B; both complex, [D, M].
    """
    rate, write = torch.view_as_complex(A), torch.view_as_complex(B)
    log = step[:, None] * rate
    # exp(a + ib) - 1 = (exp(a) - 1) cos(b) - 2 sin(b / 2)^2 + i exp(a) sin(b)
    real = log.real.expm1() * log.imag.cos() - 2 * (log.imag / 2).sin().square()
    growth = torch.complex(real, log.real.exp() * log.imag.sin())
    return log, growth / rate * write
