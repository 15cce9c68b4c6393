"""Maps applied where chunks meet: inside a chunk everything is linear in the updates.

A `project` map replaces the weights themselves (`settle`). A `mirror` map leaves the accumulator as
it is and gives the weights that stand for it (`view`).

Shapes: weights of one layer are `[M, in, out]`, one matrix per memory.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

_TINY = 1e-6

Orthogonal = bool | Literal["scheduled"]


@dataclass(frozen=True)
class Boundary:
    """No map: the base of the others."""

    linear_inside = True  # whether a token may read the weights of its own place in the chunk
    spread: ClassVar[float | None] = (
        None  # standard deviation of initial accumulators, if not by fan-in
    )

    def settle(self, weights: Tensor, norms: Tensor | None) -> Tensor:
        """The weights with which the next chunk starts."""
        return weights

    def view(self, weights: Tensor) -> Tensor:
        """The weights that an accumulator stands for, at a chunk's start."""
        return weights

    def scale(self, weights: Tensor) -> Tensor | None:
        """What turns accumulators inside a chunk into weights, from that at its start."""
        return None

    def start(self, weights: Tensor) -> Tensor:
        """The accumulator with which to start from initial weights."""
        return weights


@dataclass(frozen=True)
class RowNorm(Boundary):
    """Gives every output unit the norm of its initial weights: LaCT (arXiv 2505.23884)."""

    def settle(self, weights: Tensor, norms: Tensor | None) -> Tensor:
        """Rescales the weights into each unit to `norms` `[M, 1, out]`."""
        assert norms is not None
        square = (weights * weights).sum(-2, keepdim=True)
        return weights * (norms * (square + _TINY**2).rsqrt())


@dataclass(frozen=True)
class UnitSlots(Boundary):
    """Gives every row norm one: the slots of Lattice (arXiv 2504.05646)."""

    def settle(self, weights: Tensor, norms: Tensor | None) -> Tensor:
        """Rescales each row."""
        return torch.nn.functional.normalize(weights, dim=-1)

    def start(self, weights: Tensor) -> Tensor:
        """Slots begin on the sphere."""
        return self.settle(weights, None)


@dataclass(frozen=True)
class LqNorm(Boundary):
    """`W = A / |A|_q^(q-2)`, one norm per matrix: Moneta (arXiv 2504.13173).

    The norm is a mean, `|A|_q = mean(|a|^q)^(1/q)`, where the paper's is a sum. That is the same
    rule in another unit of A and of the steps, one in which A and W are of one size and a step
    means what it means without the map. Inside a chunk the norm is that of the accumulator at its
    start, so that reads stay linear.

    Args:
        q: above 2 and not 3, at which the norm of W would always be one; default 4.
    """

    q: float = 4.0

    def __post_init__(self) -> None:
        """Checks the exponent."""
        if self.q <= 2 or self.q == 3:
            raise ValueError(f"q must be above 2 and not 3, got {self.q}")

    def scale(self, weights: Tensor) -> Tensor:
        """`|A|_q^(2-q)`, `[M, 1, 1]`."""
        power = (weights.abs() ** self.q).mean((-2, -1), keepdim=True)
        return (power + _TINY) ** ((2 - self.q) / self.q)

    def view(self, weights: Tensor) -> Tensor:
        """The weights."""
        return weights * self.scale(weights)

    def start(self, weights: Tensor) -> Tensor:
        """`W |W|_q^((q-2)/(3-q))`."""
        power = (weights.abs() ** self.q).mean((-2, -1), keepdim=True)
        return weights * (power + _TINY) ** ((self.q - 2) / (3 - self.q) / self.q)


@dataclass(frozen=True)
class Softmax(Boundary):
    """`W = c softmax(A)` over the inputs of each unit: Memora (arXiv 2504.13173).

    A is the logarithm of the weights up to a constant per unit, which the softmax ignores; so
    decaying and adding to A is the paper's update of W, for any number of tokens. Initial weights
    are taken for A. The weights of a token inside a chunk are not linear in A, so reads are of the
    chunk's start.

    Args:
        scale_of_unit: c, the sum of a unit's weights; default 1.
    """

    scale_of_unit: float = 1.0
    linear_inside = False
    spread = 2.0  # units of nearly equal weights would give outputs without variance

    def view(self, weights: Tensor) -> Tensor:
        """Positive weights that sum to c for each unit."""
        return self.scale_of_unit * weights.softmax(-2)


MUON = ((3.4445, -4.7750, 2.0315),) * 5
SCHEDULED = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(update: Tensor, orthogonal: Orthogonal = True) -> Tensor:
    """Pushes the singular values of `[..., in, out]` towards one: the step of Muon.

    Five steps of the quintic iteration `x <- a x + (b x x^T + c (x x^T)^2) x`, on the matrix scaled
    to Frobenius norm one. Zero stays zero.

    Args:
        update: the matrices.
        orthogonal: True: Muon's coefficients, the same in each step, which bring singular values
            from 0.01 on to 0.68 to 1.13; "scheduled": coefficients for each step, as in LaCT's code
            for language (arXiv 2505.23884), which bring them to 0.98 to 1.03.
    """
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    square = (x * x).sum((-2, -1), keepdim=True)
    x = x * (square + _TINY**4).rsqrt()
    for a, b, c in SCHEDULED if orthogonal == "scheduled" else MUON:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
