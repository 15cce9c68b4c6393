"""The demo, and what all scripts share."""

import signal
from pathlib import Path

import pytest

from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from mneme.models import optim
from scripts import demo
from tests.harness.test_signals import struck

SMALL = [
    "model.d_model=16",
    "mixer.heads=1",
    "task.seq_len=16",
    "task.pairs=2",
    "task.test_pairs=[2]",
    "task.test_examples=8",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
]
SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.py"))


def test_after_ctrl_c_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MIXERS", ("gated_deltanet", "sliding_window"))
    moment = (optim, "clip_by_groups", 9)  # in the third of six steps of the second model
    status, said = struck(tmp_path, signal.SIGINT, moment, demo.main, SMALL)
    assert status == 130, said
    (folder,) = tmp_path.glob("runs/demo_*")
    first, second = (RunDirectory(folder / mixer) for mixer in demo.MIXERS)
    before = first.summary.read_bytes()
    demo.main(SMALL)
    assert first.summary.read_bytes() == before
    assert second.read_summary()["resumed"][0]["step"] == 3
    steps = [row["step"] for row in read_metrics(second.metrics) if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    shown = capsys.readouterr().out
    assert f"the run in runs/{folder.name}/gated_deltanet has finished before" in shown
    assert "64 tokens (4x)" in shown


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_finds_the_project_in_the_same_way(script):
    lines = [line for line in script.read_text().splitlines() if "sys.path" in line]
    assert lines == ["sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"]
