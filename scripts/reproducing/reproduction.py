"""Reading a file of scripts/reproductions/: what a table is made of."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mneme.harness.config.build import element_of, readable, signature_of, suggest
from mneme.harness.config.check import check_value
from mneme.harness.run.run_directory import RunError
from scripts.report import report_parser
from scripts.reporting.columns import text
from scripts.reporting.runs import unknown

FOLDER = Path(__file__).resolve().parent.parent / "reproductions"
_LABEL = re.compile(r"[\w.+=-]+( [\w.+=-]+)*")  # what --rows, a folder and Hydra can all hold


class ReproductionError(RunError):
    """A reproduction that cannot be made: of this file, or with these options."""


@dataclass(frozen=True)
class Reproduction:
    """The fields of a file.

    Attributes:
        options: overrides of every run.
        seeds: of each row; a sweep is decided on the first.
        rows: label to the overrides of the row.
        report: arguments for report.py.
        sweep: an option and its values, of which each row takes the best.
    """

    options: list[str]
    seeds: list[int]
    rows: dict[str, list[str]]
    report: list[str]
    sweep: dict[str, list[Any]] | None = None

    @property
    def option(self) -> str:
        """The option that is swept; empty if none is."""
        return next(iter(self.sweep or {}), "")

    @property
    def values(self) -> list[str]:
        """Its values as they would be typed."""
        return [text(value) for value in (self.sweep or {}).get(self.option, [])]


def names() -> list[str]:
    """The reproductions that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def about(name: str) -> list[str]:
    """The first comment lines of a file: what it shows and how long it takes."""
    lines = []
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def read_reproduction(name: str) -> Reproduction:
    """Reads and checks a file.

    Raises:
        ReproductionError: there is none of this name, or with everything that is wrong with it.
    """
    if name not in names():
        raise ReproductionError(unknown(f"there is no reproduction {name!r}", name, names()))
    path = FOLDER / f"{name}.yaml"
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))  # an error if a row is there twice
    except (YAMLError, OmegaConfBaseException) as error:
        raise ReproductionError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ReproductionError(f"{path} does not hold fields")
    given: dict[str, Any] = {str(key): value for key, value in found.items()}
    problems = list(_problems(given)) or list(_senseless(Reproduction(**given)))
    if problems:
        raise ReproductionError("\n  ".join([f"{path}:", *problems]))
    reproduction = Reproduction(**given)
    report_parser().parse_args(["RUNS", *reproduction.report])  # before hours of training
    return reproduction


def _problems(found: Mapping[str, Any]) -> Iterator[str]:
    """What is missing, not known or of another type."""
    signature = signature_of(Reproduction)
    types = signature.types
    for key, value in found.items():
        if key not in types:
            near = suggest(key, types)
            yield f"{key}: there is no such field{near} (fields: {', '.join(types)})"
        else:
            yield from _misfits(value, types[key], key)
    for key in signature.required:
        if key not in found:
            yield f"{key}: needs a value of type {readable(types[key])}"


def _misfits(value: Any, hint: Any, where: str) -> list[str]:
    """As `check_value`, but naming the item of a list or mapping that does not fit."""
    found: list[str] = []
    if isinstance(value, list | dict) and (inner := element_of(hint)) is not object:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = [
            problem for key, item in items for problem in _misfits(item, inner, f"{where}.{key}")
        ]
    return found or list(check_value(value, hint, where))


def _senseless(reproduction: Reproduction) -> Iterator[str]:
    """What is of the right type, and cannot be run."""
    sweep = reproduction.sweep
    if sweep is not None and (len(sweep) != 1 or not reproduction.values):
        yield "sweep: needs one option with a list of values"
    seeds = [str(seed) for seed in reproduction.seeds]
    for name, values in {"seeds": seeds, "sweep": reproduction.values}.items():
        if len({folder(value) for value in values}) < len(values):
            yield f"{name}: the same value twice, or in one folder, in {', '.join(values)}"
    for name in ("seeds", "rows"):
        if not getattr(reproduction, name):
            yield f"{name}: needs one at least"
    for label in reproduction.rows:
        if not _LABEL.fullmatch(label):
            yield f"rows: {label!r} may hold letters, digits, single spaces and _.+=- only"
    yield from _equal_folders(list(reproduction.rows))


def _equal_folders(labels: Sequence[str]) -> Iterator[str]:
    folders = [folder(label) for label in labels]
    for label in labels:
        if folders.count(folder(label)) > 1:
            yield f"rows: {label!r} and another have the same folder, {folder(label)}"


def folder(label: str) -> str:
    """The name of a folder for a row, or of a run for a value."""
    return re.sub(r"[^\w.+=-]", "_", label)
