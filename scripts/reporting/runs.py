"""Reading run directories: what was run, how it ended, what was measured."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mneme.harness.config.build import TARGET, TargetError, resolve_target
from mneme.harness.config.check import Config, ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.run.metrics_file import STEP, read_metrics
from mneme.harness.run.run_directory import RunDirectory, RunError
from mneme.storage.files import read_regular
from mneme.tasks.base import Task

_LISTED = 30  # names of what is known, in a message about what is not
# What entries of summary.json and rows of evaluations.jsonl are, where the program relies on it.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(["budget", "choices", "metrics", "task", "versions"], dict),
    **dict.fromkeys(["command", "commit", "hardware", "started", "status", "time"], str),
    **dict.fromkeys(["overrides", "resumed"], list),
    **dict.fromkeys(["seed", "seq_len", "state_bytes"], int),
    **dict.fromkeys(["tokens_per_second"], (int, float)),
}
_OF_EVALUATIONS = (
    *("metrics", "seq_len", "carry", "split", "checkpoint", "task", "time", "command"),
    *("state_bytes", "tokens_per_second"),
)
_DIVERGED = re.compile(r"the (loss|gradient) is .+ at step \d+")  # as NonFiniteError says it


class ReportError(RunError):
    """A report that cannot be made: of these runs, or with these options."""


@dataclass(frozen=True)
class Run:
    """One run directory, read.

    Attributes:
        path: the directory.
        config: the resolved config; empty if the run left none and cannot be composed again.
        choices: group to the name of the file chosen in it; empty if the run did not record it.
        summary: what summary.json holds.
        metrics: the rows of metrics.csv.
        evaluations: the rows of evaluations.jsonl, oldest first.
    """

    path: Path
    config: Config
    choices: Mapping[str, str]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, float]]
    evaluations: Sequence[Mapping[str, Any]]

    @property
    def seed(self) -> int:
        """Of initialization, data order and dropout."""
        return int(self.config.get("seed", self.summary.get("seed", 0)))

    @property
    def seq_len(self) -> int | None:
        """The task's length, at which the run's costs are counted."""
        length: int | None = self.summary.get("budget", {}).get("seq_len")
        return length

    @property
    def started(self) -> str:
        """When, in UTC; of a run that did not record it, the time its first file was written."""
        if "started" in self.summary:
            return str(self.summary["started"])
        directory = RunDirectory(self.path)
        first = directory.config if directory.config.exists() else directory.summary
        moment = datetime.fromtimestamp(first.stat().st_mtime, UTC)
        return moment.isoformat(timespec="seconds")

    @cached_property
    def task(self) -> type[Task] | None:
        """The class of the task; None without a config."""
        if "task" not in self.config:
            return None
        try:
            cls = resolve_target(self.config["task"][TARGET])
        except TargetError as error:
            raise ReportError(f"{self.path}: task: {error}") from error
        assert issubclass(cls, Task)
        return cls

    @property
    def monitor(self) -> str | None:
        """The metric by which best.ckpt is kept; None without a task."""
        return None if self.task is None else str(self.summary.get("monitor", self.task.monitor))

    @property
    def best_value(self) -> float:
        """The monitored metric at the best validation, of which there is one."""
        return self.best[f"val/{self.monitor}"]

    @cached_property
    def best(self) -> Mapping[str, float]:
        """The validation at which best.ckpt was kept; empty before the first."""
        if self.task is None:
            return {}
        key, sign = f"val/{self.monitor}", {"min": -1, "max": 1}[self.task.monitor_mode]
        rows = [row for row in self.metrics if math.isfinite(row.get(key, math.nan))]
        return max(rows, key=lambda row: sign * row[key], default={})

    @property
    def finished(self) -> bool:
        """Whether the run took all its steps and has a result."""
        return self.status == "finished"

    @cached_property
    def status(self) -> str:
        """How it ended, or where it stands."""
        status = str(self.summary.get("status", "unknown"))
        validated = any(key.startswith("val/") for row in self.metrics for key in row)
        without_result = status == "finished" and validated and not self.best
        if without_result or (status == "failed" and _DIVERGED.search(self.error)):
            return "diverged"
        if status == "running" and self.metrics:
            return f"running at step {self.metrics[-1][STEP]:,}"
        return status

    @property
    def error(self) -> str:
        """What stopped it, in one line; empty if nothing did."""
        return " ".join(str(self.summary.get("error") or "").split())


def find_runs(places: Sequence[Path]) -> list[Run]:
    """Reads the runs at or below the given places, in that order, each once.

    Raises:
        ReportError: a place that holds no run.
        RunError: a run directory with a file that cannot be read.
    """
    found = {path.resolve(): path for place in places for path in _directories(place)}
    return [read_run(path) for path in found.values()]


def read_run(path: Path) -> Run:
    """Reads one run directory.

    Raises:
        RunError: one of its files cannot be read.
    """
    directory = RunDirectory(path)
    summary = directory.read_summary()
    _require_kinds(summary, directory.summary)
    if directory.config.exists():
        config, choices = directory.read_config(), summary.get("choices", {})
    else:
        config, choices = _composed_again(summary.get("overrides", []))
    metrics, evaluations = read_metrics(directory.metrics), _evaluations(directory.evaluations)
    return Run(path, config, choices, summary, metrics, evaluations)


def unknown(problem: str, word: str, known: Iterable[str]) -> str:
    """A message that lists what is known, the nearest first."""

    def likeness(name: str) -> float:
        parts = (name, name.rpartition(".")[2], name.rpartition(":")[2])
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    names = sorted(known, key=likeness, reverse=True)
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{problem}; known, nearest first: {', '.join(names[:_LISTED])}{rest}"


def _directories(place: Path) -> list[Path]:
    if _is_run(place):
        return [place]
    if not place.is_dir():
        raise ReportError(f"there is no run at {place}; give run directories, or folders of them")
    found = sorted({file.parent for file in place.rglob("summary.json")}, key=_natural)
    if not found:
        raise ReportError(
            f"no runs in {place}: nothing in it holds a summary.json; give run directories, or "
            "folders of them"
        )
    return found


def _is_run(path: Path) -> bool:
    run = RunDirectory(path)
    return run.config.exists() or run.summary.exists()


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts job 10 of a sweep behind job 9."""
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in path.parts]


def _composed_again(overrides: Sequence[str]) -> tuple[Config, Mapping[str, str]]:
    """What a job of a sweep would have run, if it failed before it had a config."""
    try:
        composed = compose_checked(overrides)
    except ConfigError:
        return {}, {}
    return composed.config, composed.choices


def _evaluations(path: Path) -> list[dict[str, Any]]:
    return list(_json_lines(path)) if path.exists() else []


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"cannot read {path}: {error}") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ReportError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not row.keys() >= set(_OF_EVALUATIONS):
            raise ReportError(
                f"{where} is no row of eval.py, which has {', '.join(_OF_EVALUATIONS)}"
            )
        _require_kinds(row, where)
        yield row


def _require_kinds(facts: Mapping[str, Any], where: Path | str) -> None:
    """Raises ReportError for an entry that is not what this project writes under its name."""
    for name, value in facts.items():
        if value is not None and not isinstance(value, _KINDS.get(name, object)):
            raise ReportError(f"{where}: {name} is {value!r}, which this project did not write")
