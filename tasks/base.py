"""What a task is: data that can be drawn again, and the yardstick for the answers.

A task keeps no random state. Training batch `i` is a pure function of the task's seed and `i`,
so a resumed run, or a run on another number of workers, needs no saved data order; validation
and test sets are the same in every epoch and in every run with that seed.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from mneme.tasks.batch import IGNORE, Batch, BatchSet, deal
from mneme.tasks.metrics import Metrics

__all__ = ["IGNORE", "Batch", "BatchSet", "EvalSplit", "Facts", "Task"]

EvalSplit = Literal["val", "test"]
Facts = dict[str, float | int | str]

# The first half of a random stream's spawn key. Two keys that differ anywhere give independent
# streams (numpy.random.SeedSequence), so no split can draw another split's examples by index.
STREAMS = {"train": 0, "val": 1, "test": 2}


class Codec(Protocol):
    """From text to token ids and back: a tokenizer, or a list of words."""

    @property
    def end_of_document(self) -> int | None:
        """The id that ends a document and stands for no text, if there is one."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could be given other ids."""
        ...

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text, `[T]`. Raises ValueError for what has none."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for; U+FFFD for bytes that are no text together."""
        ...


class Training(Protocol):
    """What a task has to know of the run that reads its batches; Lightning's Trainer is one.

    Attributes:
        global_step: optimizer steps already taken.
        max_steps: those of the whole run, or -1.
        accumulate_grad_batches: batches in a step of one process.
        world_size: processes that train together.
        global_rank: which of them this is.
    """

    @property
    def global_step(self) -> int: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def accumulate_grad_batches(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def global_rank(self) -> int: ...


class Task(ABC):
    """Training batches without end, two fixed evaluation sets, and how answers are scored.

    `mneme.harness.run.data.TaskData` hands one to Lightning's Trainer.

    Attributes:
        trainer: the run that reads batches, for their order; None reads all of them from the first.
        name: short name for tables and run directories.
        monitor: the metric that tells two models apart, a key of `metrics().compute()`; default
            accuracy.
        monitor_mode: whether a larger (`"max"`, default) or a smaller (`"min"`) value is better.
        continues: whether each evaluation batch continues the sequences of the one before, so
            that a model's state may be carried over; if not, examples are independent.
        leaves: routes of batches are below this number, that of a memory bank's leaves; None if
            batches have no routes.

    Args:
        vocab_size: token ids are in `[0, vocab_size)`.
        seq_len: the longest sequence of training, and of evaluation at its own length.
        batch_size: examples in a training batch.
        seed: all randomness of the data follows from it; in `[0, 2**32)`.
    """

    name: str
    monitor: str = "accuracy"
    monitor_mode: Literal["min", "max"] = "max"
    continues: bool = False
    leaves: int | None = None
    trainer: Training | None = None

    def __init__(self, *, vocab_size: int, seq_len: int, batch_size: int, seed: int) -> None:
        for label, value in {"vocab_size": vocab_size, "seq_len": seq_len}.items():
            if value < 2:
                raise ValueError(f"{label} ({value}) must be at least 2")
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed ({seed}) must be in [0, 2**32)")
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed

    def prepare_data(self) -> None:  # noqa: B027
        """Fills caches, if there are any; called in one process of each machine."""

    def setup(self, stage: str) -> None:  # noqa: B027
        """Called in every process before it reads batches.

        Args:
            stage: "fit", "validate" or "test".

        Raises:
            ValueError: the data do not suffice, or do not go with the run.
        """

    @property
    @abstractmethod
    def chance_level(self) -> float:
        """The expected value of `monitor` for a guesser that has learnt no more than counts."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """A fresh accumulator."""

    @abstractmethod
    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed and the index."""

    @abstractmethod
    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """The fixed batches of `"val"` or `"test"`; may be iterated any number of times."""

    @property
    def vocabulary(self) -> str:
        """What the token ids mean: a model reads a task only if it was trained on the same."""
        return "symbols"

    def save_tokenizer(self, folder: Path) -> None:  # noqa: B027
        """Puts into a run's folder what other text needs to be given the same ids, if anything."""

    def load_tokenizer(self, folder: Path) -> Codec | None:
        """From text to ids and back, as `save_tokenizer` left it in a run's folder.

        None where tokens are symbols that stand for no text. Needs neither corpus nor cache.

        Raises:
            ValueError: it is missing or damaged.
        """
        return None

    @property
    def router(self) -> str | None:
        """The hash of the router whose routes training batches have; None if no router made them.

        A memory bank is only of use under the routes that it was trained with.
        """
        return None

    def baselines(self, split: EvalSplit) -> dict[str, float]:
        """What `monitor` is for solvers that anyone can name, to hold a model's score against."""
        return {"guessing": self.chance_level}

    @property
    def remark(self) -> str:
        """What a reader of the scores has to know, in one line; often nothing."""
        return ""

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return {
            "task": self.name,
            "vocab_size": self.vocab_size,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "data_seed": self.seed,
            "chance_level": self.chance_level,
        }

    def rng(self, split: str, index: int) -> np.random.Generator:
        """The random stream of one batch, independent of every other stream of the task.

        Args:
            split: `"train"`, `"val"` or `"test"`.
            index: which batch (training) or which part of the fixed set (evaluation).
        """
        key = (STREAMS[split], index)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def train_indices(self) -> Iterator[int]:
        """Which training batches this process reads from now on.

        The optimizer steps already taken, which a checkpoint restores, say how many batches are
        behind us. This holds for a run with one optimizer, as Lightning counts the steps of all,
        whose length is set by `max_steps` rather than by epochs, at whose ends Lightning takes a
        step on however few batches it has accumulated.
        """
        trainer = self.trainer
        if trainer is None:
            return itertools.count()
        rounds = trainer.global_step * trainer.accumulate_grad_batches
        return itertools.count(
            rounds * trainer.world_size + trainer.global_rank, trainer.world_size
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches without end, from where training stands each time it is iterated."""
        return _loader(_TrainStream(self))

    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the validation set."""
        return _loader(_EvalStream(self, "val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the test set."""
        return _loader(_EvalStream(self, "test"))


class _TrainStream(IterableDataset[Batch]):
    """The training batches of a task, from where its trainer stands when iteration starts."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[Batch]:
        # Asked for here rather than when the loader is built: an epoch of limited length
        # iterates the same loader again, further on in training.
        return map(self.task.train_batch, self.task.train_indices())


class _EvalStream(IterableDataset[Batch]):
    """This rank's share of a fixed evaluation set."""

    def __init__(self, task: Task, split: EvalSplit) -> None:
        self.task = task
        self.split = split

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.task.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return deal(self.task.eval_batches(self.split), rank, world_size)


def _loader(stream: IterableDataset[Batch]) -> DataLoader[Batch]:
    """Wraps a stream whose items are whole batches.

    The loader draws a base seed whenever it is iterated: with a generator of its own, evaluating
    in the middle of a run leaves torch's global random state, and so the run, untouched. Batches
    are made in the training process (no workers): they take milliseconds, and need no copying.
    """
    return DataLoader(
        stream, batch_size=None, num_workers=0, generator=torch.Generator(), collate_fn=_as_is
    )


def _as_is(batch: Any) -> Any:
    return batch


def as_list(values: int | Iterable[int]) -> list[int]:
    """One integer, or several in any iterable, as a list."""
    return [values] if isinstance(values, int) else [int(value) for value in values]
