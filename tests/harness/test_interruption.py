"""A run that is stopped, by whatever, goes on as if it had never stopped."""

import os
import random
import signal
import time

from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from mneme.models.bank import read_manifest, verify_bank
from tests.harness.conftest import TINY, start
from tests.harness.test_signals import Fork, ran, train

STEPS = 130
# Dropout, so that random state matters; validations and checkpoints that do not coincide.
RUN = (
    *TINY,
    "mixer=gated_deltanet",
    "model.dropout=0.1",
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=60",  # batches: 30 updates
    "checkpoint_every=7",
)
BANK = ("ffn=bank", "ffn.bank.branching=2", "ffn.bank.hidden=[4,4]", "callbacks.save_bank.every=10")


def wait_for_step(run: RunDirectory, step: int) -> None:
    """Returns as soon as the run has logged a step."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        rows = read_metrics(run.metrics)
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step} in 90 s")


def require_bank(run: RunDirectory, said: str) -> None:
    """A bank is whole, and not older than the last that was reported."""
    steps = [line.split()[-1] for line in said.splitlines() if line.startswith("saved the bank of")]
    if steps:
        assert verify_bank(run.bank) == []
        assert read_manifest(run.bank).facts["step"] >= int(steps[-1])


def test_killed_five_times_the_curve_is_that_of_a_run_never_killed(tmp_path):
    whole = RunDirectory(tmp_path / "whole")
    status, said = ran(tmp_path, train, *RUN, *BANK, f"run_dir={whole.path}")
    assert status == 0, said
    killed = RunDirectory(tmp_path / "killed")
    arguments = [*RUN, *BANK, f"run_dir={killed.path}"]
    steps = sorted(random.Random().sample(range(1, STEPS - 20), 5))
    for step in steps:
        with (tmp_path / "output").open("w") as output:
            fork = Fork(train, *arguments, output=output.fileno())
            wait_for_step(killed, step)
            os.kill(fork.id, signal.SIGKILL)
        said = (tmp_path / "output").read_text()
        assert fork.ended() == -signal.SIGKILL, said
        require_bank(killed, said)
        arguments = [f"resume={killed.path}"]
    status, said = ran(tmp_path, train, *arguments)
    assert status == 0, said
    stitched, uninterrupted = read_metrics(killed.metrics), read_metrics(whole.metrics)
    assert len(uninterrupted) == STEPS + STEPS // 30 + 1
    assert stitched == uninterrupted, f"killed after steps {steps}"
    assert read_manifest(killed.bank).facts["step"] == STEPS


def test_ctrl_c_from_outside_saves_and_ends_the_run_with_one_line(tmp_path):
    """A program of its own; test_signals.py has every moment and SIGTERM."""
    run = RunDirectory(tmp_path / "run")
    endless = [*RUN, "trainer.max_steps=100000", f"run_dir={run.path}"]
    process = start("train.py", *endless, cwd=tmp_path)
    try:
        wait_for_step(run, 5)
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"train.py resume={run.path}" in said
    assert "stopped by SIGINT" in said
    assert run.read_summary()["status"] == "interrupted"
    last = read_metrics(run.metrics)[-1]["step"]
    assert f"{last} steps are saved" in said
