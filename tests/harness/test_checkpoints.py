"""Checkpoints are whole or absent; what is not one of ours is refused and nothing is lost."""

import json
import math
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch

from mneme.harness.config.check import ConfigError
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run import provenance
from mneme.harness.run.checkpoints import Checkpoints, checkpoint_config, read_checkpoint
from mneme.harness.run.jobs import resume_run
from mneme.harness.run.run_directory import (
    RunDirectory,
    RunError,
    find_run,
    new_run_directory,
    write_atomically,
)
from mneme.tasks import MQAR


def test_a_run_leaves_the_best_and_the_last(train_tiny):
    run, summary = train_tiny()
    assert read_checkpoint(run.last)["global_step"] == 6
    assert read_checkpoint(run.best)["global_step"] in (3, 6)
    assert sorted(p.name for p in run.last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert summary["status"] == "finished"
    assert summary["steps"] == 6
    assert summary["tokens"] == 6 * 4 * 16


def test_a_checkpoint_carries_its_config(train_tiny):
    run, _ = train_tiny()
    assert checkpoint_config(read_checkpoint(run.best)) == run.read_config()


def test_a_truncated_checkpoint_is_refused_and_kept(train_tiny):
    run, _ = train_tiny()
    whole = run.last.read_bytes()
    run.write_summary(status="interrupted")
    run.last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"last\.ckpt is truncated or not a checkpoint"):
        resume_run(str(run.path))
    assert run.last.read_bytes() == whole[: len(whole) // 2]


def test_a_foreign_checkpoint_is_refused(train_tiny):
    run, _ = train_tiny()
    run.write_summary(status="interrupted")
    torch.save({"state_dict": {}, "global_step": 3}, run.last)
    rows = run.metrics.read_text()
    with pytest.raises(RunError, match="was not written by this project"):
        resume_run(str(run.path))
    assert run.metrics.read_text() == rows


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"mneme": Malicious()}, path)
    with pytest.raises(RunError, match="truncated or not a checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(RunError, match="truncated or not a checkpoint"):
        read_checkpoint(path)


def test_a_target_in_a_checkpoint_is_held_to_the_allow_list(train_tiny):
    run, _ = train_tiny()
    checkpoint = read_checkpoint(run.best)
    config = json.loads(checkpoint["mneme"]["config"])
    config["task"]["_target_"] = "subprocess.Popen"
    checkpoint["mneme"]["config"] = json.dumps(config)
    torch.save(checkpoint, run.best)
    with pytest.raises(ConfigError, match=r"subprocess\.Popen' may not be built"):
        evaluate_command([f"run={run.path}"])


def test_a_later_format_is_named(train_tiny):
    run, _ = train_tiny()
    checkpoint = read_checkpoint(run.best)
    checkpoint["mneme"]["format"] = 99
    torch.save(checkpoint, run.best)
    with pytest.raises(RunError, match="has checkpoint format 99; this version reads 1"):
        read_checkpoint(run.best)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_run_never_takes_a_directory_that_holds_one(train_tiny, tmp_path):
    train_tiny()
    with pytest.raises(ConfigError, match=r"already holds a run; continue it with resume="):
        train_tiny()


def test_two_runs_of_one_second_get_two_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {new_run_directory(None, {"task": "mqar", "mixer": "x"}, 0).path for _ in range(3)}
    assert len(paths) == 3


def test_an_address_without_a_run_says_so(tmp_path):
    with pytest.raises(RunError, match="there is no run at"):
        find_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is not a run directory: it has no config\.yaml"):
        resume_run(str(tmp_path))


def test_resuming_takes_no_other_options(train_tiny):
    run, _ = train_tiny()
    with pytest.raises(RunError, match=r"leave out seed=4"):
        resume_run(str(run.path), ["seed=4"])


def test_a_finished_run_is_not_resumed(train_tiny):
    run, _ = train_tiny()
    with pytest.raises(RunError, match="has finished, after 6 steps"):
        resume_run(str(run.path))


def interrupted(train_tiny, *overrides, name="run"):
    run, _ = train_tiny(*overrides, name=name)
    run.write_summary(status="interrupted")
    return run


def test_the_config_in_the_run_directory_is_checked_too(train_tiny):
    run = interrupted(train_tiny)
    config = run.read_config()
    config["mixer"]["haeds"] = 3
    run.write_config(config)
    with pytest.raises(ConfigError, match="did you mean 'heads'"):
        resume_run(str(run.path))


def test_a_checkpoint_of_another_run_is_refused(train_tiny):
    run = interrupted(train_tiny)
    other, _ = train_tiny("seed=9", "optimizer.lr=0.3", name="other")
    run.last.write_bytes(other.last.read_bytes())
    with pytest.raises(RunError, match="they differ in optimizer, seed, task; nothing was loaded"):
        resume_run(str(run.path))


def test_a_run_killed_before_its_first_checkpoint_begins_again(train_tiny, tmp_path):
    run, summary = train_tiny()
    early = RunDirectory(tmp_path / "early")
    early.path.mkdir()
    early.write_config(run.read_config())
    resume_run(str(early.path))
    assert early.read_summary()["metrics"] == summary["metrics"]
    assert early.metrics.read_text() == run.metrics.read_text()


def test_a_run_without_its_checkpoint_keeps_its_metrics(train_tiny):
    run = interrupted(train_tiny)
    run.last.unlink()
    rows = run.metrics.read_text()
    with pytest.raises(RunError, match=r"has metrics but no last\.ckpt"):
        resume_run(str(run.path))
    assert run.metrics.read_text() == rows


def test_a_run_killed_after_its_last_step_is_finished_with_its_metrics(train_tiny):
    run, summary = train_tiny()
    rows = run.metrics.read_text()
    run.write_summary(status="running", metrics={})
    resume_run(str(run.path))
    resumed = run.read_summary()
    assert resumed["status"] == "finished"
    assert resumed["metrics"] == summary["metrics"]
    assert run.metrics.read_text() == rows


def test_a_resumed_run_keeps_the_command_that_started_it(train_tiny):
    run = interrupted(train_tiny)
    command = run.read_summary()["command"]
    run.write_summary(command="the first")
    resume_run(str(run.path))
    assert run.read_summary()["command"] == "the first"
    assert run.read_summary()["resumed"][0]["command"] == command
    assert run.read_summary()["resumed"][0]["step"] == 6


def test_a_summary_that_is_broken_is_named(train_tiny):
    run = interrupted(train_tiny)
    run.summary.write_text("{")
    with pytest.raises(RunError, match=r"summary\.json is not JSON"):
        resume_run(str(run.path))


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(RunDirectory(tmp_path), {}, task=MQAR(), every=1)
    trainer = SimpleNamespace(sanity_checking=False, global_step=1, callback_metrics={})
    saved = trainer.saved = []
    trainer.save_checkpoint = lambda path: saved.append(path.name)
    for value in (math.nan, 0.2, math.inf, 0.1, 0.3):
        trainer.callback_metrics["val/accuracy"] = torch.tensor(value)
        checkpoints.on_validation_end(trainer, None)
    assert saved.count("best.ckpt") == 2
    assert checkpoints.best == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        (
            ["train.py", "mixer=gla", "run_dir=my runs"],
            "python train.py mixer=gla 'run_dir=my runs'",
        ),
        (["scripts/budget.py"], "python scripts/budget.py"),
        (["/elsewhere/mine.py", "1"], "python /elsewhere/mine.py 1"),
    ],
)
def test_a_command_can_be_pasted(monkeypatch, typed, command):
    monkeypatch.setattr(sys, "argv", typed)
    assert provenance.command() == command
    for name in ("train.py", "scripts/budget.py"):  # wherever it was typed
        if typed[0] == name:
            monkeypatch.setattr(sys, "argv", [str(provenance.ROOT / name), *typed[1:]])
            assert provenance.command() == command


def test_a_command_of_an_installed_package_names_its_module(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "site-packages" / "mneme")
    assert provenance.program() == ["python", "-m", "mneme.train"]
