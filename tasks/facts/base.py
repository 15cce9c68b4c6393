"""What tasks of facts have in common: who is told of how often, and that it is counted.

S subjects, N draws, F facts, O objects.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mneme.tasks.base import EvalSplit, Facts, Task
from mneme.tasks.facts.metrics import Exposures
from mneme.tasks.recall.sampling import Ints

# Random streams of their own, beside those of `mneme.tasks.base.STREAMS`.
WORLD_STREAM, ORDER_STREAM, DOCUMENT_STREAM, ROUTE_STREAM = (3, 0), (3, 1), (3, 2), (3, 3)


@dataclass(frozen=True)
class Zipf:
    """Subjects of rank i = 1 ... S are drawn with probability proportional to (i + i0) ** -a.

    Attributes:
        subjects: S.
        power: a; 0 makes all subjects equally frequent; default 1.
        offset: i0, above -1; the larger, the less the first subjects stand out; default 0.

    Raises:
        ValueError: the offset is too low.
    """

    subjects: int
    power: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        """Checks the range."""
        if not self.offset > -1:
            raise ValueError(
                f"offset ({self.offset}) must be above -1, as it is added to ranks from 1"
            )

    @cached_property
    def odds(self) -> NDArray[np.float64]:
        """`[S]`: how likely a draw is of the subject of each rank."""
        ranks = np.arange(1, self.subjects + 1, dtype=np.float64)
        weights = (ranks + self.offset) ** -self.power
        return weights / weights.sum()

    def draw(self, rng: np.random.Generator, count: int) -> Ints:
        """Draws N = `count` subjects, `[N]` in `[0, S)`; 0 is the subject of rank 1."""
        return np.searchsorted(self._cumulated, rng.random(count), side="right")

    @cached_property
    def _cumulated(self) -> NDArray[np.float64]:
        """`[S]`, the sums of `odds` up to each subject; the last is exactly 1."""
        sums = self.odds.cumsum()
        return sums / sums[-1]


class FactTask(Task):
    """Facts to be learnt by heart, told as often as chance has it, and asked for once each.

    Which facts are told is a function of the seed and the number of batches, so exposures are
    counted exactly, by drawing the batches again. They are those of the whole run in every
    validation on the way, so that a curve is about the same facts throughout.

    Args:
        zipf: how subjects are drawn.
        objects: O, at least 2.
        counted_batches: exposures are counted over so many training batches. A run has
            `trainer.max_steps` of them, times `trainer.accumulate_grad_batches` and the number of
            processes; another number is refused when training starts.
        vocab_size: as in `Task`.
        seq_len: as in `Task`.
        batch_size: as in `Task`.
        seed: as in `Task`.
    """

    def __init__(
        self,
        *,
        zipf: Zipf,
        objects: int,
        counted_batches: int,
        vocab_size: int,
        seq_len: int,
        batch_size: int,
        seed: int,
    ) -> None:
        require_at_least_one(subjects=zipf.subjects, counted_batches=counted_batches)
        if objects < 2:
            raise ValueError(f"objects ({objects}) must be at least 2, or there is nothing to know")
        super().__init__(vocab_size=vocab_size, seq_len=seq_len, batch_size=batch_size, seed=seed)
        self.zipf = zipf
        self.objects = objects
        self.counted_batches = counted_batches

    def setup(self, stage: str) -> None:
        """Called by a trainer before it starts.

        Raises:
            ValueError: exposures are counted over other batches than it will draw.
        """
        super().setup(stage)
        trainer = self.trainer
        if stage != "fit" or trainer is None or trainer.max_steps < 0:
            return
        drawn = trainer.max_steps * trainer.accumulate_grad_batches * trainer.world_size
        if drawn != self.counted_batches:
            raise ValueError(
                f"exposures are counted over {self.counted_batches} training batches, but the run "
                f"draws {drawn}: {trainer.max_steps} (max_steps) * "
                f"{trainer.accumulate_grad_batches} (accumulate_grad_batches) * "
                f"{trainer.world_size} (processes); set task.counted_batches={drawn}"
            )

    @abstractmethod
    def draw(self, index: int) -> Ints:
        """The facts that training batch `index` tells, `[N]`."""

    @property
    @abstractmethod
    def exposures(self) -> Exposures:
        """How training tells each fact, counted over `counted_batches`."""

    def count_exposures(self, facts: int) -> Ints:
        """`[F]`: how many times training tells each of `facts` facts."""
        exposures = np.zeros(facts, dtype=np.int64)
        for index in range(self.counted_batches):
            np.add.at(exposures, self.draw(index), 1)
        return exposures

    def order(self, facts: int) -> Ints:
        """`[F]`: the order in which evaluation asks, random, so that its first part is a sample."""
        return stream(self.seed, ORDER_STREAM).permutation(facts)

    @property
    def chance_level(self) -> float:
        """Accuracy of guessing among all objects."""
        return 1 / self.objects

    @property
    def dictionary_level(self) -> float:
        """Accuracy of knowing all that was told and guessing the rest."""
        shown = float((self.exposures.times > 0).double().mean())
        return shown + (1 - shown) * self.chance_level

    def baselines(self, split: EvalSplit) -> dict[str, float]:
        """What `monitor` is for solvers that anyone can name, to hold a model's score against."""
        return super().baselines(split) | {"a dictionary of what was told": self.dictionary_level}

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        count = len(self.exposures.times)
        return super().facts() | {
            "dictionary_level": self.dictionary_level,
            "facts": count,
            "facts_exposed": int((self.exposures.times > 0).sum()),
            "bits_per_fact": math.log2(self.objects),
            "bits": count * math.log2(self.objects),
            "subjects": self.zipf.subjects,
            "objects": self.objects,
            "power": self.zipf.power,
            "offset": self.zipf.offset,
            "counted_batches": self.counted_batches,
        }


def stream(seed: int, key: tuple[int, int]) -> np.random.Generator:
    """A random stream that depends on the seed of a task and on a key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def require_at_least_one(**counts: int) -> None:
    """Raises ValueError for a count below one, with its name."""
    for label, count in counts.items():
        if count < 1:
            raise ValueError(f"{label} ({count}) must be at least 1")
