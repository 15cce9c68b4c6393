"""Names that were given up are not used again, and identifiers are spelled as in torch."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TABLE = re.findall(r"^\| `(\w+)` \| `\w+` \|", (ROOT / "docs" / "renames.md").read_text(), re.M)
BRITISH = r"is(e|ed|er|ers|es|ing|ation|ations)$|colour|behaviour|neighbour|favour|centre"
WORDS = {  # that end so in American English too
    "advise", "advised", "advises", "chunkwise", "elementwise", "fadvise", "likewise", "madvise",
    "noise", "otherwise", "pairwise", "pointwise", "precise", "promise", "raise", "raised",
    "raises", "raising", "rise", "rises", "rowwise", "surprise", "surprises", "surprising",
}  # fmt: skip


def tracked(ending: str) -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", f"*{ending}"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [
        ROOT / name for name in names if (ROOT / name).exists() and not name.startswith("mneme/")
    ]


def identifiers(file: Path) -> set[str]:
    """Names, attributes, arguments, keywords, functions, classes and modules of a file."""
    found = {file.stem}
    for node in ast.walk(ast.parse(file.read_text())):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(value := getattr(node, field, None), str):
                found.add(value)
    return found


def keys(node: object) -> set[str]:
    if isinstance(node, dict):
        return {str(key) for key in node} | {k for inner in node.values() for k in keys(inner)}
    if isinstance(node, list):
        return {k for inner in node for k in keys(inner)}
    return set()


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    """File to identifiers, or to keys of a config."""
    files = {str(file.relative_to(ROOT)): identifiers(file) for file in tracked(".py")}
    for file in tracked(".yaml"):
        files[str(file.relative_to(ROOT))] = keys(yaml.safe_load(file.read_text()))
    return files


def test_old_names_are_gone(used):
    assert len(TABLE) > 15
    old = set(TABLE) - {"layers", "references", "anchor"}  # words that have other meanings as well
    wrong = {name: found & old for name, found in used.items() if found & old}
    assert wrong.pop("layers/matrix/retention.py") == {"retention"}  # RetNet's
    assert not wrong


def test_identifiers_are_in_american_spelling(used):
    wrong = {
        (name, identifier)
        for name, found in used.items()
        for identifier in found
        for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", identifier)
        if re.search(BRITISH, word.lower()) and word.lower() not in WORDS
    }
    assert not wrong
