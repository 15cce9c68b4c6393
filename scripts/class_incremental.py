"""Learns classes a few at a time, and shows what is left of the first ones when the last are known.

Features of a frozen encoder come in splits of two classes that never return. A discrete key-value
bottleneck, whose keys were placed on features of other classes, learns them by its values alone; a
linear head and a small MLP learn the same features in the same order. Each is also trained on all
classes at once, which is what it could know if it forgot nothing.
"""

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.harness.cli import report_errors
from mneme.layers import DiscreteKeyValueBottleneck, TableOptions
from mneme.tasks.streams import ClassIncremental, Labeled
from scripts.reporting.measured import mean_and_spread, measured, parsed, publish

CODEBOOKS, KEYS, KEY_DIM = 64, 256, 4
HIDDEN = 128  # of the MLP, as in the paper
BATCH, KEY_BATCH, KEY_EPOCHS = 128, 1000, 3
VALUE_LR = 0.3 * CODEBOOKS  # a value's gradient is that of the mean: one CODEBOOKS-th
HEAD_LR = 3e-3


@dataclass(frozen=True)
class StreamSizes:
    """How much data a run sees.

    Attributes:
        unlabelled: features of other classes, on which keys are placed.
        split: labeled examples of each split.
        test: labeled examples of all classes.
        epochs: over each split, and over all of them in joint training.
    """

    unlabelled: int = 10_000
    split: int = 1_000
    test: int = 5_000
    epochs: int = 10


@dataclass(frozen=True)
class Classifier:
    """A model that learns the classes of a stream, and its optimizer.

    Attributes:
        logits: from features `[N, D]` to `[N, classes]`.
        optimizer: of the parameters that training may change.
        memory: the bottleneck, for the share of its keys that are in use; None for a head.
    """

    logits: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    memory: DiscreteKeyValueBottleneck | None = None


@dataclass(frozen=True)
class Outcome:
    """Accuracies on test features, each among all classes.

    Attributes:
        learnt: on the classes of each split, right after it.
        kept: on the same, after the last split.
        final: on all classes, after the last split.
        joint: on all classes, when trained on all at once.
        unused: share of keys that no training example is nearest to; NaN without keys.
    """

    learnt: list[float]
    kept: list[float]
    final: float
    joint: float
    unused: float

    @property
    def drop(self) -> float:
        """Points that the splits before the last have lost, on average."""
        return 100 * (statistics.mean(self.learnt[:-1]) - statistics.mean(self.kept[:-1]))


def bottleneck(
    stream: ClassIncremental, sizes: StreamSizes, generator: torch.Generator
) -> Classifier:
    """A memory whose keys lie where features of other classes are, and whose values are zero."""
    memory = DiscreteKeyValueBottleneck(
        stream.features,
        codebooks=CODEBOOKS,
        keys=KEYS,
        key_dim=KEY_DIM,
        value_dim=stream.classes,
        table=TableOptions(update="dense"),
    )
    features = stream.unlabelled(sizes.unlabelled)
    for _ in range(KEY_EPOCHS):
        for batch in _batches(len(features), KEY_BATCH, generator):
            memory.update_keys(features[batch], generator=generator)
    optimizer = torch.optim.SGD(memory.values.parameters(), VALUE_LR)
    return Classifier(memory.read, optimizer, memory)


def linear(stream: ClassIncremental, sizes: StreamSizes, generator: torch.Generator) -> Classifier:
    """A linear head."""
    return _head(nn.Linear(stream.features, stream.classes))


def mlp(stream: ClassIncremental, sizes: StreamSizes, generator: torch.Generator) -> Classifier:
    """A head with one hidden layer."""
    into = nn.Linear(stream.features, HIDDEN)
    return _head(nn.Sequential(into, nn.ReLU(), nn.Linear(HIDDEN, stream.classes)))


CLASSIFIERS = {"key-value bottleneck": bottleneck, "linear head": linear, "MLP": mlp}


