"""What recall tasks have in common: examples come from a generator, by level of difficulty."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mneme.tasks.base import Batch, BatchSet, EvalSplit, Facts, Task, as_list
from mneme.tasks.batch import cut
from mneme.tasks.metrics import Metrics, RecallMetrics


@dataclass(kw_only=True, eq=False)
class RecallTask(Task):
    """A generator of examples at integer levels of difficulty.

    A training batch holds one level, drawn from the training levels; the validation and test
    sets hold the same number of examples of every test level, and do not depend on the batch
    size. Training data are made as they are needed and never repeat, so nothing can be learnt
    by heart.

    A subclass is a dataclass whose fields are its options. `level` names the one that is the level
    of difficulty: an integer, or a list of them of which each training batch holds one, drawn
    evenly. `test_<level>` lists those to evaluate, at the same length, and is None for the training
    levels.

    Args:
        seq_len: L, length of every sequence.
        vocab_size: V, token ids are in `[0, V)`; half of them are values.
        batch_size: examples in a batch; default 64.
        test_examples: examples per test level, in each of the validation and the test set; default
            1000.
        seed: all randomness of the data follows from it; default 0.

    Raises:
        ValueError: an option is out of range, or a level does not fit the others.
    """

    level: ClassVar[str]

    seq_len: int
    vocab_size: int
    batch_size: int = 64
    test_examples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options, and every level with them."""
        super().__init__(
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        trained, tested = getattr(self, self.level), getattr(self, f"test_{self.level}")
        self.train_levels = as_list(trained)
        self.test_levels = as_list(trained if tested is None else tested)
        if not self.train_levels or not self.test_levels:
            raise ValueError(
                f"a recall task needs at least one level to train on (got {self.train_levels}) "
                f"and one to test on (got {self.test_levels})"
            )
        if self.test_examples < 1:
            raise ValueError(f"test_examples ({self.test_examples}) must be at least 1")
        for level in self.train_levels + self.test_levels:
            self.check(level)

    @abstractmethod
    def check(self, level: int) -> None:
        """Raises `ValueError`, with the arithmetic, if no sequences of a level can be made."""

    @abstractmethod
    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of one level from `rng` alone."""

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        return {
            self.level: sorted({*self.train_levels, *self.test_levels}),
            "length": [self.seq_len],
        }

    @property
    def chance_level(self) -> float:
        """Accuracy of guessing among all V/2 values."""
        return 1 / (self.vocab_size // 2)

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {
            "perfect_level": 1.0,
            f"train_{self.level}": str(self.train_levels),
            f"test_{self.level}": str(self.test_levels),
            "test_examples_per_level": self.test_examples,
        }

    def draw(self, rng: np.random.Generator) -> Batch:
        """One training batch: a level, then examples of it, both from `rng` alone."""
        level = self.train_levels[rng.integers(len(self.train_levels))]
        return self.make(rng, self.batch_size, level)

    def fixed_set(self, rng: np.random.Generator, level: int) -> Iterator[Batch]:
        """The test examples of one level, in batches."""
        return cut(self.make(rng, self.test_examples, level), self.batch_size)

    def metrics(self) -> Metrics:
        """A fresh accumulator."""
        return RecallMetrics(self.slice_values())

    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed and the index."""
        return self.draw(self.rng("train", index))

    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """The fixed examples of `split`, level after level."""

        def levels() -> Iterator[Batch]:
            for index, level in enumerate(self.test_levels):
                yield from self.fixed_set(self.rng(split, index), level)

        return BatchSet(levels)
