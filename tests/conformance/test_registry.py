"""A layer that is not registered is a failure, so nothing escapes the conformance tests."""

import ast
import contextlib
import importlib
import inspect
import pkgutil
import re

import pytest

from mneme import layers
from mneme.layers import LAYERS, Layer, MatrixMemory, Memory, RoutedLayer, register
from mneme.routers import Router

BASES = (Layer, MatrixMemory, Memory, RoutedLayer)


def layer_classes():
    """Every public subclass of Layer that any module of the package defines."""
    for module in pkgutil.walk_packages(layers.__path__, "mneme.layers."):
        for name, member in vars(importlib.import_module(module.name)).items():
            own = inspect.isclass(member) and member.__module__ == module.name
            if own and issubclass(member, Layer) and member not in BASES and name[0] != "_":
                yield member


def test_every_layer_is_registered_and_public():
    for cls in layer_classes():
        assert cls.__name__ in LAYERS, f"{cls.__name__} in {cls.__module__} is not registered"
        assert getattr(layers, cls.__name__, None) is cls, f"layers does not import {cls.__name__}"


def test_the_registry_holds_nothing_else():
    assert {entry.cls for entry in LAYERS.values()} == set(layer_classes())


@pytest.mark.parametrize("name", LAYERS)
def test_constructors_take_few_named_options(name):
    parameters = list(inspect.signature(LAYERS[name].cls.__init__).parameters.values())[1:]
    assert parameters[0].name == "d_model"
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[1:]), "options are keyword-only"
    assert len(parameters) - 1 <= 10, "an eleventh option means two ideas"


@pytest.mark.parametrize("name", LAYERS)
def test_docstrings_explain_every_option(name):
    cls = LAYERS[name].cls
    for option in list(inspect.signature(cls.__init__).parameters)[1:]:
        assert f"{option}:" in cls.__doc__ or f"{option}," in cls.__doc__, f"{option} unexplained"


def arguments(docstring: str) -> dict[str, str]:
    """Option to what the `Args:` of a docstring say of it."""
    section = inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if entry := re.match(r"    (\w+(?:, \w+)*): (.*)", line):
            names, line = entry[1].split(", "), entry[2]
        found |= {name: f"{found.get(name, '')} {line.strip()}".lstrip() for name in names}
    return found


def told(text: str) -> list[object]:
    """The defaults that a text gives: `default 4`, `"elu" (default)`, a fraction."""
    found = re.findall(r"[Dd]efault (\"[^\"]*\"|[-\w./]*\w)|(\"[^\"]*\")[^\";]*\(default", text)
    words = [left or right for left, right in found]
    if fraction := re.search(r"[Dd]efault (\d+) ?/ ?(\d+)", text):
        return [int(fraction[1]) / int(fraction[2])]
    return [True if "(default)" in text else None, *map(_value, words)]


def _value(word: str) -> object:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(word)
    return word


CALLABLES = {
    **{name: (entry.cls.__doc__, entry.cls.__init__) for name, entry in LAYERS.items()},
    "Router.fit": (Router.fit.__doc__, Router.fit),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_tell_the_defaults_that_are(name):
    docstring, function = CALLABLES[name]
    of_options = arguments(docstring)
    for option, parameter in inspect.signature(function).parameters.items():
        if isinstance(parameter.default, bool | int | float | str):
            truth = isinstance(parameter.default, bool)
            values = [v for v in told(of_options[option]) if isinstance(v, bool) == truth]
            assert parameter.default in values, f"{option}: {of_options[option]}"


def test_registering_needs_an_example():
    with pytest.raises(ValueError, match="without an example"):
        register()(Layer)


def test_two_layers_cannot_share_a_name():
    class SwiGLU(Layer):
        """Not the one in layers."""

    with pytest.raises(ValueError, match="both define SwiGLU"):
        register(default={})(SwiGLU)