def learn(name: str, seed: int, sizes: StreamSizes) -> Outcome:
    """One of `CLASSIFIERS` on one stream: split by split, and anew on all splits at once."""
    stream = ClassIncremental(seed=seed)
    splits = [stream.split(i, sizes.split) for i in range(stream.splits)]
    test = stream.test(sizes.test)

    def accuracy(classifier: Classifier, classes: range) -> float:
        among = (test.labels >= classes.start) & (test.labels < classes.stop)
        with torch.no_grad():
            predicted = classifier.logits(test.features[among]).argmax(-1)
        return float((predicted == test.labels[among]).double().mean())

    classifier, generator = _start(name, stream, seed, sizes)
    learnt = []
    for i, split in enumerate(splits):
        _train(classifier, split, sizes.epochs, generator)
        learnt.append(accuracy(classifier, stream.classes_of(i)))
    together = Labeled(*(torch.cat(parts) for parts in zip(*splits, strict=True)))
    other, generator = _start(name, stream, seed, sizes)
    _train(other, together, sizes.epochs, generator)
    return Outcome(
        learnt=learnt,
        kept=[accuracy(classifier, stream.classes_of(i)) for i in range(stream.splits)],
        final=accuracy(classifier, range(stream.classes)),
        joint=accuracy(other, range(stream.classes)),
        unused=_unused(classifier, together.features),
    )


def run(arguments: Sequence[str]) -> None:
    """Trains, and prints the table or puts it into a file."""
    options = parsed(arguments, script="class_incremental.py", description=__doc__, name="dkvb")
    sizes = StreamSizes()
    rows = [
        _row(name, [learn(name, seed, sizes) for seed in options.seeds]) for name in CLASSIFIERS
    ]
    remarks = [
        "Accuracies are among all ten classes. Learnt: of the first four splits, each right after "
        "its training; at the end: of the same after the fifth; drop: the difference in points.",
        f"Each split has {sizes.split:,} examples and is seen for {sizes.epochs} epochs; so are "
        "all of them together in joint training.",
        f"{CODEBOOKS} codebooks of {KEYS} keys of width {KEY_DIM}, placed by {KEY_EPOCHS} epochs "
        f"over {sizes.unlabelled:,} features of other classes. Unused: percent of keys that no "
        "training example is nearest to.",
    ]
    publish(measured(rows, remarks, options.seeds), options)


def _start(
    name: str, stream: ClassIncremental, seed: int, sizes: StreamSizes
) -> tuple[Classifier, torch.Generator]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return CLASSIFIERS[name](stream, sizes, generator), generator


def _head(head: nn.Module) -> Classifier:
    return Classifier(head, torch.optim.Adam(head.parameters(), HEAD_LR))


def _train(classifier: Classifier, data: Labeled, epochs: int, generator: torch.Generator) -> None:
    for _ in range(epochs):
        for batch in _batches(len(data.labels), BATCH, generator):
            classifier.optimizer.zero_grad()
            F.cross_entropy(classifier.logits(data.features[batch]), data.labels[batch]).backward()
            classifier.optimizer.step()


def _batches(examples: int, size: int, generator: torch.Generator) -> Iterable[Tensor]:
    return torch.randperm(examples, generator=generator).split(size)


def _unused(classifier: Classifier, features: Tensor) -> float:
    if classifier.memory is None:
        return float("nan")
    codes = classifier.memory.codes(features)
    used = torch.zeros(CODEBOOKS, KEYS).scatter(1, codes.T, 1.0)
    return 1 - float(used.mean())


def _row(name: str, runs: Sequence[Outcome]) -> dict[str, str]:
    def cell(of: Callable[[Outcome], float], digits: int = 3) -> str:
        return mean_and_spread([of(run) for run in runs], digits)

    has_keys = name == "key-value bottleneck"
    return {
        "learner": name,
        "all classes": cell(lambda run: run.final),
        "learnt": cell(lambda run: statistics.mean(run.learnt[:-1])),
        "at the end": cell(lambda run: statistics.mean(run.kept[:-1])),
        "drop": cell(lambda run: run.drop, 1),
        "trained jointly": cell(lambda run: run.joint),
        "unused keys, %": cell(lambda run: 100 * run.unused, 1) if has_keys else "",
    }


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
