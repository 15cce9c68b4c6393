"""Run a benchmark by name: python scripts/bench.py matrix [--quick] [--json PATH].

A benchmark is a module of `scripts/benchmarks/` with a `run(arguments)`.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
SHARED = {"__init__", "cold_reads", "measure", "peak", "random_bank"}  # what benchmarks import


def names() -> list[str]:
    """Names of the benchmarks, from the files that are there."""
    found = {path.stem for path in BENCHMARKS.glob("*.py")}
    return sorted(found - SHARED)


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; 2 if there is no such benchmark."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(
            f"{__doc__.strip()}\n\nThere are: {', '.join(names())}; --help after a name says more."
        )
        return 0
    if not arguments or arguments[0] not in names():
        given = f"no benchmark '{arguments[0]}'" if arguments else "name a benchmark"
        print(f"{given}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    from mneme.harness.cli import report_errors

    with report_errors():
        importlib.import_module(f"scripts.benchmarks.{arguments[0]}").run(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
