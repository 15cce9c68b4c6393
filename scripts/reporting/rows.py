"""Which runs make a row, and what the rows are called."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scripts.reporting.entries import compared, differing, named, paths, seeds, value
from scripts.reporting.runs import ReportError, Run, unknown


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seeds.

    Attributes:
        runs: one finished run per seed, and all that did not finish.
        repeats: finished runs of a config and seed that a later run of the row has, too.
    """

    runs: Sequence[Run]
    repeats: Sequence[Run]

    @property
    def finished(self) -> list[Run]:
        """The runs that have a result."""
        return [run for run in self.runs if run.finished]

    @cached_property
    def entries(self) -> Mapping[str, Any]:
        """Path in the config to value; empty where the config is not known."""
        first = self.runs[0]
        return named(compared(first.config), first.choices) if first.config else {}

    @property
    def names(self) -> Mapping[str, Any]:
        """What the row may be named by: its entries, and choices such as `experiment`."""
        choices = {group: name for group, name in self.runs[0].choices.items() if "@" not in group}
        return {**choices, **self.entries} if self.entries else {}

    @property
    def seeds(self) -> str:
        """How many seeds finished, and how the others ended."""
        count = len(self.finished)
        others = [f"seed {run.seed} {run.status}" for run in self.runs if not run.finished]
        return "; ".join([*([str(count)] if count else []), *others])


def make_rows(runs: Iterable[Run]) -> list[Row]:
    """Groups runs by everything in their config but seeds and what changes no result."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    return [_row(group) for group in groups.values()]


def naming_columns(rows: Sequence[Row], by: Sequence[str] | None = None) -> list[str]:
    """The paths that name the rows: those given, or all in which the rows differ.

    Raises:
        ReportError: a path that no run has, or paths that leave rows with equal names.
    """
    known = [row for row in rows if row.entries]
    differ = differing([row.entries for row in known])
    if by is None:
        return differ or ["mixer"]
    names = [row.names for row in known]
    for path in by:
        if path not in paths(names):
            raise ReportError(unknown(f"--by: no run has the option {path!r}", path, paths(names)))
    if len({tuple(value(name, path) for path in by) for name in names}) < len(names):
        raise ReportError(
            f"--by {','.join(by)}: these leave rows with equal names; the rows differ in "
            f"{','.join(differ)}"
        )
    return list(by)


def _row(runs: Sequence[Run]) -> Row:
    by_age = sorted(runs, key=lambda run: run.started)
    newest = {_seeds(run): run for run in by_age if run.finished}
    repeats = [run for run in runs if run.finished and newest[_seeds(run)] is not run]
    kept = [run for run in runs if not run.finished or newest[_seeds(run)] is run]
    return Row(sorted(kept, key=lambda run: run.seed), repeats)


def _seeds(run: Run) -> str:
    return json.dumps(seeds(run.config), sort_keys=True)


def _identity(run: Run) -> str:
    return json.dumps(compared(run.config), sort_keys=True) if run.config else str(run.path)
