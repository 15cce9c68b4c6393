"""Checkpoints are whole or absent; what is not one of ours is refused and nothing is lost."""

import json
import pickle

import pytest
import torch

from harness.check import ConfigError
from harness.checkpoints import checkpoint_config, read_checkpoint
from harness.eval_command import evaluate_command
from harness.jobs import resume_run
from harness.run_directory import RunError, find_run, new_run_directory, write_atomically
from harness.schema import check_config


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


def test_the_config_in_the_run_directory_is_checked_too(train_tiny):
    run, _ = train_tiny()
    config = run.read_config()
    config["mixer"]["haeds"] = 3
    with pytest.raises(ConfigError, match="haeds"):
        check_config(config)
