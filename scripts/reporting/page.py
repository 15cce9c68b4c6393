"""The report as Markdown: the table, what must be known to read it, where it came from."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mneme.harness.run.run_directory import write_atomically
from scripts.reporting.columns import Column, number, text
from scripts.reporting.entries import compared, covered, differing, named
from scripts.reporting.rows import Row
from scripts.reporting.runs import ReportError, Run

_SEEDS = "seeds"
_UNRELATED = ("task.batch_size", "task.seq_len")  # of an evaluation: its length is in the column
_ORIGIN = {"commit", "hardware", "versions"}
_SHOWN = 12  # digits of a commit


def render(
    rows: Sequence[Row],
    named_by: Sequence[str],
    columns: Sequence[Column],
    commands: Sequence[str],
    remarks: Sequence[str] = (),
) -> str:
    """The whole report but its title.

    Args:
        rows: of the table, in order.
        named_by: the options that name a row.
        columns: what is shown of each.
        commands: that made the report.
        remarks: what else there is to say of the table, a sentence each.
    """
    notes = [*_notes(rows, named_by, columns), *remarks, *_provenance(rows, columns)]
    parts = [
        table(rows, named_by, columns),
        _bullets(notes),
        "\n".join(["```bash", *commands, "```"]),
    ]
    return "\n\n".join(part for part in parts if part)


def table(rows: Sequence[Row], named_by: Sequence[str], columns: Sequence[Column]) -> str:
    """One line per row; seeds come after the first column, so that no spread is read without."""
    heads = [*(column.label for column in columns)]
    heads.insert(1, _SEEDS)
    lines = [
        [*named_by, *heads],
        ["---"] * len(named_by) + ["---:"] * len(heads),
    ]
    for row in rows:
        cells = [column.cell(row) for column in columns]
        cells.insert(1, row.seeds)
        lines.append([*_name(row, named_by), *cells])
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def training_commands(rows: Sequence[Row]) -> list[str]:
    """What was typed to train, each once; where a run wrote makes no difference."""
    runs = [run for row in rows for run in (*row.runs, *row.repeats)]
    return _typed(run.summary["command"] for run in runs if "command" in run.summary)


def evaluation_commands(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """What was typed for the evaluations that figures are from."""
    return _typed(evaluation["command"] for evaluation in _evaluations(rows, columns))


def place(report: str, out: Path, name: str) -> None:
    """Puts a report between its markers in a file, and leaves the rest of the file as it is.

    Args:
        report: Markdown.
        out: a file with the markers, or one that does not exist yet.
        name: of the report, in its markers.

    Raises:
        ReportError: the file exists, and does not have the markers, once and in order.
    """
    start, end = f"<!-- report: {name} -->", "<!-- /report -->"
    before, after = "", "\n"
    if out.exists():
        before, found, rest = out.read_text().partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed or "<!-- report:" in rest.partition(end)[0] or start in after:
            raise ReportError(
                f"{out}: needs the line {start} once and {end} after it; put the two lines where "
                "the table is to go"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, f"{before}{start}\n\n{report}\n\n{end}{after}")


def _name(row: Row, named_by: Sequence[str]) -> list[str]:
    if row.entries:
        return [text(row.names.get(path, "")) for path in named_by]
    run = row.runs[0]  # its config is not known
    return [" ".join(run.summary.get("overrides", [])) or str(run.path), *[""] * len(named_by[1:])]


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", " ")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _notes(
    rows: Sequence[Row], named_by: Sequence[str], columns: Sequence[Column]
) -> Iterable[str]:
    """What a reader would get wrong without being told."""
    if any(column.word.startswith(("best:", "eval:")) for column in columns):
        yield "Metrics are those of best.ckpt, the weights with the best validation."
    if any(len(row.finished) > 1 for row in rows):
        yield "Mean over the seeds that finished ± their standard deviation."
    lengths = sorted({run.seq_len for run in _runs(rows) if run.seq_len})
    if lengths and any(column.word == "budget.state_bytes" for column in columns):
        yield f"State bytes: per sequence, after {', '.join(f'{n:,}' for n in lengths)} tokens."
    differ = differing([row.entries for row in rows if row.entries])
    if hidden := [path for path in differ if not covered(path, named_by)]:
        yield f"The rows differ in {', '.join(hidden)}, too."
    for column in columns:
        yield from _evaluated_differently(rows, named_by, column)
    for run in _runs(rows):
        if not run.finished:
            reason = f": {run.error}" if run.error else ""
            yield f"{run.path} (seed {run.seed}): {run.status}{reason}"
    for run in (run for row in rows for run in row.repeats):
        yield (
            f"{run.path} is left out{_best(run)}: a later run has its config and seed {run.seed}."
        )


def _best(run: Run) -> str:
    return f" ({run.monitor} {number(run.best_value)})" if run.best else ""


def _evaluated_differently(
    rows: Sequence[Row], named_by: Sequence[str], column: Column
) -> Iterable[str]:
    found = _evaluations(rows, [column])
    tasks = [named(compared({"task": e["task"]})) for e in found]
    ignored = (*_UNRELATED, *named_by)
    if differ := [path for path in differing(tasks) if not covered(path, ignored)]:
        yield f"{column.word}: not all were evaluated alike; they differ in {', '.join(differ)}."


def _provenance(rows: Sequence[Row], columns: Sequence[Column]) -> Iterable[str]:
    runs = [run for row in rows for run in (*row.runs, *row.repeats)]
    trained = [[run.summary, *run.summary.get("resumed", [])] for run in runs]
    yield _origin("Trained", [run.started for run in runs], trained)
    if evaluations := _evaluations(rows, columns):
        yield _origin("Evaluated", [e["time"] for e in evaluations], [[e] for e in evaluations])


def _origin(what: str, times: Sequence[str], records: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Dates, hardware, versions and commits; each item of `records` is one run or evaluation."""
    every = [r for group in records for r in group if all(r.get(name) for name in _ORIGIN)]
    days = sorted({time[:10] for time in times})
    versions = [
        f"Python {record['versions'].get('python')}, torch {record['versions'].get('torch')}"
        for record in every
    ]
    facts = [
        " to ".join(dict.fromkeys([days[0], days[-1]])),
        " / ".join(dict.fromkeys(record["hardware"] for record in every)),
        " / ".join(dict.fromkeys(versions)),
        _commits(records),
    ]
    return f"{what}: {'; '.join(fact for fact in facts if fact)}."


