"""Composing configs with Hydra, leniently, so that every mistake is reported at once.

Hydra alone stops at the first unknown key. Here unknown keys are let in, and the check against the
constructors (`mneme.harness.config.check`) then reports all of them with what was probably meant.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product, takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    QuotedString,
)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mneme.harness.config.build import suggest
from mneme.harness.config.check import MISSING, Config, ConfigError
from mneme.harness.config.schema import GROUPS, check_config, check_options
from mneme.harness.run.run_directory import (
    SWEEP,
    RunError,
    claim_by_time,
    newest_run,
    write_atomically,
)

SWEEP_FLAGS = {"-m", "--multirun"}
SHOW_FLAGS = {"-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info"}

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
_NOTHING = ("none", "null", "no", "off", "false", "0", "nothing")
Options = TypeVar("Options")  # of a program, a dataclass
OmegaConf.register_new_resolver(  # of configs/train.yaml, for --help alone
    "described_groups", lambda: described_groups(), replace=True
)


@dataclass(frozen=True)
class Composed:
    """A composed and checked config.

    Attributes:
        config: plain values, interpolations resolved.
        choices: group to the name of the file chosen in it.
    """

    config: Config
    choices: Mapping[str, str]


def compose_checked(overrides: Sequence[str]) -> Composed:
    """Composes `configs/train.yaml` with overrides as on the command line, and checks it.

    Raises:
        ConfigError: with every problem found.
    """
    with _hydra() as loader:
        parsed, problems = _parse(overrides)
        known = []
        for override in parsed:
            several = _several(override) if override.is_sweep_override() else None
            problem = several or _group_problem(override, loader)
            problems += [problem] if problem else []
            known += [] if problem else [_lenient(override, loader)]
        try:
            composed = compose("train", overrides=known, return_hydra_config=True)
            named = {override.key_or_group.split(".")[0] for override in parsed}
            return checked(
                composed, composed.hydra.runtime.choices, problems, as_shipped=GROUPS.keys() - named
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([*problems, _first_line(error)]) from error


def compose_group(group: str, overrides: Sequence[str]) -> Config:
    """One group of a composed and checked config."""
    node: Config = compose_checked(overrides).config[group]
    return node


def described_groups() -> str:
    """What `--help` lists: every group, and a line for each of its files, from its comment."""
    lines = []
    for folder in sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.yaml"))
        width = max(len(file.stem) for file in files)
        lines += ["", folder.name]
        lines += [f"  {file.stem:{width}}  {_first_sentence(file)}" for file in files]
    return "\n".join(lines[1:])


def _first_sentence(file: Path) -> str:
    """Of the comment that a config begins with, but for lines that are commands."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text("utf-8").splitlines())
    said = [line.lstrip("# ") for line in lines]
    words = " ".join(s for s in said if not s.startswith(("@package", "python ", "make ")))
    return shorten(re.split(r"(?<=[^.]\.) ", words)[0].rstrip("."), 100, placeholder=" ...")


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted key to value, for overrides of the form key=value.

    Raises:
        ConfigError: with every override that is not of that form.
    """
    parsed, problems = _parse(overrides)
    problems += [_several(override) for override in parsed if override.is_sweep_override()]
    if problems:
        raise ConfigError(problems)
    return {override.key_or_group: _plain(override.value()) for override in parsed}


def program_options(
    name: str, schema: type[Options], overrides: Sequence[str], **taken: object
) -> Options:
    """The options of a program that has no groups, as configs/<name>.yaml and its command say.

    Args:
        name: of the file.
        schema: the dataclass that the options are checked against and become.
        overrides: the command line.
        **taken: options that were read already.

    Raises:
        ConfigError: with every problem found.
    """
    file = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{name}.yaml"))
    assert isinstance(file, dict)
    values = {str(key): value for key, value in file.items()} | parse_overrides(overrides) | taken
    if values.get("run") == MISSING and (newest := newest_run()):
        raise ConfigError([f"run: which one? The newest is run={newest}"])
    check_options(values, schema)
    return schema(**values)


def checked(
    config: DictConfig,
    choices: Mapping[str, Any],
    problems: Sequence[str] = (),
    as_shipped: Collection[str] = (),
) -> Composed:
    """Turns Hydra's config into a checked one.

    Args:
        config: as composed, with or without Hydra's own node.
        choices: group to chosen file, as Hydra records them.
        problems: what is already known to be wrong, to be reported with the rest.
        as_shipped: groups in which the command line changes nothing, see `check_config`.

    Raises:
        ConfigError: with every problem found.
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        raw, plain = _container(own, resolve=False), _container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([*problems, _first_line(error)]) from error
    found = list(problems)
    try:
        check_config(plain, raw, as_shipped, wrong=bool(problems))
    except ConfigError as error:
        found += error.problems
    if found:
        raise ConfigError(found)
    return Composed(plain, {k: v for k, v in choices.items() if not k.startswith("hydra") and v})


