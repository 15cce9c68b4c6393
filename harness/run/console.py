"""What a run shows on the terminal: one labeled progress bar, and only what matters."""

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mneme.tasks.base import EvalSplit, Task

# Remarks of libraries about themselves that no user of this project can act on.
_REMARKS = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*does not have many workers.*",
    ".*`IterableDataset` has `__len__` defined.*",
    ".*litlogger.*",
    ".*in eval mode at the start of training.*",  # frozen parts are (harness/run/init_from.py)
    ".*is not resumable.*",  # the data order follows from the step (tasks/base.py)
)


say = rank_zero_only(print)
"""Prints, once however many processes train together."""


def quiet_libraries() -> None:
    """Silences notices that say nothing about the run; errors and other warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", message=remark)


class RunProgressBar(RichProgressBar):
    """A progress bar named after the run; Lightning's counts epochs, and there are none.

    Args:
        label: what is being trained.
    """

    def __init__(self, label: str) -> None:
        super().__init__(leave=True, theme=RichProgressBarTheme(metrics_format=".3g"))
        self.label = label

    @property
    def total_train_batches(self) -> int:
        """All batches of the run; Lightning's would leave out those before a resumption."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The newest loss, read when the bar is drawn rather than logged in every step."""
        loss = getattr(pl_module, "latest_loss", None)
        return {} if loss is None else {"loss": float(loss)}

    def _get_train_description(self, current_epoch: int) -> str:
        return self.label


class EvalProgress:
    """What an evaluation is at, on stderr while it lasts; nothing where that is no terminal.

    How many batches a set has is known at its end, so they are counted up.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )

    def __enter__(self) -> "EvalProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, what: str) -> Callable[[int], None]:
        """Begins a line; the result is to be called with the batches that are done."""
        row = self.bar.add_task(what, total=None)
        return lambda batches: self.bar.update(row, description=f"{what}: batch {batches:,}")


def label(run_name: str) -> str:
    """The name of a run without its time stamp and seed: a bar has to fit beside it."""
    return re.sub(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_|_seed\d+$", "", run_name)


def baseline_line(task: Task, split: EvalSplit) -> str:
    """What a score is to be held against."""
    named = (f"{name} {value:.4f}" for name, value in task.baselines(split).items())
    line = f"for comparison, {task.monitor} of {', '.join(named)}"
    return f"{line}\n{task.remark}" if task.remark else line
