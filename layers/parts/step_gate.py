"""The gate with which Mamba-2 and Gated DeltaNet forget: a rate per head, a step per token."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.precision import at_least_fp32

STEP_RANGE = (1e-3, 1e-1)  # the step starts log-uniform here, so half-lives spread over decades
NO_LIMIT = (0.0, math.inf)


class StepGate(nn.Module):
    """`step_t = softplus(w_t + dt_bias)` and `log a_t = -exp(A_log) step_t`, per head, in fp32.

    The rates A start stratified, one head from each equal part of a range, because with the two to
    four heads of small models independent draws dominate the variance between seeds. Neither
    parameter is decayed by the optimizer.

    Args:
        heads: H.
        rates: range of A at the start; (0, 16) in Gated DeltaNet's code, (1, 16) in Mamba-2's.
        limit: smallest and largest step; default none.

    Raises:
        ValueError: a limit below zero, or whose ends are out of order.
    """

    def __init__(
        self,
        heads: int,
        *,
        rates: tuple[float, float],
        limit: tuple[float, float] = NO_LIMIT,
    ) -> None:
        super().__init__()
        if not 0 <= limit[0] <= limit[1]:
            raise ValueError(f"step_limit must be (least, largest), 0 or more, got {limit}")
        self.limit = limit
        self.A_log = nn.Parameter(_stratified(heads, *rates).log())
        self.dt_bias = nn.Parameter(inverse_softplus(log_uniform(heads, *STEP_RANGE)))

    def forward(
        self, raw: Float[Tensor, "... h"]
    ) -> tuple[Float[Tensor, "... h"], Float[Tensor, "... h"]]:
        """Log decays and steps from what a linear layer says of each token."""
        step = F.softplus(at_least_fp32(raw) + self.dt_bias)
        if self.limit != NO_LIMIT:
            step = step.clamp(*self.limit)
        return -at_least_fp32(self.A_log).exp() * step, step


def log_uniform(size: int, low: float, high: float) -> Tensor:
    """Draws whose logarithms are uniform."""
    return torch.exp(torch.empty(size).uniform_(math.log(low), math.log(high)))


def inverse_softplus(y: Tensor) -> Tensor:
    """The x with `softplus(x) = y`."""
    return y + torch.log(-torch.expm1(-y))


def _stratified(heads: int, low: float, high: float) -> Tensor:
    """One rate per head, from equal parts of a range, kept off zero."""
    rates = low + (torch.arange(heads) + torch.rand(heads)) * ((high - low) / heads)
    return rates.clamp(min=1e-3)  # log(0) would make a head's decay untrainable
