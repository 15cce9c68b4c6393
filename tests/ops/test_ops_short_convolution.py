"""What is peculiar to the short convolution: its tail and its messages."""

import inspect

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.short_convolution import short_convolution
from tests.ops.calls import make

OP = OPS["short_convolution"]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_tail_is_the_last_inputs_even_of_short_sequences(length):
    inputs = make(OP, length)
    _, tail = short_convolution(**inputs)
    history = torch.cat((inputs["state"], inputs["x"]), 1)
    assert torch.equal(tail, history[:, length:])
    assert tail.shape == inputs["state"].shape


def test_last_tap_is_the_current_token():
    x = torch.arange(6.0).view(1, 6, 1)
    y, _ = short_convolution(x, torch.tensor([[0.0, 10.0, 1.0]]))
    assert y.flatten().tolist() == [0, 1, 12, 23, 34, 45]


def test_misfitting_shapes_are_refused_with_the_numbers():
    function, inputs = inspect.unwrap(short_convolution), make(OP, 5)  # without the tests' checks
    with pytest.raises(ValueError, match="weight filters 3 channels, but x has 7"):
        function(inputs["x"], inputs["weight"][:3])
    with pytest.raises(ValueError, match=r"needs \(2, 4, 7\)"):
        function(inputs["x"], inputs["weight"], inputs["state"][:, 1:])
