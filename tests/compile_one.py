"""Compares what is compiled with itself, as it is asked: lines `layer NAME` or `op NAME FORM`.

Answers each with a JSON string, what is wrong; empty if nothing is. A program of its own, as
torch.compile would trace the run-time type checks that the tests install, and fail on them. Only
the first instance of a layer: tracing takes seconds, and options rarely change what is traced.
"""

import json
import sys

import torch

from mneme.layers import LAYERS
from mneme.ops import OPS
from tests.helpers import assert_close, assert_states_close, example_input, example_layer
from tests.ops import calls, closeness


def layer(name: str) -> None:
    module, x = example_layer(name, next(iter(LAYERS[name].examples))), example_input(name)
    compiled, expected = torch.compile(module, backend="aot_eager")(x), module(x)
    assert_close(compiled.y, expected.y, "output")
    assert_states_close(compiled.state, expected.state)
    inputs = list(module.parameters())
    for got, wanted in zip(
        torch.autograd.grad(compiled.y.sum(), inputs, allow_unused=True),
        torch.autograd.grad(expected.y.sum(), inputs, allow_unused=True),
        strict=True,
    ):
        if wanted is not None:
            assert_close(got, wanted, "gradient", 1e-9)


def op(name: str, form: str) -> None:
    inputs, eager = calls.make(OPS[name], 70), OPS[name].forms[form]
    compiled = torch.compile(eager, backend="aot_eager")
    same, gradients = calls.results, calls.gradients
    closeness.assert_close(same(compiled, inputs), same(eager, inputs), 1e-12)
    closeness.assert_close(gradients(compiled, inputs), gradients(eager, inputs), 1e-12)


if __name__ == "__main__":
    for line in sys.stdin:
        kind, *names = line.split()
        torch.compiler.reset()
        try:
            {"layer": layer, "op": op}[kind](*names)
            wrong = ""
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        print(json.dumps(wrong), flush=True)
