"""The table at the end: report.py on the runs that a reproduction chose."""

import shlex
from collections.abc import Iterator

from scripts.report import report
from scripts.reproducing.grid import Grid
from scripts.reproducing.reproduction import ReproductionError


def make_table(name: str, grid: Grid) -> None:
    """Makes the report of every row that has a result, with the file's arguments.

    Args:
        name: of the reproduction.
        grid: of its runs; rows that were not trained in this call take part, too.

    Raises:
        ReproductionError: no row has a result.
        ReportError: the arguments do not suit the runs.
    """
    rows = [grid.chosen(label) for label in grid.reproduction.rows]
    paths = [str(job.path) for row in rows for job in row if job.exists]
    if not paths:
        raise ReproductionError(f"no run in {grid.place} has finished: there is nothing to report")
    command = shlex.join(["python", "scripts/reproduce.py", name])
    notes = [f"--note={note}" for note in _notes(grid)]
    report([*paths, *grid.reproduction.report, f"--made-by={command}", *notes])


def _notes(grid: Grid) -> Iterator[str]:
    """What of the file is not in the runs of the table."""
    asked = grid.reproduction
    if asked.sweep:
        yield (
            f"{asked.option}: of {', '.join(asked.values)}, the best of each row in the validation "
            f"of seed {asked.seeds[0]}."
        )
    without = [label for label in asked.rows if not grid.chosen(label)]
    if without:
        yield f"Not in the table, as no run has a result: {', '.join(without)}."
    for label in asked.rows:
        tried = [job.value for job in grid.first(label) if job.finished and job.value is not None]
        if asked.sweep and label not in without and len(tried) < len(asked.values):
            yield f"{label}: only {asked.option}={', '.join(tried)} has a result."
