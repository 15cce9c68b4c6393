"""One process at a time trains in a run directory; a dead one's lock is no obstacle."""

import os
import signal
import time

import pytest

from mneme.harness.config.check import ConfigError
from mneme.harness.run.jobs import resume_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory, RunError
from mneme.harness.run.run_lock import LOCK, alone
from tests.harness.conftest import TINY, start


def wait_until(happened, process) -> None:
    deadline = time.monotonic() + 90
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happened(), process.communicate(timeout=60)[0]


def test_a_run_that_trains_is_neither_resumed_nor_started_again(tmp_path, train_tiny):
    run = RunDirectory(tmp_path / "run")
    process = start(
        "train.py", *TINY, "trainer.max_steps=100000", f"run_dir={run.path}", cwd=tmp_path
    )
    try:
        wait_until(lambda: len(read_metrics(run.metrics)) > 3, process)
        process.send_signal(signal.SIGSTOP)  # it holds the lock, and takes no time from the test
        holder = f"is being trained by process {process.pid} on {os.uname().nodename}, since 20"
        before = run.metrics.read_bytes()
        with pytest.raises(RunError, match=holder):
            resume_run(str(run.path))
        config = run.config.read_text()
        run.config.unlink()  # as just before it is written
        with pytest.raises(RunError, match=holder):
            train_tiny()
        run.config.write_text(config)
        assert run.metrics.read_bytes() == before
    finally:
        process.kill()
        process.communicate(timeout=60)
    half = [run.path / ".summary.json.0123456789abcdef", run.last.parent / f".last.ckpt.{'a' * 16}"]
    kept = [run.path / ".notes", run.last.parent / "kept.0123456789abcdef"]
    for path in (*half, *kept):
        path.write_text("half")
    with alone(run.path):  # the lock went with its process
        assert not any(path.exists() for path in half)
        assert all(path.exists() for path in kept)


def test_the_lock_goes_to_one_of_two_new_runs(train_tiny, monkeypatch):
    """The second has passed its first look at the directory when the first one takes it."""
    from mneme.harness.run import jobs

    original = jobs.prepare

    def overtaken(config, **options):
        monkeypatch.setattr(jobs, "prepare", original)
        train_tiny()
        return original(config, **options)

    monkeypatch.setattr(jobs, "prepare", overtaken)
    with pytest.raises(ConfigError, match="already holds a run; continue it with resume="):
        train_tiny("seed=5")


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_what_is_no_lock_is_not_opened(tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "run" / LOCK
    path.parent.mkdir()
    {
        "link": lambda: path.symlink_to(victim),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises(RunError, match=r"\.lock"), alone(path.parent):
        pass
    assert victim.read_text() == "mine"
