"""Peak memory of one call, in a process of its own: python -m scripts.benchmarks.peak MODULE ARGS.

MODULE has `step(name, number)`, which makes the call. Prints MiB of resident memory at the peak
above what was resident before the call.
"""

import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peak_memory(module: str, name: str, number: int) -> float:
    """MiB that one call takes at its peak, measured in a process of its own."""
    command = [sys.executable, "-m", "scripts.benchmarks.peak", module, name, str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resident(line: str) -> float:
    """MiB of resident memory: now (VmRSS, RssAnon, RssFile) or at its peak (VmHWM), or NaN."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    (kib,) = (row.split()[1] for row in status.splitlines() if row.startswith(line))
    return int(kib) / 2**10


def main(module: str, name: str, number: str) -> None:
    """Make the call and print its peak."""
    call = importlib.import_module(module).step(name, int(number))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
