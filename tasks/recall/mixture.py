"""One model, several recall tasks: trained on some segments, tested on the same or others."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mneme.tasks.base import Batch, BatchSet, EvalSplit, Facts, Task
from mneme.tasks.metrics import Metrics, RecallMetrics
from mneme.tasks.recall.base import RecallTask


class RecallMixture(Task):
    """Draws each training batch from one of several recall tasks, and tests on all of a list.

    With longer or fuller tasks among `test` than among `train`, this measures extrapolation in
    length and in load. For example, train on lengths 64 and 256 and test on 512 too::

        RecallMixture(
            train=[MQAR(seq_len=64, pairs=4), MQAR(seq_len=256, pairs=16)],
            weights=[5, 1],
            test=[MQAR(seq_len=64, pairs=4), MQAR(seq_len=512, pairs=128)],
        )

    A batch never mixes tasks, so all its sequences have one length. Tasks may differ in kind: a
    slice that only some of them have, such as the depth of a needle, counts their answers alone.
    All randomness comes from the mixture's own seed; the seeds of its parts are not used. Differs
    from the mixture of "Simple linear attention language models balance the recall-throughput
    tradeoff" (https://arxiv.org/abs/2402.18668), whose code goes through the parts in order, easy
    to hard: here they come in random order.

    Args:
        train: tasks to train on, with equal vocabularies; each brings its batch size and levels.
        test: tasks to evaluate, with the same vocabulary; each brings its levels and examples.
        weights: how often each training task is drawn, in any unit; equally by default.
        seed: all randomness of the data follows from it.
    """

    name = "recall_mixture"

    def __init__(
        self,
        *,
        train: Sequence[RecallTask],
        test: Sequence[RecallTask],
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        segments = [*train, *test]
        if not train or not test:
            raise ValueError(
                f"a mixture needs tasks to train on (got {len(train)}) and to test on "
                f"(got {len(test)})"
            )
        vocabularies = sorted({segment.vocab_size for segment in segments})
        if len(vocabularies) > 1:
            raise ValueError(
                f"the tasks of a mixture must share one vocab_size, but have {vocabularies}"
            )
        super().__init__(
            vocab_size=vocabularies[0],
            seq_len=max(segment.seq_len for segment in segments),
            batch_size=max(segment.batch_size for segment in train),
            seed=seed,
        )
        self.train_segments = list(train)
        self.test_segments = list(test)
        self.odds = _odds(weights, len(train))

    @property
    def chance_level(self) -> float:
        """Mean of the chance levels of the test tasks."""
        return sum(task.chance_level for task in self.test_segments) / len(self.test_segments)

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {
            "train_segments": str(
                [_label(task, task.train_levels) for task in self.train_segments]
            ),
            "train_odds": str([round(share, 6) for share in self.odds.tolist()]),
            "test_segments": str([_label(task, task.test_levels) for task in self.test_segments]),
        }

    def metrics(self) -> Metrics:
        """A fresh accumulator."""
        values: dict[str, set[int]] = {}
        for task in self.train_segments + self.test_segments:
            for name, seen in task.slice_values().items():
                values.setdefault(name, set()).update(seen)
        return RecallMetrics({name: sorted(seen) for name, seen in values.items()})

    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed and the index."""
        rng = self.rng("train", index)
        segment = rng.choice(len(self.odds), p=self.odds)
        return self.train_segments[segment].draw(rng)

    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """The fixed examples of `split`, task after task and level after level."""

        def cells() -> Iterator[Batch]:
            for index, (task, level) in enumerate(self._cells()):
                yield from task.fixed_set(self.rng(split, index), level)

        return BatchSet(cells)

    def _cells(self) -> list[tuple[RecallTask, int]]:
        return [(task, level) for task in self.test_segments for level in task.test_levels]


def _odds(weights: Sequence[float] | None, count: int) -> NDArray[np.float64]:
    """Weights that sum to one."""
    odds = np.ones(count) if weights is None else np.array([float(weight) for weight in weights])
    if len(odds) != count:
        raise ValueError(f"{len(odds)} weights do not match {count} training tasks: give {count}")
    if (odds < 0).any() or not odds.sum() > 0:
        raise ValueError(f"weights {odds.tolist()} must not be negative, nor all zero")
    return odds / odds.sum()


def _label(task: RecallTask, levels: Sequence[int]) -> str:
    return f"{task.name} length {task.seq_len} level {', '.join(map(str, levels))}"
