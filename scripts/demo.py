"""Trains three small models to recall, and shows in one table what each pays to remember.

`make demo` runs it: a matrix memory, full attention and a short sliding window, alike in everything
but the mixer, on multi-query associative recall; each is then tested at the training length and at
four times that length.

    python scripts/demo.py [option=value ...]

Options are those of train.py, but for `run_dir`; `trainer.max_steps=50` is a quick look. The runs
stay in `runs/demo/`, with options in `runs/demo_OPTIONS/`, and after an interruption the same
command continues: finished runs are only shown again, and one that was stopped goes on.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from mneme.harness.cli import report_errors
from mneme.harness.config.build import build
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.evaluation import Evaluation, evaluate, lengthened, restore_model
from mneme.harness.run.checkpoints import read_checkpoint
from mneme.harness.run.jobs import start_or_resume
from mneme.harness.run.precision import run_precision
from mneme.harness.run.run_directory import RUNS, RunDirectory
from scripts.reproducing.reproduction import folder

MIXERS = ("gated_deltanet", "attention", "sliding_window")
MULTIPLES = (1, 4)
EXPLANATION = (
    "Attention keeps every token, so its state grows with the length. The window's state stays "
    "small, and what has left it is gone. The matrix memory keeps its size at any length."
)


@dataclass(frozen=True)
class Result:
    """One trained and tested model.

    Attributes:
        mixer: its name.
        run: where it was trained.
        summary: of the run.
        evaluations: of the test set, one for each of `MULTIPLES`.
    """

    mixer: str
    run: RunDirectory
    summary: dict[str, Any]
    evaluations: list[Evaluation]


def train_and_test(mixer: str, overrides: list[str]) -> Result:
    """Trains one mixer on the demo's task and evaluates its best weights at each length.

    Args:
        mixer: a choice of the group.
        overrides: as for train.py.
    """
    where = f"run_dir='{RUNS / folder('_'.join(['demo', *overrides])) / mixer}'"
    composed = compose_checked(["experiment=demo", f"mixer={mixer}", where, *overrides])
    run, summary = start_or_resume(composed)
    model = restore_model(composed.config, read_checkpoint(run.best))
    tasks = [build(lengthened(composed.config["task"], multiple)) for multiple in MULTIPLES]
    score = partial(evaluate, model, precision=run_precision(composed.config))
    return Result(mixer, run, summary, [score(task) for task in tasks])


def main(overrides: list[str]) -> None:
    """Trains and tests every mixer with overrides as of train.py, and prints the table."""
    show([train_and_test(mixer, overrides) for mixer in MIXERS])


def show(results: list[Result]) -> None:
    """Prints the table: a column per mixer."""
    table = Table(title="MQAR: accuracy on the test set, and what it costs", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.mixer, justify="right")
    for i, multiple in enumerate(MULTIPLES):
        evaluations = [result.evaluations[i] for result in results]
        for row in _rows(evaluations, "training length" if multiple == 1 else f"{multiple}x"):
            table.add_row(*row)
        table.add_section()
    table.add_row("parameters", *(f"{r.summary['budget']['parameters']:,}" for r in results))
    # A run that was resumed after its last step has none.
    rates = [result.summary.get("tokens_per_second") for result in results]
    table.add_row("training tokens/s", *("" if rate is None else f"{rate:,}" for rate in rates))
    console = Console(highlight=False)
    console.print(table)
    console.print(EXPLANATION)
    for result in results:
        console.print(f"{result.mixer}: {result.run.path}", soft_wrap=True)


def _rows(evaluations: list[Evaluation], length: str) -> list[list[str]]:
    """Accuracy over all and by number of pairs, and the state paid for it, at one length."""
    names = {"accuracy": f"{evaluations[0].seq_len} tokens ({length})"}
    for name in evaluations[0].metrics:
        if name.startswith("accuracy/pairs="):
            names[name] = f"  {name.removeprefix('accuracy/pairs=')} pairs"
    rows = [[label, *(f"{e.metrics[n]:.3f}" for e in evaluations)] for n, label in names.items()]
    return [*rows, ["  state bytes", *(f"{e.state_bytes:,}" for e in evaluations)]]


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    with report_errors():
        main(sys.argv[1:])
