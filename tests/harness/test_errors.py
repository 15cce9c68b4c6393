"""How errors that nobody foresaw, and those of the system, end a program."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch

from mneme.harness.cli import report_errors
from mneme.harness.config.check import ConfigError
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run.checkpoints import read_checkpoint
from mneme.models.diagnosis import NonFiniteError
from tests.harness.conftest import ROOT, TINY, environment, program


def fault():
    return {}["nothing"]


def no_room():
    raise OSError(errno.ENOSPC, "No space left on device", "/a/file")


def no_memory():
    torch.empty(2**50)


def wrong():
    raise ConfigError(["seed: is wrong"])


def diverged():
    raise NonFiniteError("the loss is nan at step 3")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (fault, 1, ["KeyError in tests/harness/test_errors.py, line", "a fault of the program"]),
        (no_room, 1, ["/a/file: No space left on device; make room there"]),
        (no_memory, 1, ["not enough memory", "smaller"]),
        (wrong, 2, ["seed: is wrong"]),
        (diverged, 1, ["the loss is nan at step 3"]),
    ],
)
def test_an_error_is_one_message_and_with_a_variable_its_traceback(
    monkeypatch, capsys, error, status, words
):
    for shown in ("", "1"):
        monkeypatch.setenv("MNEME_TRACEBACK", shown)
        with pytest.raises(SystemExit) as end, report_errors():
            error()
        said = capsys.readouterr().err
        assert end.value.code == status
        assert all(word in said for word in words)
        assert ("a fault of the program" in said) == (error is fault)
        assert ("MNEME_TRACEBACK=1" in said) == (error is fault)
        assert ("Traceback (most recent call last)" in said) == bool(shown)


def test_metrics_that_are_not_finite_are_a_row_of_valid_json(train_tiny, capsys):
    run, _ = train_tiny()
    checkpoint = read_checkpoint(run.last)
    for weight in checkpoint["state_dict"].values():
        weight.fill_(torch.nan)
    torch.save(checkpoint, run.last)
    evaluate_command([f"run={run.last}", "lengths=[1]"])
    assert "nan" in capsys.readouterr().out
    (line,) = run.evaluations.read_text().splitlines()
    row = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert row["metrics"]["loss"] is None
    assert row["metrics"]["accuracy"] is not None


def test_a_full_disk_ends_a_run_as_failed(tmp_path):
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a file system of its own")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = [*TINY, "model.d_model=64", "task.vocab_size=4096", "trainer.max_steps=20"]
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(options)} run_dir={disk}/run"
    done = subprocess.run(
        [
            *(unshare, "-rm", "sh", "-c"),
            f"mount -t tmpfs -o size=1m tmpfs {disk}; {command}; status=$?;"
            f"cat {disk}/run/summary.json; exit $status",
        ],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left on device; make room there" in done.stderr
    summary = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert summary["status"] == "failed"
    assert "No space left" in summary["error"]


def test_a_home_that_cannot_be_written_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.delenv("MNEME_CACHE", raising=False)
    done = program("train.py", *TINY, "logger=wandb", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = program("train.py", "task=text", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "task: /proc/nobody" in done.stderr
