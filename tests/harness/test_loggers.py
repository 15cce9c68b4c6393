"""Metrics survive kills and resumption; dashboards are imported only when used."""

import os
import subprocess
import sys

import pytest

from mneme.harness import loggers
from mneme.harness.run.metrics_file import MetricsFile, read_metrics
from mneme.harness.run.run_directory import RunDirectory
from tests.harness.conftest import ROOT


def test_rows_are_written_at_once_and_read_back(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"train/loss": 0.1}, step=1)
    assert read_metrics(file.path) == [{"step": 1, "train/loss": 0.1}]
    file.log_metrics({"val/accuracy": 0.5}, step=1)
    file.log_metrics({"train/loss": 0.2}, step=2)
    assert read_metrics(file.path) == [
        {"step": 1, "train/loss": 0.1},
        {"step": 1, "val/accuracy": 0.5},
        {"step": 2, "train/loss": 0.2},
    ]


def test_resuming_drops_what_came_after_the_checkpoint_and_half_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.log_metrics({"train/loss": step / 7}, step=step)
    with path.open("a") as out:
        out.write("4,0.123")  # cut short by a kill: no end of line
    resumed = MetricsFile(path, resume_step=2)
    resumed.log_metrics({"train/loss": 9.0}, step=3)
    assert [row["train/loss"] for row in read_metrics(path)] == [1 / 7, 2 / 7, 9.0]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsFile(path).log_metrics({"a": 1.0}, step=1)
    MetricsFile(path)
    assert read_metrics(path) == []


def test_training_imports_no_dashboard(tmp_path):
    code = "import sys, train, mneme.harness.run.training; print('wandb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "x" * 40}, "online"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "offline"),
    ],
)
def test_online_only_when_logged_in_and_the_environment_agrees(
    monkeypatch, tmp_path, variables, expected
):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wandb = loggers.Wandb()
    given = "disabled" if wandb.disabled else "offline" if wandb.offline else "online"
    assert given == expected
    if variables.get("WANDB_MODE") in ("offline", "disabled"):
        assert vars(loggers.Wandb(mode="online")) == vars(wandb), "it goes before the config"


def test_a_login_in_netrc_counts(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    os.chmod(netrc, 0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loggers.logged_in()


def test_equal_names_in_two_sweeps_are_two_runs(tmp_path):
    runs = [RunDirectory(tmp_path / sweep / "0") for sweep in ("first", "second")]
    for run in runs:
        run.path.mkdir(parents=True)
    assert [run.name for run in runs] == ["first_0", "second_0"]
    assert runs[0].identity != runs[1].identity
    assert runs[0].identity == RunDirectory(runs[0].path).identity


def test_wandb_offline_writes_into_the_run_directory(train_tiny, capsys):
    run, summary = train_tiny("logger=wandb", "logger.mode=offline")
    assert summary["status"] == "finished"
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))
    said = capsys.readouterr().out
    assert "wandb sync" in said
    assert "wandb leet" in said


def test_tensorboard_writes_into_the_run_directory(train_tiny):
    run, _ = train_tiny("logger=tensorboard")
    assert list(run.path.glob("tensorboard/events*"))


def test_a_disabled_wandb_writes_nothing(train_tiny, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run, summary = train_tiny("logger=wandb")
    assert summary["status"] == "finished"
    assert not list(run.path.rglob("*wandb*"))
    assert "wandb: disabled by WANDB_MODE" in capsys.readouterr().out


def test_a_mode_that_wandb_does_not_have_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match="WANDB_MODE must be online, offline or disabled"):
        loggers.Wandb()


def test_a_wrong_wandb_mode_is_named():
    with pytest.raises(ValueError, match="online, offline or null, got 'sometimes'"):
        loggers.Wandb(mode="sometimes")
