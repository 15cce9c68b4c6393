"""Makes a Markdown table of runs, so that no figure in docs/results/ is copied by hand."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mneme.harness.cli import report_errors
from scripts.reporting.columns import chosen_columns, default_columns, sort_rows
from scripts.reporting.page import evaluation_commands, place, render, training_commands
from scripts.reporting.rows import make_rows, naming_columns
from scripts.reporting.runs import find_runs

COLUMNS = """columns:
  best:METRIC           of the validation at which best.ckpt was kept, as best:accuracy
  eval:METRIC@LENGTH    of eval.py's latest row for the best weights and blocks of LENGTH tokens, as
                        eval:accuracy@8192; LENGTH may be a multiple of the training length, as 4x
  eval:METRIC@LENGTH:carried
                        the same with the state carried from block to block
  budget.parameters     or any other entry of summary.json, nested ones with dots
  COLUMN/COLUMN         one divided by the other, in each run

examples:
  python scripts/report.py runs/2026-01-31_12-00-00_sweep
  python scripts/report.py runs --by mixer --columns best:accuracy,eval:accuracy@4x,tokens
  python scripts/report.py runs --columns best:accuracy,best:stored_bits/budget.parameters
  python scripts/report.py runs --sort best:accuracy/budget.state_bytes
  python scripts/report.py runs/*mqar* --out docs/results/mqar.md --name mqar --title "MQAR"
"""


def report(arguments: Sequence[str]) -> None:
    """Makes the report that a command line asks for, and puts it into its file or prints it.

    Raises:
        ReportError: no runs, an unknown column, nothing to sort by, a file without the markers.
        RunError: a run directory that cannot be read.
    """
    options = report_parser().parse_args(arguments)
    runs = find_runs(options.runs)
    rows = make_rows(runs)
    named_by = naming_columns(rows, _words(options.by))
    words = _words(options.columns)
    columns = (
        chosen_columns(words, runs, options.split)
        if words
        else default_columns(runs, options.split)
    )
    remarks = []
    if options.sort:
        rows, remark = sort_rows(rows, options.sort, runs, options.split)
        remarks.append(remark)
    commands = [
        *([] if options.made_by else training_commands(rows)),
        *evaluation_commands(rows, columns),
        options.made_by or shlex.join(["python", "scripts/report.py", *arguments]),
    ]
    title = f"### {options.title}\n\n" if options.title else ""
    made = title + render(rows, named_by, columns, commands, [*remarks, *options.note])
    if options.out:
        place(made, options.out, options.name)
    print(f"{options.out}: report {options.name!r} of {len(runs)} runs" if options.out else made)


def report_parser() -> argparse.ArgumentParser:
    """The command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python scripts/report.py",
        description=f"{__doc__} A row is a group of runs that differ only in the seed.",
        epilog=COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    parser.add_argument("--by", help="the options that name a row; else all that differ")
    parser.add_argument("--columns", help="what to show of each row; else metric and costs")
    parser.add_argument(
        "--sort",
        metavar="COLUMN",
        help="a column: the largest is first, or the smallest where less is better, as of a loss",
    )
    parser.add_argument(
        "--split",
        choices=["val", "test"],
        help="else val for the metric, and test for columns of evaluations",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("--name", default="table", help="of the table, in the file's markers")
    parser.add_argument("--title", help="a heading above the table")
    parser.add_argument("--note", action="append", default=[], help="a remark below it; repeatable")
    parser.add_argument(
        "--made-by",
        metavar="COMMAND",
        help="the one command that trains these runs and makes this table; shown instead of theirs",
    )
    return parser


def _words(listed: str | None) -> list[str] | None:
    return [word.strip() for word in listed.split(",") if word.strip()] if listed else None


if __name__ == "__main__":
    with report_errors():
        report(sys.argv[1:])
