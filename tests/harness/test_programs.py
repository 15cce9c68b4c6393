"""The programs as a user starts them."""

import errno
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys

import pytest

import train
from mneme.harness.cli import report_errors
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import CONFIG_DIR
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory, RunError
from mneme.models import optim
from tests.harness.conftest import ROOT, TINY, program
from tests.harness.test_signals import ran, struck
from tests.harness.test_signals import train as run_train


def script(*arguments):
    """What `python ARGUMENTS` does, for `ran`: in a fork, without the seconds of its imports."""
    sys.argv = list(arguments)
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def test_a_typo_stops_the_run_with_one_message(tmp_path):
    done = program(
        "train.py", "mixer=gated_deltanet", "mixer.haeds=3", "model.n_layers=two",
        "optimizer.lr=fast", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "3 problems in the configuration; nothing was built."
    assert len(lines) == 4
    assert "did you mean 'heads'?" in done.stderr
    assert "expected int, got 'two'" in done.stderr
    assert "expected float, got 'fast'" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_typo_is_answered_before_anything_slow_is_imported(tmp_path):
    """Lightning and Dynamo take several times as long to import as all else."""
    code = (
        "import sys, train\n"
        "for typed in (['mixer.haeds=3', 'task=copy', 'optimizer.lr=fast'], ['mixer=samba']):\n"
        "    try: train.main(typed)\n"
        "    except ValueError as error: print(len(error.problems))\n"
        "print({'lightning', 'torch._dynamo', 'scipy', 'sklearn', 'wandb'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["3", "1", "set()", ""], done.stderr


def test_a_sweep_reports_every_job_and_fails_if_one_does(tmp_path):
    # the second job cannot be built: 3 heads do not divide the width
    status, said = ran(tmp_path, run_train, "-m", *TINY, "mixer.heads=1,3,2")
    assert status == 1, said
    summaries = sorted(tmp_path.glob("runs/*_sweep/*/summary.json"))
    statuses = [json.loads(path.read_text())["status"] for path in summaries]
    assert statuses == ["finished", "failed", "finished"]
    assert "heads (3) must divide d_model (16)" in said.partition("\nsweep:")[2]
    assert said.count("val/accuracy=") >= 2
    failed = json.loads(summaries[1].read_text())
    assert "mixer.heads=3" in failed["overrides"]


def test_a_stopped_sweep_goes_on(tmp_path):
    """Its first job had finished, its second saved nothing yet, its third had not begun."""
    sweep = ["-m", *TINY, "mixer.heads=1,2,4"]
    status, said = ran(tmp_path, run_train, *sweep)
    assert status == 0, said
    (folder,) = tmp_path.glob("runs/*_sweep")
    whole = [read_metrics(folder / str(job) / "metrics.csv") for job in range(3)]
    before = (folder / "0" / "summary.json").read_bytes()
    resumed = RunDirectory(folder / "1")
    resumed.write_summary(status="running")
    rows = resumed.metrics.read_text().splitlines(keepends=True)
    resumed.last.unlink()  # as if it had been killed before its first checkpoint
    resumed.metrics.write_text(rows[0])
    shutil.rmtree(folder / "2")
    status, said = ran(tmp_path, run_train, f"resume={folder}")
    assert status == 0, said
    assert said.count("has finished before") == 1
    assert (folder / "0" / "summary.json").read_bytes() == before
    again = [read_metrics(folder / str(job) / "metrics.csv") for job in range(3)]
    losses = [[row.get("val/loss") for row in rows] for rows in (*whole, *again)]
    assert losses[:3] == losses[3:]
    with pytest.raises(RunError, match="leave out seed=1"):
        train.main([f"resume={folder}", "seed=1"])


def test_the_same_command_starts_a_run_and_goes_on_with_it(tmp_path, capsys):
    """`resume=auto`: before its first step, in its middle, and when it has finished."""
    run = RunDirectory(tmp_path / "run")
    command = ["resume=auto", *TINY, f"run_dir={run.path}"]
    moment = (optim, "clip_by_groups", 4)
    status, said = struck(tmp_path, signal.SIGTERM, moment, run_train, *command)
    assert status == 0, said
    assert run.read_summary()["status"] == "interrupted"
    train.main(command)
    assert run.read_summary()["resumed"][0]["step"] == 4
    assert [row["step"] for row in read_metrics(run.metrics) if "train/loss" in row] == [
        *range(1, 7)
    ]
    before = run.summary.read_bytes()
    train.main(command)
    assert run.summary.read_bytes() == before
    assert f"the run in {run.path} has finished before" in capsys.readouterr().out


def test_a_run_of_other_options_is_not_gone_on_with(train_tiny):
    run, _ = train_tiny()
    before = run.config.read_bytes()
    command = ["resume=auto", *TINY, "optimizer.lr=0.5", "mixer.heads=2", f"run_dir={run.path}"]
    with pytest.raises(
        ConfigError, match=r"of other options: they differ in mixer, model, optimizer; choose"
    ):
        train.main(command)
    assert run.config.read_bytes() == before
    with pytest.raises(ConfigError, match="run_dir: name the directory of the run"):
        train.main(command[:-1])


def test_a_typo_in_a_sweep_stops_it_before_any_job(tmp_path):
    sweep = ["-m", *TINY, "mixer.heads=1,2", "mixer.sise=1,2"]
    status, said = ran(tmp_path, script, "train.py", *sweep)
    assert status == 2
    assert "GatedDeltaNet has no option 'sise'" in said
    assert not list(tmp_path.iterdir())


def test_a_flag_that_does_not_exist_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end, report_errors():
        train.main(["--mixer", "attention"])
    assert end.value.code == 2
    assert "--mixer: there is no such flag" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_lists_the_groups(tmp_path):
    status, said = ran(tmp_path, script, "train.py", "--help")
    assert status == 0
    for group in ("mixer", "ffn", "task", "callbacks"):
        for file in (CONFIG_DIR / group).glob("*.yaml"):
            assert re.search(rf"^  {file.stem} +[A-Z0-9].+", said, re.MULTILINE), file
    assert re.search(r"^  titans_mag +Titans, memory as gate \(arXiv 2501.00663\)", said, re.M)
    assert re.search(r"^  facts +40,000 facts with Zipf's frequencies", said, re.M)
    assert "resume=" in said


@pytest.mark.parametrize(
    "name", ["eval.py", "scripts/budget.py", "scripts/bench.py", "scripts/demo.py"]
)
def test_other_programs_explain_themselves(name, tmp_path):
    status, said = ran(tmp_path, script, name, "--help")
    assert status == 0
    assert "python" in said


def test_budget_prints_the_costs_of_a_composed_model(tmp_path):
    done = program("scripts/budget.py", "mixer=sliding_window", "model=hybrid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "active parameters", "state bytes", "FLOPs per token"):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


def test_budget_checks_its_command_line(tmp_path):
    status, said = ran(tmp_path, script, "scripts/budget.py", "mixer=sliding_windo")
    assert status == 2
    assert "did you mean 'sliding_window'?" in said


@pytest.mark.parametrize(
    "shown", [lambda: print("a line"), lambda: sys.exit(print("a line"))], ids=["ends", "exits"]
)
def test_a_reader_that_has_seen_enough_ends_a_program_without_a_word(monkeypatch, shown):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end, report_errors():
            shown()
    assert end.value.code == 141


@pytest.mark.parametrize("output", [None, io.StringIO()], ids=["none", "no file"])
def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, output):
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as end, report_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert end.value.code == 1
