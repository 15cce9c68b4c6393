"""What a class accepts from a config, read from its constructor."""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

from beartype import BeartypeConf
from beartype.door import is_bearable

from mneme.layers import Layer

# An int is accepted where a float is asked for, as in the numeric tower of PEP 484.
_TOWER = BeartypeConf(is_pep484_tower=True)
_ANY = inspect.Parameter.empty


@dataclass(frozen=True)
class Signature:
    """The options of a class.

    Attributes:
        name: of the class, for messages.
        types: option to its annotation (`inspect.Parameter.empty` where there is none).
        required: options without a default.
        open: whether any other keyword is taken as well.
    """

    name: str
    types: Mapping[str, Any]
    required: Collection[str]
    open: bool = False

    def without(self, names: Collection[str]) -> "Signature":
        """The same without some options."""
        types = {name: hint for name, hint in self.types.items() if name not in names}
        required = [name for name in self.required if name not in names]
        return replace(self, types=types, required=required)


def signature_of(cls: type) -> Signature:
    """Reads the constructor of `cls`; a layer's `d_model` is no option, its model supplies it."""
    if is_dataclass(cls):
        return _of_dataclass(cls)
    constructor: Callable[..., None] = cls.__init__  # type: ignore[misc]
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    if issubclass(cls, Layer):
        parameters = [p for p in parameters if p.name != "d_model"]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    hints = _hints(constructor)
    return Signature(
        name=cls.__name__,
        types={p.name: hints.get(p.name, _ANY) for p in named},
        required=[p.name for p in named if p.default is p.empty],
        open=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _of_dataclass(cls: type) -> Signature:
    hints = _hints(cls)
    options = [f for f in fields(cls) if f.init]
    required = [f.name for f in options if f.default is MISSING and f.default_factory is MISSING]
    return Signature(cls.__name__, {f.name: hints.get(f.name, _ANY) for f in options}, required)


def _hints(of: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(of)
    except NameError:  # a library annotates with names that it imports for type checkers only
        return {}


def accepts(hint: Any, value: Any) -> bool:
    """Whether a plain config value fits an annotation; a list also serves as a tuple.

    Every element of a list is looked at: beartype by itself samples one. `true` is no number,
    though Python's bool is an int.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is _ANY:
        return True
    if isinstance(value, bool) and hint in (int, float, complex):
        return False
    if origin in (typing.Union, types.UnionType):
        return any(accepts(choice, value) for choice in arguments)
    if not isinstance(value, list) or not arguments:
        return is_bearable(value, hint, conf=_TOWER)
    if origin is tuple and Ellipsis not in arguments:
        fits = len(arguments) == len(value)
        return fits and all(accepts(h, v) for h, v in zip(arguments, value, strict=True))
    if (
        isinstance(origin, type)
        and issubclass(origin, Iterable)
        and not issubclass(origin, Mapping)
    ):
        return all(accepts(arguments[0], element) for element in value)
    return False


def element_of(hint: Any) -> Any:
    """The annotation of what a list or mapping of this annotation holds; `object` if none says."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [element_of(choice) for choice in arguments]
        return next((inner for inner in found if inner is not object), object)
    if not isinstance(origin, type) or not issubclass(origin, Iterable) or not arguments:
        return object
    return arguments[1] if issubclass(origin, Mapping) else arguments[0]


def public_name(cls: type) -> str:
    """The dotted name of a class, from the outermost package that exports it."""
    parts = cls.__module__.split(".")
    packages = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    exporting = (p for p in packages if vars(importlib.import_module(p)).get(cls.__name__) is cls)
    return f"{next(exporting, cls.__module__)}.{cls.__name__}"


def readable(hint: Any) -> str:
    """An annotation as a reader would write it."""
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    for noise in ("typing.", "collections.abc.", " | torch.Tensor"):  # no config holds a tensor
        text = text.replace(noise, "")
    return text.replace("NoneType", "None")
