"""The top level of a config: its groups and its few scalars."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer

from mneme.harness.config.check import (
    MISSING,
    TARGET,
    Config,
    ConfigError,
    check_target,
    check_value,
)
from mneme.harness.config.signatures import readable, signature_of
from mneme.harness.config.targets import resolve_target, suggest
from mneme.harness.config.trainer_rules import check_trainer
from mneme.harness.loggers import Dashboard
from mneme.layers import Layer
from mneme.models import LanguageModel, Schedule
from mneme.tasks.base import Task


@dataclass(frozen=True)
class Group:
    """What a config group must describe.

    Attributes:
        kind: the class, or the classes, that it must build.
        given: options of that class that the program supplies.
        optional: whether the group may be null.
    """

    kind: type | str
    given: tuple[str, ...] = ()
    optional: bool = False


GROUPS = {
    "task": Group(Task),
    "mixer": Group(Layer, optional=True),
    "ffn": Group(Layer, optional=True),
    "model": Group(LanguageModel, given=("vocab_size",)),
    "optimizer": Group(Optimizer, given=("params",)),
    "schedule": Group(Schedule),
    "trainer": Group(
        "lightning.pytorch.Trainer",
        given=("callbacks", "default_root_dir", "enable_checkpointing", "logger", "plugins"),
    ),
    "logger": Group(Dashboard, optional=True),
}


@dataclass(frozen=True)
class Options:
    """The scalars of a run.

    Attributes:
        seed: of initialization, data order and dropout.
        run_dir: where the run writes; None picks `runs/<time>_<task>_<mixer>_seed<seed>`.
        label: of the run's row in a table; it changes no result.
        compile: run the model through torch.compile.
        checkpoint_every: updates between two writes of `last.ckpt`.
        usage: measure at each validation how evenly layers use the rows of their tables.
        init_from: a run directory, for its best checkpoint, or a checkpoint, whose weights the
            model starts with; a memory bank may be new. None for the model's own initialization.
        train_only: "bank" freezes all but the memory bank; None trains everything.
        save_bank_every: updates between two writes of the memory bank's files; None writes them
            when training ends.
    """

    seed: int = 0
    run_dir: str | None = None
    label: str | None = None
    compile: bool = False
    checkpoint_every: int = 100
    usage: bool = False
    init_from: str | None = None
    train_only: Literal["bank"] | None = None
    save_bank_every: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        least = {"seed": 0, "checkpoint_every": 1, "save_bank_every": 1}
        given = {name: getattr(self, name) for name in least}
        problems = [
            f"{name} ({value}) must be {least[name]} or more"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if self.run_dir is not None and not self.run_dir.strip():
            problems.append("run_dir: expected the path of a directory, got none; null names one")
        if problems:
            raise ConfigError(problems)


def check_config(
    config: Config,
    raw: Config | None = None,
    as_shipped: Collection[str] = (),
    *,
    wrong: bool = False,
) -> None:
    """Checks a whole training config.

    Args:
        config: the composed config, interpolations resolved.
        raw: the same before interpolation.
        as_shipped: groups in which nothing was changed. One that takes seconds to check is then
            only checked where nothing else is wrong.
        wrong: whether something is known to be wrong already.

    Raises:
        ConfigError: with every problem found.
    """
    problems = list(_problems(config, config if raw is None else raw, as_shipped, wrong))
    if problems:
        raise ConfigError(problems)
    options(config)  # which checks their ranges


def check_options(values: Mapping[str, Any], schema: type) -> None:
    """Checks scalars against the fields of a dataclass.

    Raises:
        ConfigError: with every problem found.
    """
    types = signature_of(schema).types
    problems = [p for key, value in values.items() for p in _check_scalar(key, value, types)]
    if problems:
        raise ConfigError(problems)


def options(config: Config) -> Options:
    """The scalars of a checked config."""
    return Options(**{key: config[key] for key in signature_of(Options).types if key in config})


def _problems(
    config: Config, raw: Config, as_shipped: Collection[str], wrong: bool
) -> Iterator[str]:
    scalars = signature_of(Options).types
    slow = [key for key, group in GROUPS.items() if isinstance(group.kind, str) and key in config]
    for key in sorted(config, key=lambda key: key in slow):
        if wrong and key in slow and key in as_shipped:
            continue
        if key in GROUPS:
            problems = list(_check_group(key, config[key], raw.get(key)))
        else:
            groups = {g: config[g] for g in GROUPS if isinstance(config.get(g), Mapping)}
            inside = [f"{group}.{key}" for group, options in groups.items() if key in options]
            problems = list(_check_scalar(key, config[key], scalars, GROUPS, inside))
        wrong |= bool(problems)
        yield from problems
    yield from check_trainer(config.get("trainer"))
    for key, group in GROUPS.items():
        if key not in config and not group.optional:
            yield f"{key}: this group is missing"


def _check_scalar(
    key: str,
    value: Any,
    types: Mapping[str, Any],
    groups: Collection[str] = (),
    inside: Collection[str] = (),
) -> Iterator[str]:
    if key not in types:
        known = [*groups, *types]
        near = f"; there is {' and '.join(inside)}" if inside else suggest(key, known)
        yield f"{key}: there is no such option{near} (options: {', '.join(known)})"
    elif value == MISSING:
        yield f"{key}: needs a value of type {readable(types[key])}"
    else:
        yield from check_value(value, types[key], key)


def _check_group(key: str, value: Any, raw: Any) -> Iterator[str]:
    group = GROUPS[key]
    if isinstance(value, Mapping) and TARGET in value:
        kind = resolve_target(group.kind) if isinstance(group.kind, str) else group.kind
        yield from check_target(value, key, group.given, raw, kind)
    elif value is not None or not group.optional:
        yield f"{key}: expected a group with a {TARGET}, got {value!r}"
