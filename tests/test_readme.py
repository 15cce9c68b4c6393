"""What the README says is so."""

import re
import shlex
from pathlib import Path

import pytest

from mneme.harness.config.compose import check_sweep, compose_checked
from mneme.layers import LAYERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^\.venv/bin/python (train\.py|scripts/budget\.py)(.*?)(?:  #.*)?$", README, re.M
)


@pytest.mark.parametrize("arguments", [c[1].strip() for c in COMMANDS], ids=str)
def test_commands_compose(arguments):
    if "resume=" not in arguments:
        words = shlex.split(arguments)
        check_sweep(words) if "-m" in words else compose_checked([w for w in words if w[0] != "-"])


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_in_the_table(name):
    assert f"`{name}`" in README


def test_every_file_it_names_exists():
    named = set(
        re.findall(r"`((?:layers|ops|models|tasks|harness|docs|scripts)/[\w/.-]+)`", README)
    )
    named |= set(re.findall(r"\]\(([\w/.-]+)\)", README))
    missing = [n for n in named if not (ROOT / n).exists() and "my_layer" not in n]
    assert not missing
    assert len(named) > 8


def test_no_figure_is_left_to_be_filled_in():
    assert not re.search(r"\b[A-Z]+_TABLE\b|TODO", README)


def test_every_task_is_in_the_table():
    for path in (ROOT / "configs" / "task").glob("*.yaml"):
        assert f"`{path.stem}`" in README


def test_every_direct_dependency_is_pinned():
    for file in ROOT.glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            entry = line.split("#")[0].strip()
            assert not entry or entry.startswith("-r ") or re.fullmatch(r"[\w-]+==[\w.]+", entry), (
                line
            )
