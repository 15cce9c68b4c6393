"""Draws one figure of runs: how much they know of facts, by how often training told each."""

import argparse
import io
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mneme.harness.cli import report_errors
from mneme.harness.run.run_directory import write_atomically
from scripts.reporting.columns import Column, chosen_columns
from scripts.reporting.entries import differing
from scripts.reporting.rows import Row, make_rows
from scripts.reporting.runs import ReportError, find_runs, unknown

# The colors of Okabe and Ito, which color-blind readers tell apart; their yellow is too pale.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
SIZE = (700 / 96, 420 / 96)  # inches: 700 pixels wide, at a browser's 96 per inch
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mneme",  # the file names its parts alike each time
    "text.parse_math": False,  # a dollar in a label is a dollar
    "axes.grid": True,
    "grid.color": "#E5E5E5",
}


@dataclass(frozen=True)
class Line:
    """One line: the columns of report.py that its points are from, by their least exposures."""

    name: str
    row: Row
    columns: Mapping[int, Column]

    def points(self) -> list[tuple[float, float]]:
        """Mean and standard deviation over the seeds that have a value."""
        several = [column.values(self.row) for column in self.columns.values()]
        return [(statistics.mean(v), statistics.stdev(v) if v[1:] else 0.0) for v in several]

    def __str__(self) -> str:
        cells = [f"{bucket(low)}: {column.cell(self.row)}" for low, column in self.columns.items()]
        return f"{self.name} (seeds: {self.row.seeds}): {', '.join(cells)}"


def figure(arguments: Sequence[str]) -> None:
    """Draws the figure that a command line asks for, and prints its values.

    Raises:
        ReportError: no runs, a line that is not there or not unique, no matplotlib.
        RunError: a run directory that cannot be read.
    """
    options = figure_parser().parse_args(arguments)
    words = [word.strip() for word in options.lines.split(";")]
    lines = chosen_lines(words, make_rows(find_runs(options.runs)), options.metric)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, draw(lines, options.metric, options.title))
    print(f"{options.out}: {options.metric} by exposures", *lines, sep="\n")


def chosen_lines(words: Sequence[str], rows: Sequence[Row], metric: str) -> list[Line]:
    """The lines of these names, in their order.

    Raises:
        ReportError: a line that no row has, or several have; more lines than colors.
    """
    known = [line for row in rows for line in _lines(row, metric)]
    names = [line.name for line in known]
    if len(words) > len(COLORS):
        raise ReportError(f"--lines: at most {len(COLORS)} can be told apart, got {len(words)}")
    for word in words:
        if word not in names:
            problem = f"--lines: no run that finished has {metric!r} by exposures for {word!r}"
            raise ReportError(unknown(problem, word, sorted({*names}) or ["(none at all)"]))
        if names.count(word) > 1:
            differ = differing([line.row.entries for line in known if line.name == word])
            raise ReportError(
                f"--lines: several rows have a line {word!r}; they differ in {','.join(differ)}; "
                "name the run directories of one"
            )
    return [known[names.index(word)] for word in words]


def _lines(row: Row, metric: str) -> list[Line]:
    """All lines of a row, one for each arm; none of a row without a label."""
    label = row.entries.get("label")
    pattern = re.compile(rf"val/({re.escape(metric)}(/arm=(.+))?/exposures=(\d+))")
    found: dict[str, dict[int, Column]] = {}
    for key in {key for run in row.finished for key in run.best if label is not None}:
        if match := pattern.fullmatch(key):
            name = f"{label}:{match[3]}" if match[3] else f"{label}"
            [column] = chosen_columns([f"best:{match[1]}"], row.finished, None)
            found.setdefault(name, {})[int(match[4])] = column
    return [Line(name, row, dict(sorted(columns.items()))) for name, columns in found.items()]


def bucket(low: int) -> str:
    """The exposures of a decade, which starts at 0 or a power of ten."""
    return f"{low:,}-{10 * low - 1:,}" if low else "0"


def draw(lines: Sequence[Line], metric: str, title: str | None) -> str:
    """An SVG file: means as lines, and a standard deviation to each side as bands."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot, so it looks for no display
    except ImportError as error:
        install = "pip install -r requirements-figures.txt"
        raise ReportError(f"this needs matplotlib: {install}") from error
    lows = sorted({low for line in lines for low in line.columns})
    with matplotlib.rc_context(), io.StringIO() as file:
        matplotlib.rcdefaults()  # a user's own settings change nothing
        matplotlib.rcParams.update(STYLE)
        axes = (whole := Figure(SIZE, layout="constrained")).add_subplot(title=title or "")
        axes.set_xlabel("times that training told the fact")
        axes.set_ylabel(f"{metric} (val): mean ± standard deviation")
        axes.set_xticks(range(len(lows)), [bucket(low) for low in lows])
        for line, color, marker in zip(lines, COLORS, MARKERS, strict=False):
            places = [lows.index(low) for low in line.columns]
            ends = [(mean, mean - spread, mean + spread) for mean, spread in line.points()]
            means, below, above = zip(*ends, strict=True)
            axes.fill_between(places, below, above, color=color, alpha=0.15, linewidth=0)
            axes.plot(places, means, color=color, marker=marker, clip_on=False)
        axes.set_ylim(bottom=0)
        axes.legend(axes.lines, [line.name for line in lines])
        whole.savefig(file, format="svg", metadata={"Date": None})
        return re.sub(r" +$", "", file.getvalue(), flags=re.MULTILINE)


def figure_parser() -> argparse.ArgumentParser:
    """The command line of this program."""
    parser = argparse.ArgumentParser(prog="python scripts/figure.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    parser.add_argument("--lines", required=True, help="LABEL or LABEL:ARM, as 'dense;bank:random'")
    parser.add_argument("--metric", default="accuracy", help="accuracy if not given")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg", help="put it there")
    parser.add_argument("--title", help="above the figure")
    return parser


if __name__ == "__main__":
    with report_errors():
        figure(sys.argv[1:])
