"""Runs the training grid behind a table and makes the table.

A file of scripts/reproductions/ says which runs a table is made of. Runs that have finished are not
run again, and a run that was stopped goes on where it stopped: after any interruption, the same
command continues.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mneme.harness.cli import report_errors, whole_number
from mneme.harness.run.run_directory import RUNS, RunError
from scripts.report import report
from scripts.reporting.runs import unknown
from scripts.reproducing.grid import Grid
from scripts.reproducing.processes import Stopped, train
from scripts.reproducing.reproduction import (
    Reproduction,
    ReproductionError,
    about,
    names,
    read_reproduction,
)


def main(arguments: Sequence[str]) -> int:
    """Does what a command line asks for.

    Returns:
        The exit status: 1 if a run failed, 130 after Ctrl-C.

    Raises:
        ReproductionError: an unknown name or row, a file with mistakes, runs of other options.
        ConfigError: options that train.py would refuse.
        ReportError: a table that cannot be made.
    """
    options = _parser().parse_args(arguments)
    if options.list:
        _show()
        return 0
    if options.name is None:
        raise ReproductionError(f"name a reproduction; there are: {', '.join(names())}")
    reproduction = read_reproduction(options.name)
    labels = [] if options.report_only else _labels(reproduction, options.rows)
    grid = Grid(reproduction, options.runs / options.name)
    grid.check(labels)
    try:
        failed = train(grid, labels, options.jobs) if labels else []
    except Stopped as stop:
        print(f"\n{stop}; the same command goes on from here", file=sys.stderr)
        return stop.exit_status
    try:
        make_table(options.name, grid)
    except RunError as error:
        if not failed:
            raise
        print(error, file=sys.stderr)
    if failed:
        print(f"failed: {', '.join(str(job.path) for job in failed)}", file=sys.stderr)
    return 1 if failed else 0


def make_table(name: str, grid: Grid) -> None:
    """Makes the report of every row that has a result, with the file's arguments.

    Args:
        name: of the reproduction.
        grid: of its runs; rows that were not trained in this call take part, too.

    Raises:
        ReproductionError: no row has a result.
        ReportError: the arguments do not suit the runs.
    """
    rows = [grid.reported(label) for label in grid.reproduction.rows]
    paths = [str(job.path) for row in rows for job in row if job.exists]
    if not paths:
        raise ReproductionError(f"no run in {grid.place} has finished: there is nothing to report")
    command = shlex.join(["python", "scripts/reproduce.py", name])
    notes = [f"--note={note}" for note in _notes(grid)]
    report([*paths, *grid.reproduction.report, f"--made-by={command}", *notes])


def _notes(grid: Grid) -> Iterator[str]:
    """What of the file is not in the runs of the table."""
    rows, option = grid.reproduction.rows, grid.reproduction.option
    values, seeds = grid.reproduction.values, grid.reproduction.seeds
    if values:
        yield (
            f"{option}: of {', '.join(values)}, the best of each row in the validation of seed "
            f"{seeds[0]}."
        )
    without = [label for label in rows if not grid.reported(label)]
    if without:
        yield f"Not in the table, as no run has a result: {', '.join(without)}."
    for label in rows:
        tried = [job.value for job in grid.first(label) if job.finished and job.value is not None]
        if label not in without and len(tried) < len(values):
            yield f"{label}: only {option}={', '.join(tried)} has a result."


def _labels(reproduction: Reproduction, listed: str | None) -> list[str]:
    """The rows to train, in the order of the file."""
    wanted = {word.strip() for word in listed.split(",")} if listed else set(reproduction.rows)
    for label in sorted(wanted - set(reproduction.rows)):
        raise ReproductionError(unknown(f"--rows: no row {label!r}", label, reproduction.rows))
    return [label for label in reproduction.rows if label in wanted]


def _show() -> None:
    for name in names():
        print(name, *(f"    {line}" for line in about(name)), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python scripts/reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="of a file in scripts/reproductions/")
    parser.add_argument("--jobs", type=whole_number(1), default=2, help="runs at a time; else 2")
    parser.add_argument("--rows", metavar="LABEL,LABEL", help="train these only; else all")
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="where the runs go, in a folder NAME; else runs/"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--list", action="store_true", help="what there is, and how long it takes")
    return parser


if __name__ == "__main__":
    with report_errors():
        sys.exit(main(sys.argv[1:]))
