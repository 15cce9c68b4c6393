"""Checks a composed config against the constructors it will call, before anything is built."""

import errno
import inspect
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, get_args

from torch.optim import Optimizer

from mneme.harness.config.build import (
    TARGET,
    Signature,
    TargetError,
    accepts,
    element_of,
    public_name,
    readable,
    resolve_target,
    signature_of,
    suggest,
)
from mneme.layers import Layer

MISSING = "???"  # how a config marks a value that the user has to give

Config = dict[str, Any]

_BEYOND_SIZES = ("negative dimension", "overflow")  # torch, of tensors that cannot be
_ADVICE = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "name a place that you may use",
    errno.EPERM: "name a place that you may use",
    errno.EROFS: "name a place that you may use",
}


class ConfigError(ValueError):
    """One message with everything that is wrong with a config.

    Attributes:
        problems: one line each, naming what, where and what instead.
    """

    def __init__(self, problems: list[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"{count} in the configuration; nothing was built.{lines}")
        self.problems = problems


@contextmanager
def blaming(place: str, *also: type[Exception]) -> Iterator[None]:
    """Turns what constructors say of values into a ConfigError that names a place in the config.

    Args:
        place: a group, or an option.
        also: errors that a library has for values besides.
    """
    values: tuple[type[Exception], ...] = (ValueError, ArithmeticError, *also)
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError([f"{place}: {refused(error)}"]) from error
    except values + _of_lightning() as error:
        raise ConfigError([f"{place}: {error}"]) from error
    except RuntimeError as error:
        if not any(said in str(error) for said in _BEYOND_SIZES):
            raise
        raise ConfigError([f"{place}: no tensor has such sizes ({error})"]) from error


def _of_lightning() -> tuple[type[Exception], ...]:
    """What Lightning raises for values; nothing where it is not in use, as importing it is slow."""
    if "lightning" not in sys.modules:
        return ()
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    return (MisconfigurationException,)


def refused(error: OSError) -> str:
    """What the system would not do, with which file, and what to do about it."""
    if error.strerror is None:  # of a library
        return " ".join(str(error).split())
    files = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    advice = _ADVICE.get(error.errno or 0, "name another place")
    return f"{files or 'a file'}: {error.strerror}; {advice}"


def check_target(
    node: Mapping[str, Any],
    where: str,
    given: Collection[str] = (),
    raw: Any = None,
    kind: Any = object,
) -> Iterator[str]:
    """Yields the problems of a node that names a class.

    Args:
        node: the resolved node, with its `_target_`.
        where: its path in the config, for messages.
        given: options that the program supplies and the config may not.
        raw: the same node before interpolation. What it refers to elsewhere is checked there only.
        kind: the class or classes that what is built must be of; other annotations pass.
    """
    try:
        cls = resolve_target(node[TARGET])
    except TargetError as error:
        yield f"{where}.{TARGET}: {error}"
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if all(isinstance(k, type) for k in kinds) and not issubclass(cls, kinds):
        names = " or ".join(k.__name__ for k in kinds)
        yield f"{where}.{TARGET}: expected a {names}, got {node[TARGET]}"
        return
    if _is_a_base(cls):
        yield f"{where}.{TARGET}: {node[TARGET]} is what others are made from; name one of those"
        return
    signature = signature_of(cls)
    signature = signature.without(given)
    options = {key: value for key, value in node.items() if key != TARGET}
    raw = raw if isinstance(raw, Mapping) else node
    for key, value in options.items():
        if key in given:
            yield f"{where}.{key}: the program sets this option of {signature.name}; leave it out"
        else:
            yield from _check_option(signature, key, value, f"{where}.{key}", raw.get(key))
    for key in signature.required:
        if key not in options:
            kind = readable(signature.types[key])
            yield f"{where}.{key}: {signature.name} needs this option, a value of type {kind}"


def _check_option(
    signature: Signature, key: str, value: Any, where: str, raw: Any
) -> Iterator[str]:
    if key not in signature.types:
        if not signature.open:
            known = ", ".join(sorted(signature.types)) or "none"
            near = suggest(key, signature.types)
            yield f"{where}: {signature.name} has no option {key!r}{near} (options: {known})"
    elif value == MISSING:
        yield f"{where}: needs a value of type {readable(signature.types[key])}"
    elif has_target(value):
        yield from check_nested(value, where, raw, signature.types[key])
    else:
        yield from check_value(value, signature.types[key], where)


def _is_a_base(cls: type) -> bool:
    """Whether a class lacks what makes it one of its kind."""
    if issubclass(cls, Layer):
        return cls.forward is Layer.forward
    return inspect.isabstract(cls) or cls is Optimizer


def check_value(value: Any, hint: Any, where: str) -> Iterator[str]:
    """Yields a problem if a plain value does not fit an annotation, or is no finite number."""
    if _not_finite(value):
        yield f"{where}: expected finite numbers, got {value!r}"
    elif not accepts(hint, value):
        advice = _target_advice(value, hint, where)
        yield f"{where}: expected {readable(hint)}, got {value!r} ({type(value).__name__}){advice}"


def _target_advice(value: Any, hint: Any, where: str) -> str:
    """`; give it a _target_, ...` for options of a dataclass that the node does not name."""
    choices = (hint, *get_args(hint))
    kinds = [kind for kind in choices if isinstance(kind, type) and is_dataclass(kind)]
    if not isinstance(value, Mapping) or not kinds:
        return ""
    return f"; give it a {TARGET}, such as {where}.{TARGET}={public_name(kinds[0])}"


def check_nested(value: Any, where: str, raw: Any, kind: Any = object) -> Iterator[str]:
    """Yields the problems of the targets inside lists and nodes, and of what stands beside them.

    Args:
        value: with a target, at any depth.
        where: its path in the config.
        raw: the same before interpolation, see `check_target`.
        kind: the annotation of the option.
    """
    if isinstance(raw, str):  # an interpolation: the node has its own place, and is checked there
        return
    if isinstance(value, Mapping) and TARGET in value:
        yield from check_target(value, where, raw=raw, kind=kind)
    elif not has_target(value) or (element_of(kind) is object and not accepts(kind, value)):
        yield from check_value(value, kind, where)
    else:
        of_each = element_of(kind)
        for key in list(value) if isinstance(value, Mapping) else range(len(value)):
            inner = raw[key] if raw else None
            yield from check_nested(value[key], f"{where}.{key}", inner, of_each)


def _not_finite(value: Any) -> bool:
    """Whether a value is, or holds, NaN or infinity."""
    if isinstance(value, Mapping):
        return any(_not_finite(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_not_finite(inner) for inner in value)
    return isinstance(value, float) and not math.isfinite(value)


def has_target(value: Any) -> bool:
    """Whether a config value is or contains a node that names a class."""
    if isinstance(value, Mapping):
        return TARGET in value or any(has_target(inner) for inner in value.values())
    return isinstance(value, list) and any(has_target(inner) for inner in value)
