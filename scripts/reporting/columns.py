"""What a column of the table says of a run, and of the runs of a row together."""

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mneme.harness.run.metrics_file import STEP
from mneme.tasks.metrics import LOWER_IS_BETTER
from scripts.reporting.entries import flat
from scripts.reporting.rows import Row
from scripts.reporting.runs import ReportError, Run, unknown

Split = Literal["val", "test"]

COSTS = {
    "budget.parameters": "parameters",
    "budget.state_bytes": "state bytes",
    "tokens_per_second": "training tokens/s",
    "steps": "steps",
    "tokens": "tokens",
}
_BUDGET = "budget."  # known before training, so also of runs that did not finish
_EVAL = re.compile(
    r"eval:(?P<metric>.+)@(?P<length>\d+)(?P<multiple>x?)(:(?P<state>fresh|carried))?"
)
_OF_AN_EVALUATION = ("state_bytes", "tokens_per_second")  # beside its metrics


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        word: its name on the command line.
        label: its head in the table.
        read: its value for a run; None if the run has none.
        evaluation: the evaluation that the value is from, for columns of evaluations.
        metric: whose value it is, if any; of a quotient, that above the line.
    """

    word: str
    label: str
    read: Callable[[Run], Any]
    evaluation: Callable[[Run], Mapping[str, Any] | None] | None = None
    metric: str | None = None

    @property
    def lower_is_better(self) -> bool:
        """As of a loss, also of a part of the examples (`loss/arm=question`)."""
        return self.metric is not None and self.metric.partition("/")[0] in LOWER_IS_BETTER

    def cell(self, row: Row) -> str:
        """The value of a row: the mean over seeds and the standard deviation between them."""
        values, runs = self.values(row), self._runs(row)
        missing = f" ({len(values)} of {len(runs)})" if 0 < len(values) < len(runs) else ""
        return together(values, measured=not self._known_untrained) + missing

    def values(self, row: Row) -> list[Any]:
        """One value for each run of a row that has one."""
        return [value for run in self._runs(row) if (value := self.read(run)) is not None]

    def _runs(self, row: Row) -> Sequence[Run]:
        return row.runs if self._known_untrained else row.finished

    @property
    def _known_untrained(self) -> bool:
        return self.word.startswith(_BUDGET)


def default_columns(runs: Sequence[Run], split: Split | None) -> list[Column]:
    """The monitored metric of each task among the runs, then what it cost.

    Raises:
        ReportError: no run was evaluated on the test split, if `split` is "test".
    """
    monitors = dict.fromkeys(run.monitor for run in runs if run.monitor)
    if split == "test":
        metrics = chosen_columns([f"eval:{monitor}@1x" for monitor in monitors], runs, split)
    else:
        metrics = [_make(f"best:{monitor}", split) for monitor in monitors]
    return [*metrics, *(_make(word, split) for word in COSTS)]


def chosen_columns(
    words: Sequence[str], runs: Sequence[Run], split: Split | None, option: str = "columns"
) -> list[Column]:
    """The columns that the command line names, in `option`.

    A word may be `COLUMN/COLUMN`: the one divided by the other, in each run.

    Raises:
        ReportError: a column of which no run has a value, or a quotient of what is no number.
    """
    columns = [_found(word, runs, split) for word in words]
    for column in columns:
        if not _has_values(column, runs):
            hint = " (eval.py run=RUN adds evaluations)" if column.evaluation else ""
            problem = f"{option}: no run has a value for {column.word!r}{hint}"
            raise ReportError(unknown(problem, column.word, _known(runs, split)))
    return columns


def sort_rows(
    rows: Sequence[Row], expression: str, runs: Sequence[Run], split: Split | None
) -> tuple[list[Row], str]:
    """The rows from the best figure to the worst, those without one last.

    Of a metric of which less is better the smallest is the best, of all else the largest.

    Args:
        rows: in any order; equal figures keep theirs.
        expression: a column, or a quotient of two.
        runs: of the rows.
        split: as for columns.

    Returns:
        The rows, and how they are sorted.

    Raises:
        ReportError: no run has a value for it, or a value is not a number.
    """
    [column] = chosen_columns([expression], runs, split, option="--sort")

    def place(row: Row) -> tuple[bool, float]:
        figure = _mean(column, row)
        return (math.isnan(figure), figure if column.lower_is_better else -figure)

    first = "smallest" if column.lower_is_better else "largest"
    return sorted(rows, key=place), f"Rows are sorted by {expression}, the {first} first."


def together(values: Sequence[Any], *, measured: bool) -> str:
    """Values of several seeds as one cell.

    Args:
        values: one per seed.
        measured: whether equal values are a result, to be shown with their spread of zero.
    """
    if not values:
        return ""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numeric:
        return ", ".join(dict.fromkeys(text(value) for value in values))
    equal = len(set(values)) == 1
    if len(values) == 1 or (equal and not (measured and isinstance(values[0], float))):
        return number(values[0])
    return f"{number(statistics.mean(values))} ± {number(statistics.stdev(values))}"


def number(value: float) -> str:
    """A figure: whole from a thousand on, otherwise with three decimals, or in powers of ten."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or not abs(value) < 5e-4 else f"{value:.2e}"


