"""Follows docs/adding-a-layer.md to the letter, in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = (
    "configs",
    "harness",
    "layers",
    "mneme",
    "models",
    "ops",
    "routers",
    "storage",
    "tasks",
    "tests",
)
FILES = ("pyproject.toml", "train.py", "eval.py")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with the toy layer of the page added, and nothing else changed."""
    path = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, path / part, symlinks=True, ignore=without)
    for file in FILES:
        shutil.copy(ROOT / file, path / file)
    page = (ROOT / "docs" / "adding-a-layer.md").read_text()
    layer, line, config = re.findall(r"^```(?:python|yaml)\n(.*?)^```", page, re.M | re.S)
    (path / "layers" / "recurrent" / "running_average.py").write_text(layer)
    (path / "configs" / "mixer" / "running_average.yaml").write_text(config)
    registry, place = path / "layers" / "__init__.py", "from mneme.layers.recurrent.s4d import"
    registry.write_text(registry.read_text().replace(place, line + place))
    return path


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=path, env=environment, capture_output=True, text=True, timeout=280
    )


def test_the_conformance_tests_pick_the_layer_up(copy):
    selected = "(RunningAverage or running_average) and not compile"
    done = run(copy, "-m", "pytest", "-q", "-p", "no:xdist", "tests/conformance", "-k", selected)
    assert done.returncode == 0, done.stdout
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    # two instances under every test of layers, the config in a model and in a training step
    assert passed >= 2 * 15 + 7 + 1


def test_leaving_out_the_registry_line_is_a_failure(copy):
    registry = copy / "layers" / "__init__.py"
    whole = registry.read_text()
    registry.write_text(
        whole.replace("from mneme.layers.recurrent.running_average import RunningAverage\n", "")
    )
    try:
        done = run(
            copy, "-m", "pytest", "-q", "-p", "no:xdist", "tests/conformance/test_registry.py"
        )
    finally:
        registry.write_text(whole)
    assert done.returncode == 1
    assert "layers does not import RunningAverage" in done.stdout


def test_the_command_line_offers_the_layer(copy, tmp_path):
    small = ["task.seq_len=16", "task.pairs=2", "task.test_pairs=[2]", "trainer.max_steps=2"]
    options = ["model=recall", "ffn=none", "logger=csv", f"run_dir={tmp_path / 'run'}", *small]
    whole = ["mixer=running_average", "mixer.half_life=3", *options]
    two = f"import train; train.main({whole!r}); train.main(['mixer=running_averag'])"  # one start
    done = run(copy, "-c", two)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert "did you mean 'running_average'?" in done.stderr


def test_the_page_is_formatted_as_the_project_is(copy):
    for arguments in (["check"], ["format", "--check"]):
        done = run(copy, "-m", "ruff", *arguments, "layers")
        assert done.returncode == 0, done.stdout
