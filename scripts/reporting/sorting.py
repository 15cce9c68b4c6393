"""The order of the rows, where the command line asks for one."""

import math
import statistics
from collections.abc import Sequence

from scripts.reporting.columns import Column, Split, chosen_columns
from scripts.reporting.rows import Row
from scripts.reporting.runs import ReportError, Run


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


def _mean(column: Column, row: Row) -> float:
    """Over the seeds, as the table shows it; not a number if there is none."""
    values = column.values(row)
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, int | float)]:
        raise ReportError(f"--sort: {column.word} is not a number: {wrong[0]!r}")
    return statistics.mean(values) if values else math.nan
