"""Whether a state fits the call it is given to: one check, at the entry of every layer and model.

A state of another batch size would otherwise be broadcast, which mixes sequences, and that of
another layer end in an error about shapes somewhere inside.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mneme.ops.contract import constant_result

ENTRIES = ("forward", "recall", "forward_saving")
"""Methods that take an input and a state, in this order, and therefore check the state first."""

_FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_INTEGER = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


@final
@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor of a state must be.

    Attributes:
        sizes: of its axes after the batch.
        dtypes: which it may have. Precision is free, as states are often kept in more of it.
        grows: whether the first of `sizes` is only where the axis starts.
        most: what that axis grows to; None for any length.
    """

    sizes: tuple[int, ...]
    dtypes: frozenset[torch.dtype]
    grows: bool = False
    most: int | None = None

    @staticmethod
    def of(tensor: Tensor) -> "TensorSpec":
        """Of all tensors that differ from this one in batch, precision and device only."""
        families = (dtypes for dtypes in (_FLOATING, _INTEGER) if tensor.dtype in dtypes)
        return TensorSpec(tuple(tensor.shape[1:]), next(families, frozenset({tensor.dtype})))

    def growing(self, most: int | None = None) -> "TensorSpec":
        """The same with any number of tokens along the first axis after the batch.

        Args:
            most: tokens that it may hold; None for any number.
        """
        return replace(self, grows=True, most=most)

    def fits(self, tensor: Any, batch_size: int, device: torch.device) -> bool:
        """Whether a tensor is one of these."""
        if not isinstance(tensor, Tensor):
            return False
        shape = tensor.shape
        if not self.grows:
            sizes = shape == (batch_size, *self.sizes)
        else:
            sizes = len(shape) == 1 + len(self.sizes) and shape[2:] == self.sizes[1:]
            sizes = sizes and shape[0] == batch_size
            sizes = sizes and (self.most is None or shape[1] <= self.most)
        return sizes and tensor.dtype in self.dtypes and tensor.device == device

    def needs(self, batch_size: int, device: torch.device) -> str:
        """What is needed, in words."""
        sizes: list[Any] = [batch_size, *self.sizes]
        if self.grows:
            sizes[1] = "any" if self.most is None else f"0 to {self.most}"
        family = {_FLOATING: "floating-point", _INTEGER: "integer"}.get(self.dtypes)
        return f"{family or _list(self.dtypes)} [{_list(sizes)}] on {device}"


class Unchecked(Enum):
    """Stands for a part of a state that is not looked into; members survive copies of a layer."""

    ANYTHING = "anything"
    OF_A_LAYER = "the state of a layer inside that has one, which it checks itself"


ANYTHING, OF_A_LAYER = Unchecked.ANYTHING, Unchecked.OF_A_LAYER


class Stateful(nn.Module):
    """Base of what goes on from a state: its entries refuse one that does not fit the call."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Puts the check in front of the entries that a class defines."""
        super().__init_subclass__(**options)
        for name in ENTRIES:
            if name in vars(cls):
                setattr(cls, name, _checked(vars(cls)[name]))

    def init_state(self, batch_size: int) -> Any:
        """The state before the first token."""
        return None

    def state_spec(self) -> Any:
        """What a state must look like: a `TensorSpec` in the place of each tensor.

        That of `init_state` by default. One that grows says of which tensors:
        `spec._replace(k=spec.k.growing(window - 1))`. A layer stands for its own state, which is
        then checked by that layer when it is called; `ANYTHING` for what nobody checks.
        """
        with torch.no_grad():
            return pytree.tree_map_only(Tensor, TensorSpec.of, self.init_state(1))

    @constant_result
    def _know_spec(self) -> bool:
        """Makes the specification where it is first needed, also by what a compiler traces."""
        if "_spec" not in self.__dict__:
            spec = self.state_spec()
            while isinstance(spec, Stateful):
                spec = spec.state_spec()
            self.__dict__["_spec"] = _without_layers(spec)
        return True


