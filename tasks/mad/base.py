"""What the tasks of MAD share: their training set, and what training asks for.

MAD is "Mechanistic Design and Scaling of Hybrid Architectures" (arXiv 2403.17844). B examples,
L length, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from mneme.tasks.base import Batch, Facts
from mneme.tasks.batch import select
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.sampling import Ints


class MadTask(RecallTask):
    """What the tasks of MAD share: one length, and a fixed set of training examples.

    Args:
        vocab_size: V.
        seq_len: L.
        train_examples: training goes over so many examples again and again, in another order each
            time, and leaves out what does not fill a batch; None makes new ones without end.
        batch_size: examples in a batch.
        test_examples: examples in each of the two evaluation sets.
        seed: all randomness of the data follows from it.
    """

    trains_on_all = False  # every next token, as in the recall tasks

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_len: int,
        train_examples: int | None,
        batch_size: int,
        test_examples: int,
        seed: int,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            train_levels=[seq_len],
            test_levels=[seq_len],
            test_examples=test_examples,
        )
        if train_examples is not None and train_examples < batch_size:
            raise ValueError(
                f"train_examples ({train_examples}) must be at least batch_size ({batch_size})"
            )
        self.train_examples = train_examples

    @abstractmethod
    def train_set(self, rng: np.random.Generator, n: int) -> Batch:
        """Makes `n` examples to train on, from `rng` alone."""

    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed and the index."""
        if self.train_examples is None:
            return self._to_train(self.train_set(self.rng("train", index), self.batch_size))
        return self._to_train(select(self._examples, self.rows(index, self.train_examples)))

    @cached_property
    def _examples(self) -> Batch:
        assert self.train_examples is not None, "batches are made as they are needed"
        return self.train_set(self.rng("train", 0), self.train_examples)

    def _to_train(self, batch: Batch) -> Batch:
        if not self.trains_on_all:
            return batch
        following = torch.cat([batch.inputs[:, 1:], batch.targets[:, -1:]], dim=1)
        return batch._replace(targets=following)

    def facts(self) -> Facts:
        """What to record with a run, so that its numbers can be read later."""
        return super().facts() | {
            "train_examples": "new" if self.train_examples is None else self.train_examples,
            "test_examples": self.test_examples,
        }

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The one length."""
        return {"length": [self.seq_len]}


def with_length(inputs: Ints, targets: Ints) -> Batch:
    """A batch whose one slice is its length."""
    slices = {"length": torch.full((len(inputs),), inputs.shape[1])}
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)
