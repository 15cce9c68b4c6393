"""Where metrics go: a CSV file always, a dashboard by choice.

A dashboard is named in the config by a class of this module; its package is imported only when the
logger is built, and nothing here reaches a network unless the user is logged in to the service.
"""

import csv
import io
import netrc
import os
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from mneme.harness.run_directory import RunDirectory, RunError, rank, write_atomically
from mneme.layers.regular_file import read_regular

STEP = "step"


class MetricsFile(Logger):
    """metrics.csv: a row whenever something is logged, a column per metric, empty where unknown.

    Rows are appended and flushed one by one, so a killed run keeps all it logged. A metric seen for
    the first time adds a column: the file is then replaced whole.

    Args:
        path: the file; rows already there are kept up to `resume_step`.
        resume_step: the number of updates behind the checkpoint that training goes on from.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        super().__init__()
        self.path = path
        kept = [row for row in read_metrics(path) if row[STEP] <= resume_step]
        self.columns = list(dict.fromkeys([STEP, *(key for row in kept for key in row)]))
        self._rewrite(kept)

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row."""
        row = {STEP: step or 0, **metrics}
        if new := [key for key in row if key not in self.columns]:
            rows = read_metrics(self.path)
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            self._writer(file).writerow(row)

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """The run directory holds the config already."""

    @rank_zero_only
    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        text = io.StringIO(newline="")
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())

    def _writer(self, file: Any) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self.columns, lineterminator="\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with the metrics it holds; a row cut short is left out.

    Raises:
        RunError: the file cannot be read, or its rows are not of numbers.
    """
    try:
        text = read_regular(path).decode()
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        rows = [{k: float(v) for k, v in row.items() if v} for row in reader]
        return [{**row, STEP: int(row[STEP])} for row in rows]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise RunError(f"{path} is damaged ({error}); mend its rows, or start a new run") from error


def last_validation(path: Path, step: int) -> dict[str, float]:
    """The metrics of the validation after `step` updates; empty if there was none."""
    rows = [row for row in read_metrics(path) if row[STEP] == step]
    found = [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows]
    return next((row for row in reversed(found) if row), {})


class Dashboard(ABC):
    """A recipe of a dashboard's logger, made once the run has its directory."""

    @abstractmethod
    def make(self, run: RunDirectory, config: dict[str, Any]) -> Logger:
        """The logger of one run."""

    @abstractmethod
    def close(self) -> None:
        """Ends the run on the dashboard; the next run of this process gets one of its own."""

    @abstractmethod
    def hint(self, run: RunDirectory) -> str:
        """One line that tells how to look at the run."""


class Wandb(Dashboard):
    """Weights & Biases: online if the user is logged in, otherwise offline in the run directory.

    Args:
        project: the project's name there.
        mode: "online", "offline", or None to decide by whether the user is logged in. WANDB_MODE
            and WANDB_DISABLED go before it: the machine's word before the run's.
    """

    def __init__(self, *, project: str = "mneme", mode: str | None = None) -> None:
        if mode not in (None, "online", "offline"):
            raise ValueError(f"mode must be online, offline or null, got {mode!r}")
        self.project = project
        mode = _environments_mode() or mode or ("online" if logged_in() else "offline")
        self.offline, self.disabled = mode == "offline", mode == "disabled"

    def make(self, run: RunDirectory, config: dict[str, Any]) -> Logger:
        """A run with the directory's name; a resumed run continues under the same id."""
        if self.disabled:
            return DummyLogger()
        if rank() != 0:
            return WandbLogger(offline=True)  # starts nothing: rank zero alone has a run
        if self.offline:  # crash reports would be sent all the same
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        started = wandb.init(
            project=self.project,
            name=run.name,
            id=run.identity,
            dir=run.path,
            mode="offline" if self.offline else "online",
            resume=None if self.offline else "allow",
            config=config,
            settings=wandb.Settings(silent=True),
        )
        return WandbLogger(experiment=started)

    def close(self) -> None:
        """Finishes the wandb run, which the library would otherwise hand to the next logger."""
        if self.disabled:
            return
        import wandb

        wandb.finish()

    def hint(self, run: RunDirectory) -> str:
        """How to see it."""
        if self.disabled:
            return "wandb: disabled by WANDB_MODE or WANDB_DISABLED in the environment"
        if not self.offline:
            return f"wandb: project {self.project!r}, run {run.name}"
        return (
            f"wandb (offline): `wandb leet {run.path}/wandb` shows it in the terminal, "
            f"`wandb sync {run.path}/wandb/offline-run-*` uploads it"
        )


class TensorBoard(Dashboard):
    """TensorBoard event files in the run directory."""

    def make(self, run: RunDirectory, config: dict[str, Any]) -> Logger:
        """Event files under `tensorboard/`."""
        return TensorBoardLogger(run.path, name="", version="tensorboard")

    def close(self) -> None:
        """Nothing is left open: Lightning closes the file after training."""

    def hint(self, run: RunDirectory) -> str:
        """How to see it."""
        return f"tensorboard: `tensorboard --logdir {run.path}`"


def _environments_mode() -> str | None:
    """What WANDB_DISABLED and WANDB_MODE ask for, as wandb reads them; None if they are not set.

    Raises:
        ValueError: a mode that wandb does not have.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "y", "t", "on"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE", "")
    modes = {"": None, "run": "online", "dryrun": "offline"}  # the last two are its older names
    modes |= {known: known for known in ("online", "offline", "disabled")}
    if mode not in modes:
        raise ValueError(f"WANDB_MODE must be online, offline or disabled, got {mode!r}")
    return modes[mode]


def logged_in() -> bool:
    """Whether the user has a key for Weights & Biases, found without importing it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
