"""Several processes train as one does."""

import signal
import time

import pytest
import torch

import train
from mneme.harness.run.checkpoints import read_checkpoint
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from tests.harness.conftest import TINY, program, start
from tests.helpers import assert_close

# One table that both blocks read: larger than what two small batches touch.
SHARED_TABLE = (
    *(option for option in TINY if option != "ffn=none"),
    "ffn=pkm",
    "ffn.sub_keys=16",
    "ffn.heads=1",
    "ffn.top_k=2",
    "ffn.table.share=memory",
    "callbacks=usage",
    "task.test_examples=12",  # three batches: the second process has a copy to leave out
)


def two_ways(tmp_path, *options):
    """The same run by one process that accumulates two batches, and by two processes."""
    runs = {name: RunDirectory(tmp_path / name) for name in ("one", "two")}
    accumulating = ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6"]
    train.main([*options, f"run_dir={runs['one'].path}", *accumulating])
    # The second process finds the run that the first has begun.
    parallel = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.val_check_interval=3"]
    begun = ["resume=auto", *options, f"run_dir={runs['two'].path}", *parallel]
    done = program("train.py", *begun, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory:") == 1
    one, two = (read_metrics(run.metrics) for run in runs.values())
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row_one, row_two in zip(one, two, strict=True):
        for name, value in row_one.items():
            assert row_two[name] == pytest.approx(value, rel=1e-4), name
    return runs


def test_two_processes_equal_one_that_accumulates_two_batches(tmp_path):
    two_ways(tmp_path, *TINY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_two_processes_write_the_tables_that_one_writes(tmp_path):
    runs = two_ways(tmp_path, *SHARED_TABLE)
    tables = []
    for run in runs.values():
        checkpoint = read_checkpoint(run.last)
        table = checkpoint["state_dict"]["model.tables.memory.weight"]
        (state,) = (s for s in checkpoint["optimizer_states"][0]["state"].values() if is_lazy(s))
        assert state["step"] == 6
        tables.append({"table": table, "mean": state["exp_avg"], "square": state["exp_avg_sq"]})
    one, two = tables
    for name, tensor in two.items():
        assert_close(tensor, one[name], name, 1e-4)
    touched = [tensors["square"].ne(0).any(1) for tensors in tables]
    assert torch.equal(*touched)
    assert 0 < touched[0].sum() < len(touched[0]), "some rows are read and some are not"


def is_lazy(state):
    return isinstance(state["step"], int)


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
