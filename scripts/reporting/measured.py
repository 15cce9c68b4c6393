"""A table of figures that a program of its own measured, with where they came from."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mneme.harness.cli import whole_number
from mneme.harness.run.provenance import provenance
from scripts.reporting.page import place


def parsed(
    arguments: Sequence[str], *, script: str, description: str | None, name: str
) -> argparse.Namespace:
    """The options of a program that measures several seeds: `seeds`, `out` and `name`.

    Args:
        arguments: what was typed.
        script: its file.
        description: for `--help`.
        name: of the table, if no other is given.
    """
    parser = argparse.ArgumentParser(prog=f"python scripts/{script}", description=description)
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="put the table there")
    parser.add_argument("--name", default=name, help="of the table, in the file's markers")
    return parser.parse_args(arguments)


def publish(report: str, options: argparse.Namespace) -> None:
    """Prints a report, and puts it between its markers in `options.out`, if that is given."""
    if options.out:
        place(report, options.out, options.name)
    print(report)


def measured(
    rows: Sequence[Mapping[str, str]], remarks: Sequence[str], seeds: Sequence[int]
) -> str:
    """Markdown: the table, what must be known to read it, and the command.

    Args:
        rows: cells by column; the columns are those of the first.
        remarks: a sentence each.
        seeds: that every row is a mean over.
    """
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    facts = provenance()
    notes = [*remarks, f"Seeds {', '.join(map(str, seeds))}.", _origin(facts)]
    return "\n\n".join(
        [
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
            "\n".join(f"- {note}" for note in notes),
            f"```bash\n{facts['command']}\n```",
        ]
    )


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean and, of several values, their standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _origin(facts: Mapping[str, Any]) -> str:
    versions = facts["versions"]
    return (
        f"Measured {datetime.now(UTC):%Y-%m-%d}; {facts['hardware']}; Python {versions['python']}, "
        f"torch {versions['torch']}; commit {facts['commit'][:12]}"
        f"{' with uncommitted changes' if '+' in facts['commit'] else ''}."
    )
