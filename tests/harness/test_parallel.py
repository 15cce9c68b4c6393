"""Several processes train as one does."""

import pytest

from harness.loggers import read_metrics
from harness.run_directory import RunDirectory
from tests.harness.conftest import TINY, program


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
