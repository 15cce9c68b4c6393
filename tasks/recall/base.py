"""What recall tasks have in common: examples come from a generator, by level of difficulty."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import Batch, BatchSet, EvalSplit, Task
from mneme.tasks.batch import cut
from mneme.tasks.metrics import Metrics, RecallMetrics


class RecallTask(Task):
    """A generator of examples at integer levels of difficulty.

    A training batch holds one level, drawn from the training levels; the validation and test
    sets hold the same number of examples of every test level, and do not depend on the batch
    size. Training data are made as they are needed and never repeat, so nothing can be learnt
    by heart.

    Args:
        vocab_size: token ids are in `[0, vocab_size)`.
        seq_len: length of every sequence.
        batch_size: examples in a batch.
        seed: all randomness of the data follows from it.
        train_levels: levels that training batches are drawn from, equally often.
        test_levels: levels of the validation and test sets.
        test_examples: examples per level, in each of the two sets.
    """

    monitor = "accuracy"
    monitor_mode: Literal["min", "max"] = "max"

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_len: int,
        batch_size: int,
        seed: int,
        train_levels: Sequence[int],
        test_levels: Sequence[int],
        test_examples: int,
    ) -> None:
        super().__init__(vocab_size=vocab_size, seq_len=seq_len, batch_size=batch_size, seed=seed)
        if not train_levels or not test_levels:
            raise ValueError(
                f"a recall task needs at least one level to train on (got {list(train_levels)}) "
                f"and one to test on (got {list(test_levels)})"
            )
        if test_examples < 1:
            raise ValueError(f"test_examples ({test_examples}) must be at least 1")
        self.train_levels = list(train_levels)
        self.test_levels = list(test_levels)
        self.test_examples = test_examples

    @abstractmethod
    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of one level from `rng` alone."""

    @abstractmethod
    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""

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

    def rows(self, index: int, examples: int) -> Tensor:
        """Which of a fixed set of examples training batch `index` has, for tasks that have one.

        Every pass over the set is in a new order, and leaves out what does not fill a batch. The
        set itself is for `rng("train", 0)` to make.
        """
        epoch, place = divmod(index, examples // self.batch_size)
        order = self.rng("train", 1 + epoch).permutation(examples)
        return torch.from_numpy(order[place * self.batch_size : (place + 1) * self.batch_size])

    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """The fixed examples of `split`, level after level."""

        def levels() -> Iterator[Batch]:
            for index, level in enumerate(self.test_levels):
                yield from self.fixed_set(self.rng(split, index), level)

        return BatchSet(levels)
