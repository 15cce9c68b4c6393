"""Peak memory of one call, in a process of its own: python -m scripts.benchmarks.peak MODULE ARGS.

MODULE has `step(name, number)`, which makes the call. Prints MiB of resident memory at the peak
above what was resident before the call.
"""

import importlib
import resource
import sys
from pathlib import Path


def resident() -> float:
    """MiB of resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(module: str, name: str, number: str) -> None:
    """Make the call and print its peak."""
    call = importlib.import_module(module).step(name, int(number))
    before = resident()
    call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(max(0.0, peak - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