def _commits(records: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """One commit, or how many runs come from which."""
    counts: Counter[str] = Counter()
    for group in records:
        counts.update({record["commit"] for record in group if record.get("commit")})
    if len(counts) <= 1:
        return "".join(f"commit {_commit(name)}" for name in counts)
    each = ", ".join(f"{_commit(name)}: {n}" for name, n in counts.items())
    return f"**not all from one commit** ({each})"


def _commit(name: str) -> str:
    commit, plus, _ = name.partition("+")
    return commit[:_SHOWN] + (" with uncommitted changes" if plus else "")


def _typed(commands: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_without_place(command) for command in commands))


def _without_place(command: str) -> str:
    words = [word for word in shlex.split(command) if not word.startswith("run_dir=")]
    if words[0].endswith(".py"):  # of a run of before commands could be pasted
        words.insert(0, "python")
    return shlex.join("run=RUN" if word.startswith("run=") else word for word in words)


def _evaluations(rows: Sequence[Row], columns: Sequence[Column]) -> list[Mapping[str, Any]]:
    """The evaluations that the table's figures are from."""
    readers = [column.evaluation for column in columns if column.evaluation]
    runs = [run for row in rows for run in row.finished]
    return [found for run in runs for read in readers if (found := read(run)) is not None]


def _runs(rows: Sequence[Row]) -> list[Run]:
    return [run for row in rows for run in row.runs]
