"""What the tasks of MAD share: their training set, and what training asks for.

MAD is "Mechanistic Design and Scaling of Hybrid Architectures" (arXiv 2403.17844). B examples,
L length, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from mneme.tasks.base import Batch, Facts
from mneme.tasks.batch import select
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.sampling import Ints


@dataclass(kw_only=True, eq=False)
class MadTask(RecallTask):
    """What the tasks of MAD share: one length, and a fixed set of training examples.

    Args:
        train_examples: training goes over so many examples again and again, in another order each
            time; None makes new ones without end. Default 12,800; changes of the suite: 6400, 3200,
            1600 and 800.
        batch_size: examples in a batch; default 128.
        test_examples: examples in each of the validation and the test set; default 1280.
    """

    level = "seq_len"
    test_seq_len: ClassVar[None] = None
    trains_on_all: ClassVar[bool] = False  # every next token, as in the recall tasks

    train_examples: int | None = 12_800
    batch_size: int = 128
    test_examples: int = 1280

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        if self.train_examples is not None and self.train_examples < self.batch_size:
            raise ValueError(
                f"train_examples ({self.train_examples}) must be at least batch_size "
                f"({self.batch_size})"
            )

    def train_set(self, rng: np.random.Generator, n: int) -> Batch:
        """Makes `n` examples to train on, from `rng` alone; by default as those of tests."""
        return self.make(rng, n, self.seq_len)

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
        """What to record with a run, so that its results can be read later."""
        found = super().facts()
        return found | {
            "train_examples": "new" if self.train_examples is None else self.train_examples
        }

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The one length."""
        return {"length": [self.seq_len]}


def with_length(inputs: Ints, targets: Ints) -> Batch:
    """A batch whose one slice is its length."""
    slices = {"length": torch.full((len(inputs),), inputs.shape[1])}
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)