def require_fit(module: Stateful, x: Tensor, state: Any) -> None:
    """Checks that `module` can go on from a state with the input `x`, `[B, ...]`.

    Raises:
        ValueError: the state is one of another layer, configuration, batch size, device or family
            of dtypes; with what was given and what is needed.
    """
    module._know_spec()
    spec, batch_size, device = module.__dict__["_spec"], x.shape[0], x.device
    if not _fits(spec, state, batch_size, device):
        place, given, needed = _misfit(spec, state, batch_size, device)
        raise ValueError(
            f"{type(module).__name__} cannot go on from this state with {batch_size} sequences on "
            f"{device}: {place.lstrip('.') or 'it'} is {given}, and must be {needed}"
        )


def _checked(entry: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(entry)
    def checked(self: Stateful, *args: Any, **kwargs: Any) -> Any:
        state = args[1] if len(args) > 1 else kwargs.get("state")
        if state is not None:
            require_fit(self, args[0] if args else next(iter(kwargs.values())), state)
        return entry(self, *args, **kwargs)

    return checked


def _without_layers(spec: Any) -> Any:
    """The specification with layers replaced by whether they have a state at all."""
    if isinstance(spec, Stateful):
        inner = _without_layers(spec.state_spec())
        return inner if inner is None or inner is ANYTHING else OF_A_LAYER
    if isinstance(spec, dict):
        return {key: _without_layers(part) for key, part in spec.items()}
    if isinstance(spec, tuple | list):
        return _remade(spec, map(_without_layers, spec))
    return spec


def _remade(sequence: Any, parts: Iterable[Any]) -> Any:
    """A sequence of the same kind of other parts."""
    kind = type(sequence)
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def _fits(spec: Any, state: Any, batch_size: int, device: torch.device) -> bool:
    """Whether a state is what a specification without layers says; it is asked at every call."""
    if type(spec) is TensorSpec:
        return spec.fits(state, batch_size, device)
    if spec is OF_A_LAYER:
        return state is not None
    if spec is ANYTHING:
        return True
    if type(state) is not type(spec):
        return False
    if spec is None:
        return True
    if len(state) != len(spec):
        return False
    pairs = zip(spec, state) if type(spec) is not dict else _by_key(spec, state)  # noqa: B905
    for part, given in pairs:  # noqa: SIM110 (a generator costs as much as what it compares)
        if not _fits(part, given, batch_size, device):
            return False
    return True


def _by_key(spec: dict[Any, Any], state: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return [(part, state.get(key)) for key, part in spec.items()]


def _misfit(spec: Any, state: Any, batch_size: int, device: torch.device) -> tuple[str, str, str]:
    """Where a state that does not fit first fails to, what is there, and what must be."""
    if isinstance(spec, TensorSpec):
        return "", _named(state), spec.needs(batch_size, device)
    if spec is OF_A_LAYER:
        return "", _named(state), "the state of a layer"
    if type(state) is not type(spec) or spec is None or len(state) != len(spec):
        return "", _named(state), _named(spec)
    keys = spec if isinstance(spec, dict) else getattr(spec, "_fields", range(len(spec)))
    pairs = _by_key(spec, state) if isinstance(spec, dict) else zip(spec, state, strict=True)
    key, part, given = next(
        (key, *pair)
        for key, pair in zip(keys, pairs, strict=True)
        if not _fits(*pair, batch_size, device)
    )
    inside, *words = _misfit(part, given, batch_size, device)
    place = f".{key}" if hasattr(spec, "_fields") else f"[{key!r}]"
    return place + inside, words[0], words[1]


def _named(state: Any) -> str:
    """A part of a state in words."""
    if isinstance(state, Tensor):
        dtype = str(state.dtype).removeprefix("torch.")
        return f"{dtype} [{_list(state.shape)}] on {state.device}"
    kind = type(state)
    if hasattr(kind, "_fields"):
        return f"{kind.__name__}({', '.join(kind._fields)})"
    if state is None:
        return "None"
    return f"a {kind.__name__}" + (f" of {len(state)}" if hasattr(state, "__len__") else "")


def _list(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))
