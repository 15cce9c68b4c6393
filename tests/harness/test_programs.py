"""The programs as a user starts them."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest

import train
from mneme.harness.cli import report_errors
from mneme.harness.config.compose import CONFIG_DIR
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from tests.harness.conftest import ROOT, TINY, program


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
    done = program("train.py", "-m", *TINY, "mixer.heads=1,3,2", cwd=tmp_path, timeout=240)
    assert done.returncode == 1, done.stderr
    summaries = sorted(tmp_path.glob("runs/*_sweep/*/summary.json"))
    statuses = [json.loads(path.read_text())["status"] for path in summaries]
    assert statuses == ["finished", "failed", "finished"]
    assert "heads (3) must divide d_model (16)" in done.stdout
    assert done.stdout.count("val/accuracy=") >= 2


def test_a_stopped_sweep_goes_on(tmp_path):
    """Its first job had finished, its second saved nothing yet, its third had not begun."""
    sweep = ["-m", *TINY, "mixer.heads=1,2,4"]
    done = program("train.py", *sweep, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*_sweep")
    whole = [read_metrics(folder / str(job) / "metrics.csv") for job in range(3)]
    before = (folder / "0" / "summary.json").read_bytes()
    resumed = RunDirectory(folder / "1")
    resumed.write_summary(status="running")
    rows = resumed.metrics.read_text().splitlines(keepends=True)
    resumed.last.unlink()  # as if it had been killed before its first checkpoint
    resumed.metrics.write_text(rows[0])
    shutil.rmtree(folder / "2")
    done = program("train.py", f"resume={folder}", cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has finished before") == 1
    assert (folder / "0" / "summary.json").read_bytes() == before
    again = [read_metrics(folder / str(job) / "metrics.csv") for job in range(3)]
    losses = [[row.get("val/loss") for row in rows] for rows in (*whole, *again)]
    assert losses[:3] == losses[3:]
    done = program("train.py", f"resume={folder}", "seed=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "leave out seed=1" in done.stderr


def test_a_typo_in_a_sweep_stops_it_before_any_job(tmp_path):
    done = program("train.py", "-m", *TINY, "mixer.heads=1,2", "mixer.sise=1,2", cwd=tmp_path)
    assert done.returncode == 2
    assert "GatedDeltaNet has no option 'sise'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_flag_that_does_not_exist_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end, report_errors():
        train.main(["--mixer", "attention"])
    assert end.value.code == 2
    assert "--mixer: there is no such flag" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_lists_the_groups(tmp_path):
    done = program("train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    mixers = sorted(path.stem for path in (CONFIG_DIR / "mixer").glob("*.yaml"))
    assert f"mixer: {', '.join(mixers)}" in " ".join(done.stdout.split())
    assert "resume=" in done.stdout


@pytest.mark.parametrize(
    "script", ["eval.py", "scripts/budget.py", "scripts/bench.py", "scripts/demo.py"]
)
def test_other_programs_explain_themselves(script, tmp_path):
    done = program(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "python" in done.stdout


def test_budget_prints_the_costs_of_a_composed_model(tmp_path):
    done = program("scripts/budget.py", "mixer=sliding_window", "model=hybrid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "active parameters", "state bytes", "FLOPs per token"):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


def test_budget_checks_its_command_line(tmp_path):
    done = program("scripts/budget.py", "mixer=sliding_windo", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'sliding_window'?" in done.stderr


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
