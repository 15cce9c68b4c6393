"""What a config must say for a mapping to hold."""

from typing import Any


def require(config: Any, layer: str, **expected: tuple[Any, ...]) -> None:
    """Raises ValueError for the first option of a config that our layer cannot follow.

    Args:
        config: the peer's.
        layer: name of ours, for the message.
        **expected: for each option, the values that the layer has a counterpart of.
    """
    for name, values in expected.items():
        value = getattr(config, name)
        if value not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(f"{name} is {value!r}; {layer} has {known} alone")
