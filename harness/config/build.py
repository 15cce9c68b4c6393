"""Builds what a checked config names."""

from collections.abc import Mapping
from functools import partial
from typing import Any, get_origin

from mneme.harness.config.check import TARGET
from mneme.harness.config.signatures import signature_of
from mneme.harness.config.targets import resolve_target
from mneme.layers import Layer


def build(node: Any, **given: Any) -> Any:
    """Turns a node into the object it describes, its inner nodes first.

    A layer becomes a recipe that waits for `d_model`: its model or combinator supplies it.

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