def text(value: Any) -> str:
    """A value of a config or a summary, as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value)


def evaluation_split(split: Split | None) -> Split:
    """The split of evaluations, which is the test split unless `split` names another."""
    return split or "test"


def _mean(column: Column, row: Row) -> float:
    """Over the seeds, as the table shows it; not a number if there is none."""
    values = column.values(row)
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, int | float)]:
        raise ReportError(f"--sort: {column.word} is not a number: {wrong[0]!r}")
    return statistics.mean(values) if values else math.nan


def _found(word: str, runs: Sequence[Run], split: Split | None) -> Column:
    """The column of this name, or else the quotient of two.

    A column's own name may hold slashes, so every cut is tried.
    """
    column = _make(word, split)
    cuts = [i for i, character in enumerate(word) if character == "/"]
    for cut in [] if _has_values(column, runs) else cuts:
        above, below = _make(word[:cut], split), _make(word[cut + 1 :], split)
        if _has_values(above, runs) and _has_values(below, runs):
            return _quotient(above, below)
    return column


def _has_values(column: Column, runs: Sequence[Run]) -> bool:
    return any(column.read(run) is not None for run in runs)


def _quotient(above: Column, below: Column) -> Column:
    word = f"{above.word}/{below.word}"

    def figure(column: Column, run: Run) -> float | None:
        found: float | None = column.read(run)
        if isinstance(found, bool) or not isinstance(found, int | float | None):
            raise ReportError(f"{word}: {column.word} is not a number: {found!r}")
        return found

    def read(run: Run) -> float | None:
        """Nothing where either is missing or there is nothing to divide by."""
        over, under = figure(above, run), figure(below, run)
        return over / under if over is not None and under else None

    label = f"{above.label} / {below.label}"
    evaluation = above.evaluation or below.evaluation
    return Column(word, label, read, evaluation, above.metric)


def _make(word: str, split: Split | None) -> Column:
    if word.startswith("best:"):
        metric = word.removeprefix("best:")
        label = f"{metric} (val)"
        return Column(word, label, lambda run: run.best.get(f"val/{metric}"), metric=metric)
    if match := _EVAL.fullmatch(word):
        return _of_evaluation(word, match, evaluation_split(split))
    of_summary = word.removeprefix("metrics.val/") if word.startswith("metrics.") else None
    label = COSTS.get(word, word)
    return Column(word, label, lambda run: flat(run.summary).get(word), metric=of_summary)


def _of_evaluation(word: str, match: re.Match[str], split: Split) -> Column:
    metric, length, carried = match["metric"], int(match["length"]), match["state"] == "carried"

    def evaluation(run: Run) -> Mapping[str, Any] | None:
        """The latest one of the best weights."""
        wanted = length * (run.seq_len or 0) if match["multiple"] else length
        wanted_row = {
            "split": split,
            "seq_len": wanted,
            "carry": carried,
            "checkpoint": "best.ckpt",
        }
        return next((e for e in reversed(run.evaluations) if wanted_row.items() <= e.items()), None)

    def read(run: Run) -> Any:
        found = evaluation(run)
        return None if found is None else _values(found).get(metric)

    at_length = f" at {length}x" if match["multiple"] and length > 1 else f" at {length:,}"
    at = "" if match["multiple"] and length == 1 else at_length
    label = f"{metric}{at}{', state carried' if carried else ''} ({split})"
    return Column(word, label, read, evaluation, metric)


def _values(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {**evaluation["metrics"], **{key: evaluation[key] for key in _OF_AN_EVALUATION}}


def _known(runs: Sequence[Run], split: Split | None) -> list[str]:
    """Every word that names a column of these runs."""
    best = [f"best:{key.removeprefix('val/')}" for run in runs for key in run.best if key != STEP]
    facts = [key for run in runs for key in flat(run.summary)]
    evaluated = [
        f"eval:{key}@{row['seq_len']}{':carried' if row['carry'] else ''}"
        for run in runs
        for row in run.evaluations
        if row["split"] == evaluation_split(split) and row["checkpoint"] == "best.ckpt"
        for key in _values(row)
    ]
    return list(dict.fromkeys([*best, *facts, *evaluated]))
