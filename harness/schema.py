"""The top level of a config: its groups and its few scalars."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.check import (
    MISSING,
    TARGET,
    Config,
    ConfigError,
    check_nested,
    check_target,
    check_value,
)
from harness.signatures import readable, signature_of
from harness.targets import suggest

GIVEN: dict[str, tuple[str, ...]] = {
    "task": (),
    "mixer": (),
    "ffn": (),
    "model": ("vocab_size",),
    "optimizer": ("params",),
    "schedule": (),
    "trainer": ("callbacks", "default_root_dir", "enable_checkpointing", "logger", "plugins"),
    "logger": ("run_dir",),
}
"""Each group, with the options of its class that the program supplies."""

OPTIONAL = {"mixer", "ffn", "logger"}


@dataclass(frozen=True)
class Options:
    """The scalars of a run.

    Attributes:
        seed: of initialisation, data order and dropout.
        run_dir: where the run writes; None picks `runs/<time>_<task>_<mixer>`.
        compile: run the model through torch.compile.
        checkpoint_every: updates between two writes of `last.ckpt`.
    """

    seed: int = 0
    run_dir: str | None = None
    compile: bool = False
    checkpoint_every: int = 100


def check_config(config: Config, raw: Config | None = None) -> None:
    """Checks a whole training config.

    Args:
        config: the composed config, interpolations resolved.
        raw: the same before interpolation.

    Raises:
        ConfigError: with every problem found.
    """
    problems = list(_problems(config, config if raw is None else raw))
    if problems:
        raise ConfigError(problems)


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


def _problems(config: Config, raw: Config) -> Iterator[str]:
    scalars = signature_of(Options).types
    for key, value in config.items():
        if key in GIVEN:
            yield from _check_group(key, value, raw.get(key))
        else:
            yield from _check_scalar(key, value, scalars, groups=GIVEN)
    yield from _check_length(config.get("trainer"))
    for key in GIVEN.keys() - OPTIONAL - config.keys():
        yield f"{key}: this group is missing"


def _check_length(trainer: Any) -> Iterator[str]:
    """A run is measured in updates and batches: its data have no end, so there are no epochs."""
    if not isinstance(trainer, Mapping):
        return
    if not isinstance(trainer.get("max_steps"), int) or trainer["max_steps"] < 1:
        yield "trainer.max_steps: a run needs a length: a number of updates, 1 or more"
    if not isinstance(trainer.get("val_check_interval"), int) or trainer["val_check_interval"] < 1:
        yield "trainer.val_check_interval: expected a number of batches, 1 or more"
    if trainer.get("check_val_every_n_epoch") is not None:
        yield "trainer.check_val_every_n_epoch: data have no end; leave it null"


def _check_scalar(
    key: str, value: Any, types: Mapping[str, Any], groups: Collection[str] = ()
) -> Iterator[str]:
    if key not in types:
        known = [*groups, *types]
        yield f"{key}: there is no such option{suggest(key, known)} (options: {', '.join(known)})"
    elif value == MISSING:
        yield f"{key}: needs a value of type {readable(types[key])}"
    else:
        yield from check_value(value, types[key], key)


def _check_group(key: str, value: Any, raw: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and TARGET in value:
        yield from check_target(value, key, GIVEN[key], raw)
    elif isinstance(value, Mapping):
        yield from check_nested(value, key, raw)
    elif value is not None or key not in OPTIONAL:
        yield f"{key}: expected a group with a {TARGET}, got {value!r}"
