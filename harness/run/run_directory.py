"""A run directory: the resolved config, metrics.csv, checkpoints, summary.json."""

import json
import math
import os
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from mneme.harness.config.check import Config, ConfigError, blaming
from mneme.harness.config.renames import renamed
from mneme.storage.files import read_regular, replacing

RUNS = Path("runs")
SWEEP = "sweep.json"  # in the folder of a sweep: the arguments that it was started with
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_SHARED = "MNEME_RUN_DIR"  # how the processes of one run agree on its directory


def rank() -> int:
    """Which of the processes that train together this is, as Lightning has it."""
    if "lightning" not in sys.modules:  # which would be slow to import, and looks here first
        found = (os.environ.get(name) for name in _RANKS)
        return int(next((number for number in found if number is not None), 0))
    from lightning.pytorch.utilities import rank_zero_only

    number: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return number


class RunError(ValueError):
    """A run directory or checkpoint that cannot be used as asked."""


class TaskMismatchError(ValueError):
    """A task does not fit a model."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def name(self) -> str:
        """For people: the directory's own, after that of the sweep it belongs to."""
        name = self.path.name
        return f"{self.path.absolute().parent.name}_{name}" if name.isdigit() else name

    @property
    def identity(self) -> str:
        """For dashboards: drawn once, so that equal names in two places are two runs."""
        known = self.read_summary().get("id")
        return str(known or self.write_summary(id=uuid.uuid4().hex[:12])["id"])

    @property
    def config(self) -> Path:
        """The resolved config: what was run, complete."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One row per logged update and per validation."""
        return self.path / "metrics.csv"

    @property
    def summary(self) -> Path:
        """The run as one row: budgets, metrics, provenance, status."""
        return self.path / "summary.json"

    @property
    def evaluations(self) -> Path:
        """One JSON row per evaluation made later."""
        return self.path / "evaluations.jsonl"

    @property
    def usage(self) -> Path:
        """What eval.py found of the use of tables."""
        return self.path / "usage"

    @property
    def telemetry(self) -> Path:
        """What memories reported along a text, in the last evaluation that asked for it."""
        return self.path / "telemetry"

    @property
    def bank(self) -> Path:
        """The files of the memory bank, if the model has one."""
        return self.path / "bank"

    @property
    def router(self) -> Path:
        """The router of training's routes, if a task has one."""
        return self.path / "router"

    @property
    def tokenizer(self) -> Path:
        """The vocabulary that the run learnt, if it learnt one."""
        return self.path / "tokenizer.model"

    @property
    def last(self) -> Path:
        """The newest checkpoint, from which the run resumes."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation metric."""
        return self.path / "checkpoints" / "best.ckpt"

    def write_config(self, config: Config) -> None:
        """Writes the resolved config, in the first of several processes."""
        if rank() == 0:
            write_atomically(self.config, yaml.safe_dump(config, sort_keys=False))

    def read_config(self) -> Config:
        """Reads the resolved config back.

        Raises:
            RunError: there is none, or it is not one.
        """
        try:
            config = yaml.safe_load(read_regular(self.config).decode())
        except FileNotFoundError as error:
            raise RunError(f"{self.path} is not a run directory: it has no config.yaml") from error
        except OSError as error:
            raise RunError(f"cannot read {self.config}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{self.config} is not YAML: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"{self.config} does not hold a config")
        return renamed(config)

    def add_evaluations(self, rows: Iterable[str]) -> None:
        """Appends lines to evaluations.jsonl.

        Raises:
            RunError: there is something else in its place.
        """
        if self.evaluations.exists() and not self.evaluations.is_file():
            raise RunError(f"{self.evaluations} is not a regular file; remove it")
        with self.evaluations.open("a") as out:
            out.writelines(rows)

    def write_summary(self, **facts: Any) -> dict[str, Any]:
        """Adds facts to summary.json and returns the whole."""
        summary = {**self.read_summary(), **facts}
        if rank() == 0:
            text = json.dumps(finite(summary), indent=2, default=str) + "\n"
            try:
                write_atomically(self.summary, text)
            except OSError:
                _overwrite(self.summary, text.encode())
        return summary

    def read_summary(self) -> dict[str, Any]:
        """What summary.json holds so far."""
        try:
            summary = json.loads(read_regular(self.summary))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RunError(f"cannot read {self.summary}: {error.strerror}") from error
        except ValueError as error:
            raise RunError(f"{self.summary} is not JSON: {error}") from error
        if not isinstance(summary, dict):
            raise RunError(f"{self.summary} does not hold a summary")
        return summary


def new_run_directory(wanted: str | None, choices: Mapping[str, str], seed: int) -> RunDirectory:
    """Makes a directory for a new run, never one that already holds a run.

    Args:
        wanted: the path asked for, or None to name it by time, task and mixer.
        choices: group to chosen file, for the name.
        seed: for the name.

    Raises:
        ConfigError: the path asked for holds a run.
    """
    if shared := _directory_of_rank_zero():
        return RunDirectory(shared)
    run = RunDirectory(_claim(wanted, choices, seed))
    os.environ[_SHARED] = str(run.path)
    return run


def _claim(wanted: str | None, choices: Mapping[str, str], seed: int) -> Path:
    if wanted is not None:
        refuse_occupied(wanted)
        with blaming("run_dir"):
            Path(wanted).mkdir(parents=True, exist_ok=True)
        return Path(wanted)
    return claim_by_time(*(choices.get(g, "") for g in ("task", "mixer")), f"seed{seed}")


def claim_by_time(*words: str) -> Path:
    """Makes a directory named by the time and words, which no other process has then."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    with blaming("run_dir"):
        return _make_unique(RUNS / "_".join([stamp, *words]))


def refuse_occupied(wanted: str | None) -> None:
    """Raises ConfigError if the directory asked for holds a run already."""
    with blaming("run_dir"):  # a name may be too long, or none that a system knows
        taken = wanted is not None and RunDirectory(Path(wanted)).config.exists()
    if taken and _directory_of_rank_zero() is None:
        raise ConfigError(
            [
                f"run_dir: {wanted} already holds a run; continue it with resume={wanted}, "
                "or choose another directory"
            ]
        )


def find_run(where: str | Path) -> tuple[RunDirectory, Path | None]:
    """Reads a run's address: its directory, or one of its checkpoints.

    Raises:
        RunError: nothing is there.
    """
    path = Path(where)
    if str(where) and path.is_dir():
        return RunDirectory(path), None
    if path.is_file():  # neither a fifo nor a device
        return RunDirectory(path.absolute().parent.parent), path
    raise RunError(f"there is no run at {path}; give a run directory or a checkpoint file")


def newest_run() -> Path | None:
    """The run under `runs/`, or of a sweep there, that was written to last; None without any."""
    files = [*RUNS.glob("*/summary.json"), *RUNS.glob("*/*/summary.json")]
    return max(files, key=lambda file: file.stat().st_mtime).parent if files else None


def finite(value: Any) -> Any:
    """A value as JSON can hold it: nothing in the place of NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file whole, so that no reader and no crash ever sees a part of it."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _overwrite(path: Path, content: bytes) -> None:
    """Replaces what a file holds in its own blocks: a full disk has no room for a second file."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, len(content))  # or nothing is changed
        file.write(content)
        file.truncate()


def _directory_of_rank_zero() -> Path | None:
    """Where the first of several processes writes; None in that process itself.

    Lightning starts the other processes with the environment of the first.
    """
    if rank() == 0:
        return None
    if _SHARED not in os.environ:
        raise RunError("let Lightning start the processes: set trainer.devices, without torchrun")
    return Path(os.environ[_SHARED])


def _make_unique(path: Path) -> Path:
    for attempt in range(1, 1000):
        candidate = path if attempt == 1 else path.with_name(f"{path.name}-{attempt}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise RunError(f"no free name beside {path}")
