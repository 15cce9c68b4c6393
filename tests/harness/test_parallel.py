"""Several processes train as one does."""

import signal
import time

import pytest

from harness.loggers import read_metrics
from harness.run_directory import RunDirectory
from tests.harness.conftest import TINY, program, start


def test_two_processes_equal_one_that_accumulates_two_batches(tmp_path):
    runs = {}
    for name, options in {
        "one": ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6"],
        "two": ["trainer.devices=2", "trainer.strategy=ddp", "trainer.val_check_interval=3"],
    }.items():
        runs[name] = RunDirectory(tmp_path / name)
        done = program("train.py", *TINY, f"run_dir={runs[name].path}", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("run directory:") == 1
    one, two = (read_metrics(runs[name].metrics) for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row_one, row_two in zip(one, two, strict=True):
        for name, value in row_one.items():
            assert row_two[name] == pytest.approx(value, rel=1e-4), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_a_signal_to_one_process_stops_both(tmp_path):
    run = RunDirectory(tmp_path / "run")
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=100000"]
    process = start("train.py", *TINY, f"run_dir={run.path}", *two, cwd=tmp_path)
    deadline = time.monotonic() + 90
    while len(read_metrics(run.metrics)) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert "stopped by SIGTERM" in said, said
    assert process.returncode == 0
    assert run.read_summary()["status"] == "interrupted"
