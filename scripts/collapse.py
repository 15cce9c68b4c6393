"""Shows when product keys leave most of a table unused: no query norm, LayerNorm, BatchNorm.

A product-key memory alone learns 512 inputs by heart, each with one of 64 classes. Inputs are
isotropic, share a direction (a common mean), or lie near a subspace besides. Every run learns its
inputs, so accuracy does not reveal the collapse; the use of the rows does.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.cli import report_errors
from layers import ProductKeyMemory, TableOptions, metering
from scripts.reporting.measured import mean_and_spread, measured
from scripts.reporting.page import place

WIDTH, INPUTS, CLASSES = 64, 512, 64
NORMS = ("none", "layer", "batch")
STEPS, LR, TABLE_LR = 400, 3e-3, 1e-2
MEAN = 7.0  # of each channel of the common direction, in standard deviations of the rest
RANK = 8  # of the subspace


@dataclass(frozen=True)
class Collapse:
    """How a run used its rows, and what it learned.

    Attributes:
        before: figures of `layers.usage.Usage.metrics` at the start.
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


INPUT_KINDS = ("isotropic", "common mean", "low rank + mean")


def trained(kind: str, norm: str, seed: int, steps: int = STEPS) -> Collapse:
    """One run: 32 x 32 rows, four heads of eight, the values' learning rate above the keys'."""
    generator = torch.Generator().manual_seed(seed)
    x, y = inputs(kind, generator)[:, None], torch.randint(CLASSES, (INPUTS,), generator=generator)
    torch.manual_seed(seed)
    memory = ProductKeyMemory(
        WIDTH,
        heads=4,
        top_k=8,
        sub_keys=32,
        value_dim=CLASSES,
        query_norm=norm,  # type: ignore[arg-type]
        gate="none",
        table=TableOptions(update="dense"),
    )
    groups = [
        {"params": memory.keys.parameters(), "lr": LR},
        {"params": memory.values.parameters(), "lr": TABLE_LR},
    ]
    optimizer = torch.optim.Adam(groups)
    before = _use(memory, x)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(memory(x).y[:, 0], y).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((memory(x).y[:, 0].argmax(-1) == y).double().mean())
    return Collapse(before, _use(memory, x), accuracy)


def _use(memory: ProductKeyMemory, x: Tensor) -> dict[str, float]:
    with torch.no_grad(), metering() as meter:
        memory(x)
    return meter.by_layer(memory)[""].metrics()


def run(arguments: Sequence[str]) -> None:
    """Measures, and prints the table or puts it into a file."""
    parser = argparse.ArgumentParser(prog="python scripts/collapse.py", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("--name", default="collapse", help="of the table, in the file's markers")
    asked = parser.parse_args(arguments)
    rows = [
        _row(kind, norm, [trained(kind, norm, seed) for seed in asked.seeds])
        for kind in INPUT_KINDS
        for norm in NORMS
    ]
    remarks = [
        f"Usage and top-1 usage: percent of the 1,024 rows read by any of {INPUTS} inputs, and "
        "read as the best of a head; KL in nats of reads from even.",
        f"{STEPS} steps of Adam on all inputs at once, {LR} for keys and queries, {TABLE_LR} "
        "for values.",
    ]
    report = measured(rows, remarks, asked.seeds)
    if asked.out:
        place(report, asked.out, asked.name)
    print(report)


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
