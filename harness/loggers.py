"""Dashboards: where metrics go besides metrics.csv, by choice.

A dashboard is named in the config by a class of this module. Its package, and Lightning's logger
for it, are imported only when the logger is made, and nothing here reaches a network unless the
user is logged in to the service.
"""

from __future__ import annotations

import netrc
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from mneme.harness.run.run_directory import RunDirectory, rank

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


class Dashboard(ABC):
    """How to make a dashboard's logger, once the run has its directory."""

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
        from lightning.pytorch.loggers import WandbLogger
        from lightning.pytorch.loggers.logger import DummyLogger

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
        from lightning.pytorch.loggers import TensorBoardLogger

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
