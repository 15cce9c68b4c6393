"""A training run that takes a second, in process or as a program of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mneme.harness.config.compose import compose_checked
from mneme.harness.run.jobs import start_run

ROOT = Path(__file__).parents[2]

TINY = (
    "model=recall",
    "ffn=none",
    "logger=csv",
    "mixer.heads=1",
    "model.d_model=16",
    "task.seq_len=16",
    "task.vocab_size=32",
    "task.pairs=2",
    "task.test_pairs=[2]",
    "task.batch_size=4",
    "task.test_examples=8",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "checkpoint_every=2",
)


@pytest.fixture
def train_tiny(tmp_path):
    """Trains in this process; returns the run directory and the summary."""

    def run(*overrides: str, name: str = "run"):
        composed = compose_checked([*TINY, f"run_dir={tmp_path / name}", *overrides])
        return start_run(composed)

    return run


def program(*arguments: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs one of the programs at the project's root, from an empty directory."""
    return subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts a program without waiting for it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def environment() -> dict[str, str]:
    """One thread, as several programs run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
