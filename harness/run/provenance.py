"""Where a number came from: command, commit, hardware, versions."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """The facts that a result needs beside it to be trusted."""
    return {
        "command": command(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
    }


def command() -> str:
    """What was typed, as it can be pasted into a shell at the root of a checkout."""
    return shlex.join([*program(sys.argv[0]), *sys.argv[1:]])


def program(name: str = "train.py") -> list[str]:
    """How a program of this project is started: by its file, or as a module where it is installed.

    Args:
        name: its path, or that from the root.
    """
    path = (ROOT / name).resolve()
    if not path.is_relative_to(ROOT):
        return ["python", name]  # one that uses this project
    inside = path.relative_to(ROOT)
    if (ROOT / "pyproject.toml").exists():
        return ["python", str(inside)]
    return ["python", "-m", ".".join(["mneme", *inside.with_suffix("").parts])]


def commit() -> str:
    """The commit of this project, with `+changes` where the tree differs; `unknown` without git.

    An installed package is no checkout, whatever repository its environment may lie in.
    """
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """Processor, cores and threads in use, and the GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return "; ".join([cpu, *gpus])


def config_hash(config: dict[str, Any]) -> str:
    """A short name of what was run: equal configs but for seed and run directory share it."""
    compared = {k: v for k, v in config.items() if k not in ("run_dir", "seed", "logger")}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:12]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
