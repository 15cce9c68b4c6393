"""Any recall task with its sequence read twice, of which only the second reading is answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mneme.tasks.base import IGNORE, Batch, Facts, Task
from mneme.tasks.recall.base import RecallTask


@dataclass(kw_only=True, eq=False)
class ReadTwice(RecallTask):
    """Context, question, context, question: the prompt of "Just read twice" (arXiv 2407.05483).

    A recurrence that knows the question when it reads the context need only keep what is asked for.
    A score of this is for twice as many tokens as the task itself has; compare it with a single
    reading of the same total length.

    Args:
        task: what is read; its batches, levels and seed are this one's.
    """

    level = "level"  # whatever is the task's

    task: RecallTask
    seq_len: int = field(init=False)
    vocab_size: int = field(init=False)
    batch_size: int = field(init=False)
    test_examples: int = field(init=False)
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        """Takes over what the task has checked."""
        task = self.task
        Task.__init__(
            self,
            vocab_size=task.vocab_size,
            seq_len=2 * task.seq_len,
            batch_size=task.batch_size,
            seed=task.seed,
        )
        self.name, self.test_examples = f"{task.name}_twice", task.test_examples
        self.train_levels, self.test_levels = task.train_levels, task.test_levels

    def check(self, level: int) -> None:
        """The task has checked its levels."""

    @property
    def chance_level(self) -> float:
        """That of the task."""
        return self.task.chance_level

    def facts(self) -> Facts:
        """Those of the task, and what is this one's."""
        return self.task.facts() | Task.facts(self)

    def train_batch(self, index: int) -> Batch:
        """The task's training batch, read twice."""
        return twice(self.task.train_batch(index))

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of one level from `rng` alone."""
        return twice(self.task.make(rng, n, level))

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The task's: lengths and places are those of one reading."""
        return self.task.slice_values()


def twice(batch: Batch) -> Batch:
    """The same sequences two times, `[B, 2T]`, with the targets and slices of the second."""
    unscored = torch.full_like(batch.targets, IGNORE)
    slices = {
        name: torch.cat([values, values], dim=1) if values.dim() == 2 else values
        for name, values in batch.slices.items()
    }
    inputs = torch.cat([batch.inputs, batch.inputs], dim=1)
    return batch._replace(
        inputs=inputs, targets=torch.cat([unscored, batch.targets], dim=1), slices=slices
    )
