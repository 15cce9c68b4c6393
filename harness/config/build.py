"""What a node of a config means: the class that it names, what that takes, and the object.

A config may come with a run or a checkpoint from elsewhere, so nothing that it can name writes to a
path of its own or calls a server: of loggers only the dashboards of this project, and of callbacks
only its own, which write into the run directory, and no profilers of Lightning's.
"""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, get_origin

from beartype import BeartypeConf
from beartype.door import is_bearable

from mneme.layers import Layer

TARGET = "_target_"

ALLOWED = (
    "mneme.layers",
    "mneme.ops.test_time",
    "mneme.models",
    "mneme.tasks",
    "mneme.harness.loggers.TensorBoard",
    "mneme.harness.loggers.Wandb",
    "mneme.harness.run.bank_files.SaveBank",
    "mneme.harness.run.callbacks",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer",
    "lightning.pytorch.strategies.DDPStrategy",
    "lightning.pytorch.strategies.ddp.DDPStrategy",
)
_BEFORE_THE_NAME = ("layers.", "ops.", "models.", "tasks.", "harness.")  # how old runs say it


class TargetError(ValueError):
    """A config names something that it may not name, or that does not exist."""


def resolve_target(name: object) -> type:
    """The class that a `_target_` names.

    The class must be named and also be defined under an allowed package, so that no config and no
    checkpoint can reach anything else through a module's imports. Runs of before this project had
    a name of its own say `layers.DeltaNet` for `mneme.layers.DeltaNet`, and are understood.

    Raises:
        TargetError: the name is outside the allow-list, or is not a class there.
    """
    if isinstance(name, str) and name.startswith(_BEFORE_THE_NAME):
        name = f"mneme.{name}"
    if not isinstance(name, str) or not _allowed(name):
        raise TargetError(
            f"{name!r} may not be built from a config; allowed are classes of {', '.join(ALLOWED)}"
        )
    found = _find(name)
    if not inspect.isclass(found):
        raise TargetError(f"{name} is not a class{suggest(name, _siblings(name))}")
    if not _allowed(f"{found.__module__}.{found.__qualname__}"):
        raise TargetError(
            f"{name} is {found.__module__}.{found.__qualname__}, which is not allowed"
        )
    return found


def _allowed(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED)


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except (ModuleNotFoundError, ValueError):  # of a name without a module
        return None


def _siblings(name: str) -> list[str]:
    module = name.rpartition(".")[0]
    try:
        members = vars(importlib.import_module(module))
    except (ModuleNotFoundError, ValueError):
        return []
    return [f"{module}.{key}" for key, value in members.items() if inspect.isclass(value)]


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing."""
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""


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
    origin, arguments = get_origin(hint), typing.get_args(hint)
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
    origin, arguments = get_origin(hint), typing.get_args(hint)
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
    if get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    for noise in ("typing.", "collections.abc.", " | torch.Tensor"):  # no config holds a tensor
        text = text.replace(noise, "")
    return text.replace("NoneType", "None")


def build(node: Any, **given: Any) -> Any:
    """Turns a node into the object it describes, its inner nodes first.

    A layer becomes a factory that waits for `d_model`: its model or combinator supplies it.

    Args:
        node: a resolved config value.
        **given: options that the program supplies to the outermost class.
    """
    if isinstance(node, list):
        return [build(inner) for inner in node]
    if not isinstance(node, Mapping):
        return node
    if TARGET not in node:
        return {key: build(inner) for key, inner in node.items()}
    cls = resolve_target(node[TARGET])
    types = signature_of(cls).types
    options = {
        key: _as_typed(build(inner), types.get(key)) for key, inner in node.items() if key != TARGET
    }
    return partial(cls, **options, **given) if issubclass(cls, Layer) else cls(**options, **given)


def _as_typed(value: Any, hint: Any) -> Any:
    """YAML has lists only; gives a tuple where the annotation asks for one."""
    return tuple(value) if isinstance(value, list) and get_origin(hint) is tuple else value
