"""Deletes blocks of a trained memory bank, in memory, and asks the run's facts again.

For a few leaves, the block of the last level on the way to them is set to zero, then also the one
above it, and so on to the first level, which more and more other leaves share: what is lost of the
facts whose questions read all that was deleted, and what of all others? Needs a run of
task=rare_facts with ffn=bank; nothing of it is changed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

from mneme.harness.cli import report_errors, whole_number
from mneme.harness.config.build import TARGET, build, resolve_target
from mneme.harness.config.check import Config
from mneme.harness.config.schema import check_config
from mneme.harness.evaluate.evaluation import check_fit, restore_model
from mneme.harness.run.checkpoints import (
    checkpoint_config,
    checkpoint_vocabulary,
    read_checkpoint,
)
from mneme.harness.run.precision import run_precision
from mneme.harness.run.run_directory import RunError, find_run
from mneme.layers import BankShape, MemoryBank
from mneme.models import LanguageModel
from mneme.models.lightning_module import state_before
from mneme.tasks import RareFacts
from mneme.tasks.base import EvalSplit
from mneme.tasks.metrics import score
from scripts.reporting.measured import measured, publish


class Asked(NamedTuple):
    """What a model made of every fact.

    Attributes:
        route: `[F]`, the leaf that each question reads.
        right: `[F]`, whether the answer was.
    """

    route: Tensor
    right: Tensor


@dataclass(frozen=True)
class Deletion:
    """One block less, or several.

    Attributes:
        leaf: the blocks are on the way to.
        levels: of the blocks.
        facts: whose questions read all of them.
        own: accuracy on those, before and after.
        others: accuracy on all others, before and after.
    """

    leaf: int
    levels: Sequence[int]
    facts: int
    own: tuple[float, float]
    others: tuple[float, float]


@torch.inference_mode()
def ask(model: LanguageModel, task: RareFacts, split: EvalSplit, precision: Precision) -> Asked:
    """Asks every fact once, by the route of the task's first arm."""
    device, routes, right = next(model.parameters()).device, [], []
    for batch in task.eval_batches(split):
        with precision.forward_context():
            logits = model(batch.inputs.to(device), state_before(model, batch)).y
        assert batch.route is not None, "the task was checked"
        routes.append(batch.route)
        right.append(score(logits, batch.targets.to(device)).right)
    return Asked(torch.cat(routes), torch.cat(right).double())


@contextmanager
def deleted(bank: MemoryBank, leaf: int, levels: Sequence[int]) -> Iterator[None]:
    """A bank without some blocks on the way to a leaf, which come back."""
    nodes = {level: bank.shape.node(leaf, level) for level in levels}
    kept = {level: bank.record(level, node).clone() for level, node in nodes.items()}
    for level, node in nodes.items():
        bank.write(level, node, torch.zeros_like(kept[level]))
    try:
        yield
    finally:
        for level, node in nodes.items():
            bank.write(level, node, kept[level])


def choose(route: Tensor, shape: BankShape, count: int, seed: int) -> list[int]:
    """Leaves drawn from those half of all that most facts read."""
    facts = torch.bincount(route[route >= 0], minlength=shape.leaves)
    often = facts.argsort(descending=True, stable=True)[: max(1, shape.leaves // 2)]
    known = often[facts[often] > 0].tolist()
    drawn = np.random.default_rng(seed).choice(known, min(count, len(known)), replace=False)
    return [int(leaf) for leaf in drawn]


def measure(
    model: LanguageModel,
    task: RareFacts,
    *,
    precision: Precision,
    leaves: int,
    seed: int,
    split: EvalSplit = "val",
) -> list[Deletion]:
    """Deletes the last block on the way to some leaves, then also those before it.

    Args:
        model: with its bank in memory; it is left as it was.
        task: gives routes to the bank's leaves.
        precision: the run's, `run_precision`.
        leaves: how many.
        seed: of their choice.
        split: which set of questions.
    """
    assert isinstance(model.bank, MemoryBank), "the model was restored"
    bank, shape = model.bank, model.bank.shape
    before, found = ask(model, task, split, precision), []
    for leaf in choose(before.route, shape, leaves, seed):
        for first in reversed(range(len(shape.levels))):
            levels = shape.levels[first:]
            with deleted(bank, leaf, levels):
                after = ask(model, task, split, precision)
            last = levels[-1]
            reads = shape.node(before.route, last) == shape.node(leaf, last)
            reads &= before.route >= 0
            own, others = (_accuracies(before, after, facts) for facts in (reads, ~reads))
            found.append(Deletion(leaf, levels, int(reads.sum()), own, others))
    return found


def _accuracies(before: Asked, after: Asked, facts: Tensor) -> tuple[float, float]:
    """On some facts; NaN where there are none."""
    return float(before.right[facts].mean()), float(after.right[facts].mean())


def run(arguments: Sequence[str]) -> None:
    """Measures, and prints the table or puts it into a file.

    Raises:
        RunError: no run there, or one without a bank, or without routes of facts.
    """
    options = _parser().parse_args(arguments)
    directory, file = find_run(options.run)
    checkpoint = read_checkpoint(file or directory.last)
    config = checkpoint_config(checkpoint)
    check_config(config)
    task = _task(config)
    model = restore_model(config, checkpoint)
    if "bank" not in model.routed:
        raise RunError(f"{directory.path}: no layer of this model reads a memory bank")
    check_fit(checkpoint_vocabulary(checkpoint), model, task)
    found = measure(
        model,
        task,
        precision=run_precision(config),
        leaves=options.leaves,
        seed=options.seed,
        split=options.split,
    )
    remarks = [
        f"Each row: blocks set to zero, all {len(task.exposures.times):,} facts asked by the route "
        f"of their {task.arms[0]}, told or not, and the blocks put back.",
        "Nothing can happen to other facts where only the last block is deleted: a check. Blocks "
        "above it are shared with other leaves.",
        f"Leaves drawn with seed {options.seed} from the half of all that most facts read.",
    ]
    publish(measured([_row(deletion) for deletion in found], remarks, [config["seed"]]), options)


def _task(config: Config) -> RareFacts:
    """The run's task, which asks each fact once."""
    named = config["task"][TARGET]
    if resolve_target(named) is not RareFacts or config["task"].get("routes") == "none":
        raise RunError(f"deletion needs a run of task=rare_facts with routes; this is of {named}")
    task: RareFacts = build({**config["task"], "ask": None})
    task.prepare_data()
    return task


def _row(deletion: Deletion) -> dict[str, str]:
    cells = {
        "leaf": f"{deletion.leaf}",
        "deleted levels": ", ".join(map(str, deletion.levels)),
        "facts that read them": f"{deletion.facts:,}",
    }
    for whose, (before, after) in {"their": deletion.own, "other facts'": deletion.others}.items():
        cells |= {f"{whose} accuracy": f"{before:.4f}", f"{whose}, deleted": f"{after:.4f}"}
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/delete_blocks.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument(
        "--leaves", type=whole_number(1), default=4, help="how many ways to delete from"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the choice of leaves")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("--name", default="deletion", help="of the table, in the file's markers")
    return parser


if __name__ == "__main__":
    with report_errors():
        run(sys.argv[1:])
