"""Parts that several layers of a model share: the model makes, owns and binds them.

A layer holds a `SharedPart` in the place of what is not its own, such as a table that other layers
read too, or a bank of which each sequence reads what its route leads to (`RoutedPart`). The model
need not know what kinds of parts there are.

B sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

NO_ROUTE = -1
"""The route of a sequence that nobody can place."""


class SharedPart(nn.Module):
    """A layer's place in a part that the model owns. It holds no parameter.

    Args:
        name: under which the model owns the part: an attribute such as "bank", or "tables.facts"
            for one of a family. Places of one name share one part.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._part: tuple[nn.Module, ...] = ()  # in a tuple, or it would be a submodule of this one

    def make(self, places: Sequence[Any]) -> nn.Module:
        """The part for all the places of this name, in the order of the model's layers.

        Raises:
            ValueError: the places need different parts.
        """
        raise TypeError(f"{type(self).__name__} does not define make")

    def bind(self, part: nn.Module, place: int, places: int) -> None:
        """Reads this part from now on.

        Args:
            part: made by `make`, or another that can stand in for it.
            place: which of the places this is, from 0.
            places: how many share the part.

        Raises:
            ValueError: the part does not fit.
        """
        self._part = (part,)

    @property
    def part(self) -> nn.Module | None:
        """What is read; None as long as nothing is bound."""
        return self._part[0] if self._part else None


class RoutedPart(nn.Module):
    """A shared part of which a sequence reads what its route leads to, fetched before its start.

    A new one changes no output, so that a trained model can be given one.
    """

    @property
    def leaves(self) -> int:
        """Where routes can lead: they are from 0 to one less, or `NO_ROUTE`."""
        raise TypeError(f"{type(self).__name__} does not define leaves")

    @property
    def tree(self) -> str:
        """Its leaves and the options that they follow from, for messages."""
        return f"{self.leaves} leaves"

    def fetch(self, route: Int[Tensor, " b"]) -> Any:
        """What each sequence reads, of all places."""
        raise TypeError(f"{type(self).__name__} does not define fetch")


class Fetched(dict[str, Any]):
    """What was fetched for the routes of a batch, by the name of the part."""


class NamedParts(nn.Module):
    """Parts by name: a `nn.ModuleDict` that also takes names of its methods, such as "values"."""

    def __getitem__(self, name: str) -> nn.Module:
        """The part of a name, or what has been put in its place."""
        return self.get_submodule(name)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._modules)


def shared_places(module: nn.Module) -> dict[str, list[SharedPart]]:
    """The places below a module by the name of their part.

    Members of families come first. Parts are made, and listed as parameters, in this order, and
    the states of optimizers in old checkpoints have it.
    """
    found: dict[str, list[SharedPart]] = {}
    for place in module.modules():
        if isinstance(place, SharedPart):
            found.setdefault(place.name, []).append(place)
    return dict(sorted(found.items(), key=lambda item: "." not in item[0]))


def bind_part(part: nn.Module, places: Sequence[SharedPart]) -> None:
    """Lets all places of a name read a part.

    Raises:
        ValueError: it does not fit.
    """
    for number, place in enumerate(places):
        place.bind(part, number, len(places))


def bind_shared_parts(
    module: nn.Module, make: Callable[[Sequence[SharedPart]], nn.Module] | None = None
) -> dict[str, nn.Module]:
    """Makes every shared part below a module, once, and lets its layers read it.

    Args:
        module: holds the layers.
        make: makes the part of some places; None for their own `make`.

    Returns:
        The parts by name, for the caller to own (`own_part`): they belong to no layer.

    Raises:
        ValueError: layers that share a part need different ones.
    """
    parts = {}
    for name, places in shared_places(module).items():
        parts[name] = places[0].make(places) if make is None else make(places)
        bind_part(parts[name], places)
    return parts


def own_part(owner: nn.Module, name: str, part: nn.Module) -> None:
    """Registers a part under its name, in the place of one that has it already."""
    family, _, last = name.rpartition(".")
    if family and family not in dict(owner.named_children()):
        owner.add_module(family, NamedParts())
    owner.get_submodule(family).add_module(last, part)
