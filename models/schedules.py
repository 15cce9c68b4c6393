"""Learning-rate schedules: a multiplier of the peak rate as a function of the step.

Each is a frozen value without state, so resuming needs nothing but the step.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule(ABC):
    """A linear warm-up followed by a decay that the subclass defines.

    Attributes:
        warmup: share of the run spent rising linearly from 0 to the peak; default 0.05.
    """

    warmup: float = 0.05

    def __post_init__(self) -> None:
        """Checks the shares."""
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the run, from 0 to 1; got {self.warmup}")

    def __call__(self, step: int, total: int) -> float:
        """The multiplier for the update number `step` (from 0) of `total`."""
        warmup_steps = round(self.warmup * total)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return self.after_warmup(min(1.0, (step - warmup_steps) / max(1, total - warmup_steps)))

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """The multiplier at `progress` in [0, 1] of what follows the warm-up."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak rate until the end."""

    def after_warmup(self, progress: float) -> float:
        """Always 1."""
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak down to `floor` of it (arXiv 1608.03983, without restarts)."""

    floor: float = 0.0

    def __post_init__(self) -> None:
        """Checks the shares."""
        super().__post_init__()
        _check_floor(self.floor)

    def after_warmup(self, progress: float) -> float:
        """Falls from 1 to the floor."""
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (arXiv 2404.06395): the peak rate, then linearly down to `floor`.

    Attributes:
        decay: share of what follows the warm-up that is spent decaying; default 0.2.
        floor: share of the peak at the end; default 0.
    """

    decay: float = 0.2
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Checks the shares."""
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a share of the run, above 0 up to 1; got {self.decay}")
        _check_floor(self.floor)

    def after_warmup(self, progress: float) -> float:
        """1 until the decay begins."""
        return min(1.0, self.floor + (1 - self.floor) * (1 - progress) / self.decay)


def _check_floor(floor: float) -> None:
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is a share of the peak, from 0 to 1; got {floor}")
