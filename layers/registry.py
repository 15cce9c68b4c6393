"""The registry: a layer that is registered is tested, and one that is not is a test failure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mneme.layers.protocol import Layer

LayerClass = TypeVar("LayerClass", bound=type[Layer])


@dataclass(frozen=True)
class Entry:
    """A registered layer and the small configurations under which the conformance tests run it.

    Attributes:
        cls: the layer.
        examples: a readable name to the keyword arguments of one small instance.
        d_model: the width of those instances.
    """

    cls: type[Layer]
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    d_model: int = 16

    def build(self, example: str) -> Layer:
        """A new layer from one of the examples, by name."""
        return self.cls(self.d_model, **self.examples[example])


LAYERS: dict[str, Entry] = {}


def register(
    d_model: int = 16, **examples: Mapping[str, Any]
) -> Callable[[LayerClass], LayerClass]:
    """Class decorator that puts a layer on the map, with the instances its tests should cover.

    Args:
        d_model: the width of the test instances.
        **examples: name to constructor arguments; cover every option that changes the code path.

    Raises:
        ValueError: no example was given, or another class has the name.
    """

    def add(cls: LayerClass) -> LayerClass:
        known = LAYERS.get(cls.__name__)
        if known is not None and known.cls.__module__ != cls.__module__:
            raise ValueError(
                f"{cls.__module__} and {known.cls.__module__} both define {cls.__name__}"
            )
        if not examples:
            raise ValueError(f"{cls.__name__} is registered without an example to test it by")
        LAYERS[cls.__name__] = Entry(cls, examples, d_model)
        return cls

    return add
