"""What benchmarks share: the matrix-product rate, interleaved timing, tables, rows."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mneme.harness.run.provenance import provenance
from mneme.harness.run.run_directory import finite

Key = TypeVar("Key", bound=Hashable)


def parser(benchmark: str, about: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has, `--quick` and `--json PATH`.

    Args:
        benchmark: its name.
        about: its docstring.
        quick: what `--quick` does.
    """
    made = argparse.ArgumentParser(
        prog=f"bench.py {benchmark}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    return made


def print_provenance() -> None:
    """Print where the measurements below come from."""
    for name, fact in provenance().items():
        print(f"{name}: {fact}")


def seconds(call: Callable[[], object]) -> float:
    """Time of one call; CUDA work is waited for on both sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[Key, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[Key, list[float]]:
    """Time every call once a round, so that a noisy spell of the machine hits all alike."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for index in range(warmup + rounds):
        for key, call in calls.items():
            elapsed = seconds(call)
            if index >= warmup:
                times[key].append(elapsed)
    return times


def spread(times: Sequence[float]) -> float:
    """Interquartile range over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def matrix_product(side: int = 2048) -> tuple[Callable[[], object], float]:
    """A square fp32 product and its operations: the yardstick for rates."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return lambda: a @ b, 2.0 * side**3


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows as aligned columns under their keys."""
    columns = list(rows[0])
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = [[c.rjust(widths[c]) for c in columns]]
    lines += [[row[c].rjust(widths[c]) for c in columns] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def save(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write rows with the command, commit, hardware and versions that made them."""
    record = {**provenance(), **facts, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(record), indent=2) + "\n")
