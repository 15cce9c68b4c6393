"""Shows when product keys leave most of a table unused: no query norm, LayerNorm, BatchNorm.

A product-key memory alone learns 512 inputs by heart, each with one of 64 classes. Inputs are
isotropic, share a direction (a common mean), or lie near a subspace besides. Every memory learns
its inputs, so accuracy does not reveal the collapse; the use of the rows does. The control is a
dense layer of as many operations, which learns them as well, those near a subspace more slowly.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F

from mneme.harness.cli import report_errors
from mneme.layers import MLP, Layer, ProductKeyMemory, TableOptions, metering
from scripts.reporting.measured import mean_and_spread, measured, parsed, publish

WIDTH, INPUTS, CLASSES = 64, 512, 64
NORMS = ("none", "layer", "batch")
SUB_KEYS, HEADS, TOP_K = 32, 4, 8
HIDDEN = 112  # of the control: 14,336 products, as of the memory's query map, sub-keys and rows
STEPS, LR, TABLE_LR = 400, 3e-3, 1e-2
MEAN = 7.0  # of each channel of the common direction, in standard deviations of the rest
RANK = 8  # of the subspace
INPUT_KINDS = ("isotropic", "common mean", "low rank + mean")
REMARKS = (
    f"Usage and top-1 usage: percent of the {SUB_KEYS**2:,} rows read by any of {INPUTS} inputs, "
    "and read as the best of a head; KL in nats of reads from even.",
    f"{STEPS} steps of Adam on all inputs at once, {LR} for keys, queries and the control, "
    f"{TABLE_LR} for values.",
    f"The control is an MLP {WIDTH} to {HIDDEN} to {CLASSES}, of as many operations.",
)


@dataclass(frozen=True)
class Collapse:
    """How a run used its rows, and what it learned.

    Attributes:
        before: `mneme.layers.sparse.usage.Usage.metrics` at the start.
        after: the same when trained.
        accuracy: on the inputs, when trained.
    """

    before: dict[str, float]
    after: dict[str, float]
    accuracy: float


def inputs(kind: str, generator: torch.Generator) -> Tensor:
    """512 inputs of 64 channels: "isotropic", "common mean" or "low rank + mean"."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "low rank + mean":
        x = normal(INPUTS, RANK) @ normal(RANK, WIDTH) / RANK**0.5 + 0.1 * normal(INPUTS, WIDTH)
    else:
        x = normal(INPUTS, WIDTH)
    return x if kind == "isotropic" else x + MEAN * normal(WIDTH)


def trained(kind: str, norm: str, seed: int, steps: int = STEPS) -> Collapse:
    """Trains a memory on inputs of a kind; `norm` is its query norm, as in `NORMS`."""
    x, y = _examples(kind, seed)
    learner = memory(norm)
    groups = [
        {"params": learner.keys.parameters(), "lr": LR},
        {"params": learner.values.parameters(), "lr": TABLE_LR},
    ]
    before = _use(learner, x)
    accuracy = _fit(learner, torch.optim.Adam(groups), x, y, steps)
    return Collapse(before, _use(learner, x), accuracy)


def trained_control(kind: str, seed: int, steps: int = STEPS) -> float:
    """What a dense layer makes of the same inputs: its accuracy, for it has no rows to use."""
    x, y = _examples(kind, seed)
    learner = control()
    return _fit(learner, torch.optim.Adam(learner.parameters(), LR), x, y, steps)


def memory(norm: str) -> ProductKeyMemory:
    """An untrained memory of `SUB_KEYS` squared rows, whose readout are the logits."""
    return ProductKeyMemory(
        WIDTH,
        heads=HEADS,
        top_k=TOP_K,
        sub_keys=SUB_KEYS,
        value_dim=CLASSES,
        query_norm=norm,  # type: ignore[arg-type]
        gate="none",
        table=TableOptions(update="dense"),
    )


def control() -> MLP:
    """A dense layer of as many operations; its width is the number of classes."""
    return MLP(WIDTH, expand=HIDDEN / WIDTH)


def _examples(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes; parameters made next follow from the seed as well."""
    generator = torch.Generator().manual_seed(seed)
    x = inputs(kind, generator)[:, None]
    torch.manual_seed(seed)
    return x, torch.randint(CLASSES, (INPUTS,), generator=generator)


def _fit(
    learner: Layer, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> float:
    """Trains on all inputs at once, and returns the accuracy on them."""
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(learner(x).y[:, 0], y).backward()
        optimizer.step()
    with torch.no_grad():
        return float((learner(x).y[:, 0].argmax(-1) == y).double().mean())


def _use(learner: ProductKeyMemory, x: Tensor) -> dict[str, float]:
    with torch.no_grad(), metering() as meter:
        learner(x)
    return meter.by_layer(learner)[""].metrics()


def run(arguments: Sequence[str]) -> None:
    """Measures every kind of inputs with every norm, and publishes the table."""
    options = parsed(arguments, script="collapse.py", description=__doc__, name="collapse")
    rows = []
    for kind in INPUT_KINDS:
        for norm in NORMS:
            rows.append(_row(kind, norm, [trained(kind, norm, seed) for seed in options.seeds]))
        accuracies = [trained_control(kind, seed) for seed in options.seeds]
        names = {"inputs": kind, "query norm": "(dense control)"}
        rows.append(
            dict.fromkeys(rows[0], "") | names | {"accuracy": mean_and_spread(accuracies, 3)}
        )
    publish(measured(rows, REMARKS, options.seeds), options)


def _row(kind: str, norm: str, runs: Sequence[Collapse]) -> dict[str, str]:
    def cell(stage: str, name: str, digits: int) -> str:
        return mean_and_spread([getattr(r, stage)[name] for r in runs], digits)

    return {
        "inputs": kind,
        "query norm": norm,
        "usage at start": cell("before", "usage", 1),
        "KL at start": cell("before", "kl_reads", 2),
        "usage trained": cell("after", "usage", 1),
        "KL trained": cell("after", "kl_reads", 2),
        "top-1 usage trained": cell("after", "usage_top1", 1),
        "accuracy": mean_and_spread([r.accuracy for r in runs], 3),
    }


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
