"""The top level of a config: its groups and its few scalars."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from mneme.harness.config.build import TARGET, readable, resolve_target, signature_of, suggest
from mneme.harness.config.check import MISSING, Config, ConfigError, check_target, check_value
from mneme.harness.config.renames import MOVED
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
        several: whether it describes any number of them, each under a name.
    """

    kind: type | str
    given: tuple[str, ...] = ()
    optional: bool = False
    several: bool = False


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
    "callbacks": Group("mneme.harness.run.callbacks.RunCallback", optional=True, several=True),
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
        init_from: a run directory, for its best checkpoint, or a checkpoint, whose weights the
            model starts with; a memory bank may be new. None for the model's own initialization.
        train_only: a part of the model, by its dotted name, such as "bank"; all others are frozen.
            None trains everything.
    """

    seed: int = 0
    run_dir: str | None = None
    label: str | None = None
    compile: bool = False
    checkpoint_every: int = 100
    init_from: str | None = None
    train_only: str | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        least = {"seed": 0, "checkpoint_every": 1}
        problems = [
            f"{name} ({getattr(self, name)}) must be {minimum} or more"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
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
    run_options(config)  # which checks their ranges


def check_options(values: Mapping[str, Any], schema: type) -> None:
    """Checks scalars against the fields of a dataclass.

    Raises:
        ConfigError: with every problem found.
    """
    types = signature_of(schema).types
    problems = [p for key, value in values.items() for p in _check_scalar(key, value, types)]
    if problems:
        raise ConfigError(problems)


def run_options(config: Config) -> Options:
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
    yield from _check_trainer(config.get("trainer"))
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
    if key not in types and groups and key in MOVED:
        yield f"{key}: this option is {MOVED[key]} now"
    elif key not in types:
        known = [*groups, *types]
        near = f"; there is {' and '.join(inside)}" if inside else suggest(key, known)
        yield f"{key}: there is no such option{near} (options: {', '.join(known)})"
    elif value == MISSING:
        yield f"{key}: needs a value of type {readable(types[key])}"
    else:
        yield from check_value(value, types[key], key)


def _check_group(key: str, value: Any, raw: Any) -> Iterator[str]:
    group = GROUPS[key]
    kind = resolve_target(group.kind) if isinstance(group.kind, str) else group.kind
    nodes = {key: (value, raw)}
    if group.several and isinstance(value, Mapping) and TARGET not in value:
        raw = raw if isinstance(raw, Mapping) else value
        nodes = {f"{key}.{name}": (inner, raw.get(name)) for name, inner in value.items()}
    for place, (node, unresolved) in nodes.items():
        if isinstance(node, Mapping) and TARGET in node:
            yield from check_target(node, place, group.given, unresolved, kind)
        elif node is not None or not group.optional:
            yield f"{place}: expected a group with a {TARGET}, got {node!r}"


# A run is measured in updates and batches: its data have no end, so there are no epochs.
_NO_EPOCHS = "data have no end, so there are no epochs; leave it out and set max_steps"
REFUSED_TRAINER_OPTIONS = {
    "max_epochs": _NO_EPOCHS,
    "min_epochs": _NO_EPOCHS,
    "min_steps": _NO_EPOCHS,
    "check_val_every_n_epoch": _NO_EPOCHS,
    "limit_train_batches": _NO_EPOCHS,
    "overfit_batches": _NO_EPOCHS,
    "fast_dev_run": "it leaves no run behind; set max_steps to a few instead",
    "profiler": "it would write outside of the run directory, or nowhere; profile the program "
    "from outside, for example by `py-spy record -- python train.py ...`",
    "max_time": "stop the run with SIGTERM instead, for example by `timeout 2h`; it saves itself",
}

# Options that count updates or batches, with Lightning's defaults where those serve.
LENGTHS: dict[str, int | None] = {
    "max_steps": None,
    "val_check_interval": None,
    "log_every_n_steps": 50,
    "accumulate_grad_batches": 1,
}

# Below these Lightning goes on, and does something else.
LEAST = {"gradient_clip_val": 0, "num_sanity_val_steps": -1}


def _check_trainer(trainer: Any) -> Iterator[str]:
    """Yields the problems of a trainer's options."""
    if not isinstance(trainer, Mapping):
        return
    for key, reason in REFUSED_TRAINER_OPTIONS.items():
        if trainer.get(key) is not None:
            yield f"trainer.{key}: {reason}"
    if trainer.get("limit_val_batches", 1) == 0:
        yield "trainer.limit_val_batches: the best checkpoint needs a validation; give 1 or more"
    for key, least in LEAST.items():
        value = trainer.get(key)
        if isinstance(value, int | float) and value < least:
            yield f"trainer.{key}: expected {least} or more, got {value}"
    if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        yield "trainer.gradient_clip_algorithm: gradients are clipped by norm; leave it out"
    if str(trainer.get("precision")).startswith("16"):
        yield "trainer.precision: fp16 would need its overflows skipped; use bf16-mixed or 32-true"
    yield from _check_lengths(trainer)


def _check_lengths(trainer: Mapping[str, Any]) -> Iterator[str]:
    values = {key: trainer.get(key, default) for key, default in LENGTHS.items()}
    wrong = [k for k, v in values.items() if not isinstance(v, int) or v < 1]
    for key in wrong:
        yield f"trainer.{key}: expected a whole number, 1 or more, got {values[key]!r}"
    interval, pieces = values["val_check_interval"], values["accumulate_grad_batches"]
    if not wrong and interval % pieces:
        yield (
            f"trainer.val_check_interval ({interval}) counts batches and must be a multiple of "
            f"accumulate_grad_batches ({pieces}), so that a validation follows a whole update"
        )
