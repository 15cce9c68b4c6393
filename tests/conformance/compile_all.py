"""Compares every registered layer, compiled, with itself; prints one JSON object of errors.

One instance of each, the first: tracing takes seconds, and options rarely change what is traced.
A program of its own because torch.compile would trace the run-time type checks that the tests
install, and fail on them.
"""

import json
import sys

import torch

from mneme.layers import LAYERS
from tests.helpers import (
    assert_close,
    assert_states_close,
    example_input,
    example_layer,
)


def difference(name: str, example: str) -> str:
    """What is wrong with a compiled layer; empty if nothing is."""
    torch.compiler.reset()
    layer, x = example_layer(name, example), example_input(name)
    try:
        compiled, expected = torch.compile(layer, backend="aot_eager")(x), layer(x)
        assert_close(compiled.y, expected.y, "output")
        assert_states_close(compiled.state, expected.state)
        inputs = list(layer.parameters())
        for got, wanted in zip(
            torch.autograd.grad(compiled.y.sum(), inputs, allow_unused=True),
            torch.autograd.grad(expected.y.sum(), inputs, allow_unused=True),
            strict=True,
        ):
            if wanted is not None:
                assert_close(got, wanted, "gradient", 1e-9)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    first = {name: next(iter(entry.examples)) for name, entry in LAYERS.items()}
    json.dump({name: difference(name, example) for name, example in first.items()}, sys.stdout)
