"""Checks a composed config against the constructors it will call, before anything is built."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_args

from harness.signatures import Signature, accepts, public_name, readable, signature_of
from harness.targets import TargetError, resolve_target, suggest

TARGET = "_target_"
MISSING = "???"  # how a config marks a value that the user has to give

Config = dict[str, Any]


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


def check_value(value: Any, hint: Any, where: str) -> Iterator[str]:
    """Yields a problem if a plain value does not fit an annotation."""
    if not accepts(hint, value):
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
    """Yields the problems of the targets inside lists and nodes, at any depth."""
    if isinstance(raw, str):  # an interpolation: the node has its own place, and is checked there
        return
    if isinstance(value, Mapping) and TARGET in value:
        yield from check_target(value, where, raw=raw, kind=kind)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from check_nested(inner, f"{where}.{key}", raw[key] if raw else None)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from check_nested(inner, f"{where}.{i}", raw[i] if raw else None)


def has_target(value: Any) -> bool:
    """Whether a config value is or contains a node that names a class."""
    if isinstance(value, Mapping):
        return TARGET in value or any(has_target(inner) for inner in value.values())
    return isinstance(value, list) and any(has_target(inner) for inner in value)