def check_sweep(arguments: Sequence[str]) -> list[str]:
    """Composes and checks every job of a sweep, before any of them starts.

    A command line with other flags than `-m` (such as `--help`) is left to Hydra.

    Returns:
        The arguments for Hydra, which by itself would refuse options that no file mentions.

    Raises:
        ConfigError: with every problem found in the first job that has any.
    """
    flags = [a for a in arguments if a.startswith("-")]
    if unknown := set(flags) - SWEEP_FLAGS - SHOW_FLAGS:
        known = ", ".join(sorted(SWEEP_FLAGS | SHOW_FLAGS))
        raise ConfigError([f"{flag}: there is no such flag (flags: {known})" for flag in unknown])
    if set(flags) & SHOW_FLAGS:
        return list(arguments)
    overrides = [a for a in arguments if a not in flags]
    for job in _expand(overrides):
        if compose_checked(job).config["run_dir"] is not None:
            raise ConfigError(["run_dir: a sweep names its runs itself; set hydra.sweep.dir"])
    with _hydra() as loader:
        return [*flags, *(_lenient(override, loader) for override in _parse(overrides)[0])]


def claim_sweep(arguments: Sequence[str]) -> list[str]:
    """Adds a directory of its own to the arguments of a sweep that names none.

    The config names one by the second, and two sweeps that start in one would share it.
    """
    named = {a.lstrip("+").split("=")[0] for a in arguments} & {"hydra.sweep", "hydra.sweep.dir"}
    if named or set(arguments) & SHOW_FLAGS:
        return list(arguments)
    folder = claim_by_time("sweep")
    write_atomically(folder / SWEEP, json.dumps(list(arguments)))
    return [*arguments, f"hydra.sweep.dir={folder}"]


def stopped_sweep(folder: str) -> list[str] | None:
    """The arguments for Hydra that go on with a sweep in its folder; None if there is none.

    Raises:
        RunError: the folder's record of its command is damaged.
    """
    file = Path(folder) / SWEEP
    if not folder or not file.is_file():
        return None
    try:
        arguments = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read the command of the sweep from {file}: {error}") from error
    if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
        raise RunError(f"{file} does not hold the arguments of a sweep")
    return [*arguments, f"hydra.sweep.dir={folder}"]


def job_choices() -> Mapping[str, Any]:
    """Group to chosen file of the Hydra job that is running."""
    choices: Mapping[str, Any] = HydraConfig.get().runtime.choices
    return choices


@contextmanager
def _hydra() -> Iterator[ConfigLoader]:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            problems.append(f"{text}: not of the form key=value ({_first_line(error)})")
    return parsed, problems


def _several(override: Override) -> str:
    return f"{override.input_line}: several values are for a sweep; add -m to train.py"


def _group_problem(override: Override, loader: ConfigLoader) -> str | None:
    """What is wrong with a choice in a group, if it is one."""
    group, value = override.key_or_group, override.value()
    options = _choices(group, loader)
    if not options or override.is_delete() or value in options:
        return None
    near = _elsewhere(value, group, loader) or suggest(str(value), options)
    return f"{group}={value}: there is no such {group}{near} (choose from: {', '.join(options)})"


def _elsewhere(value: Any, group: str, loader: ConfigLoader) -> str:
    """Another group that has the choice, or the choice of this one that stands for nothing."""
    if str(value).lower() in _NOTHING:
        files = {f.stem: OmegaConf.load(f) for f in sorted((CONFIG_DIR / group).glob("*.yaml"))}
        nothing = [name for name, file in files.items() if not any(dict(file).values())]
        return f"; that is {group}={nothing[0]}" if nothing else ""
    others = [other for other in GROUPS if value in _choices(other, loader)]
    return f"; there is {' and '.join(f'{other}={value}' for other in others)}" if others else ""


def _choices(group: str, loader: ConfigLoader) -> list[str]:
    """The files of a group; none of what is no group, as a key with a dot never is.

    Hydra copies all its search path to look, which for a dozen overrides was most of composing.
    """
    return [] if "." in group else loader.get_group_options(group)


def _lenient(override: Override, loader: ConfigLoader) -> str:
    """The override as Hydra should read it: an unknown key is added, for the check to find."""
    line = str(override.input_line)
    plain = override.type == OverrideType.CHANGE
    own = override.key_or_group.split(".")[0] == "hydra"
    is_group = bool(_choices(override.key_or_group, loader))
    return f"++{line}" if plain and not own and not is_group else line


def _expand(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The jobs of a sweep: every combination of the listed values."""
    parsed, problems = _parse(overrides)
    problems += [
        f"{override.input_line}: list the values of a sweep, separated by commas"
        for override in parsed
        if isinstance(override.value(), Glob | IntervalSweep)
    ]
    if problems:
        raise ConfigError(problems)
    axes = []
    for override in parsed:
        if override.is_discrete_sweep():
            prefix = str(override.input_line).split("=", 1)[0]
            axes.append([f"{prefix}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([str(override.input_line)])
    return (list(job) for job in product(*axes))


def _plain(value: Any) -> Any:
    """A parsed override's value without the parser's wrappers of quoted strings."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _container(config: DictConfig, *, resolve: bool) -> Config:
    container = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
