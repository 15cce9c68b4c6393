"""Inner objectives: what a memory is asked to reduce, as the derivative at its output.

An objective gives the error `e = dl/dy` of a prediction y = f(k) against a value v; everything
behind it, the gradient of the weights, belongs to the memory. Losses are sums over the features of
a value, without a mean, so a step size means the same in any width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mneme.ops.test_time.choices import require_one_of

_TINY = 1e-6  # inside square roots, so that the outer gradient survives at zero
_SHARPNESS = 10.0  # slope of the smooth sign at zero


@dataclass(frozen=True)
class SquaredError:
    """`1/2 |f(k) - v|^2`.

    Titans' main text has no 1/2: the same update takes half the step there.
    """

    needs_delta = False

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """`f(k) - v`."""
        return prediction - value


@dataclass(frozen=True)
class DotProduct:
    """`-f(k) . v`. It has no minimum: it needs forgetting or a normalized memory."""

    needs_delta = False

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """`-v`, whatever the prediction."""
        return -value.expand_as(prediction)


@dataclass(frozen=True)
class LpError:
    """`sum |f(k) - v|^p`, smoothed: the objective of Moneta (arXiv 2504.13173).

    The derivative `p sign(r) |r|^(p-1)` is taken with `sign(r) = tanh(10 r)` and
    `|r| = sqrt(r^2 + 1e-6)`, so that it can be differentiated again at zero.

    Args:
        p: the exponent, at least 1; default 3, the paper's.
    """

    p: float = 3.0
    needs_delta = False

    def __post_init__(self) -> None:
        """Checks the exponent."""
        if self.p < 1:
            raise ValueError(f"p must be 1 or more, got {self.p}")

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """The smoothed derivative."""
        r = prediction - value
        size = (r * r + _TINY) ** ((self.p - 1) / 2)
        return self.p * _smooth_sign(r) * size


@dataclass(frozen=True)
class Huber:
    """Squared error up to a norm delta, then linear: the objective of Yaad (arXiv 2504.13173).

    The paper's update takes the gradient of the squared error where `|r| <= delta` (r the residual
    of a token) and delta times that of the l1 error elsewhere, `delta sign(r)`,
    here with `sign(r) = tanh(10 r)`: with a jump at zero, rounding decides updates. The other form
    scales the residual to norm delta instead, which is the gradient of the norm's Huber loss and a
    clip of each token's error.

    Args:
        form: "sign", the paper's (default), or "clip".
    """

    form: Literal["sign", "clip"] = "sign"
    needs_delta = True

    def __post_init__(self) -> None:
        """Checks the form."""
        require_one_of(("sign", "clip"), form=self.form)

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """The residual, limited; `delta` is `[..., 1]`, one positive number a token."""
        assert delta is not None
        r = prediction - value
        square = (r * r).sum(-1, keepdim=True)
        if self.form == "clip":
            return r * (delta * (square + _TINY**2).rsqrt()).clamp(max=1.0)
        return torch.where(square <= delta * delta, r, delta * _smooth_sign(r))


def _smooth_sign(r: Tensor) -> Tensor:
    return torch.tanh(_SHARPNESS * r)


Objective = SquaredError | DotProduct | LpError | Huber
