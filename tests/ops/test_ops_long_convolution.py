"""What is peculiar to the long convolution: its blocks, its growing state, and who sees whom."""

import inspect

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.long_convolution import (
    long_convolution,
    long_convolution_blocks,
    long_convolution_naive,
)
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["long_convolution"]
FORMS = [long_convolution_naive, long_convolution_blocks]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several sizes of blocks in a sequence of a hundred tokens: 4, 8, 16, 32."""
    for name, value in {"_DIRECT": 4, "_PARTS": 2, "_MOST_BLOCKS": 4}.items():
        monkeypatch.setattr(f"mneme.ops.long_convolution.blocks.{name}", value)


@pytest.mark.parametrize("taps", [1, 2, 9, 60, 130, 300])
@pytest.mark.parametrize("length", [5, 64, 131])
@pytest.mark.parametrize("regime", ["typical", "full"])
def test_blocks_of_every_size_and_reach(small_blocks, taps, length, regime):
    inputs = make(OP, length, taps=taps, channels=2, regime=regime)
    assert_close(results(long_convolution_blocks, inputs), results(OP.naive, inputs), 1e-12)
    fast = gradients(long_convolution_blocks, inputs)
    assert_close(fast, gradients(OP.naive, inputs), 1e-12)


def test_blocks_of_ordinary_size():
    inputs = make(OP, 5000, batch=1, taps=6000, channels=1)
    assert_close(results(long_convolution_blocks, inputs), results(OP.naive, inputs), 1e-12)
    assert_close(gradients(long_convolution_blocks, inputs), gradients(OP.naive, inputs), 1e-12)


@pytest.mark.parametrize("position", [1, 127, 128, 1024, 2500])
def test_not_even_rounding_reaches_earlier_outputs(position):
    inputs = make(OP, 3000, batch=1, taps=3000, channels=2, dtype=torch.float32)
    changed = inputs | {"x": inputs["x"].clone()}
    changed["x"][:, position:] *= 1e6
    before, after = (long_convolution_blocks(**x)[0] for x in (inputs, changed))
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize("function", FORMS)
def test_it_is_the_convolution_of_the_library(function):
    inputs = make(OP, 40, taps=100)
    del inputs["state"]
    weight = inputs["kernel"].flip(1)[:, None]
    x = torch.nn.functional.pad(inputs["x"].mT, (99, 0))
    expected = torch.nn.functional.conv1d(x, weight, groups=x.shape[1]).mT
    assert_close({"y": function(**inputs)[0]}, {"y": expected}, 1e-13)


def test_groups_of_channels_change_nothing(monkeypatch):
    monkeypatch.setattr("mneme.ops.long_convolution.blocks._GROUP_ELEMENTS", 1)
    monkeypatch.setattr("mneme.ops.long_convolution.blocks._LEAST_GROUP", 3)
    inputs = make(OP, 130)
    assert_close(results(long_convolution_blocks, inputs), results(OP.naive, inputs), 1e-12)
    assert_close(gradients(long_convolution_blocks, inputs), gradients(OP.naive, inputs), 1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_state_grows_to_one_less_than_the_taps(function):
    inputs = make(OP, 30, taps=12)
    x, state, lengths = inputs["x"], None, []
    for piece in x.split([3, 1, 6, 5, 15], 1):
        _, state = function(piece, inputs["kernel"], state)
        lengths.append(state.shape[1])
    assert lengths == [3, 4, 10, 11, 11]
    assert torch.equal(state, x[:, -11:])


@pytest.mark.parametrize("function", FORMS)
def test_an_empty_state_is_no_state(function):
    inputs = make(OP, 20)
    inputs["state"] = inputs["state"][:, :0]
    missing = {key: x for key, x in inputs.items() if key != "state"}
    for key, expected in results(function, missing).items():
        assert torch.equal(results(function, inputs)[key], expected)


@pytest.mark.parametrize("function", FORMS)
def test_state_is_not_a_view_of_the_inputs(function):
    x = make(OP, 20)["x"]
    _, state = function(x, torch.ones(7, 100, dtype=x.dtype))
    kept = state.clone()
    x.zero_()
    assert torch.equal(state, kept)


def test_state_does_not_hold_on_to_the_whole_sequence():
    _, state = long_convolution_blocks(**make(OP, 1000, taps=10))
    assert state.untyped_storage().nbytes() == state.numel() * state.itemsize


def test_float32_is_accurate_at_full_length():
    inputs = make(OP, 4096, batch=1, taps=4096, channels=2, dtype=torch.float32)
    exact = {key: x.double() for key, x in inputs.items()}
    fast, reference = long_convolution_blocks, long_convolution_blocks
    assert_close(results(fast, inputs), results(reference, exact), 1e-6)
    assert_close(gradients(fast, inputs), gradients(reference, exact), 1e-5)


def test_entry_point_decodes_with_the_direct_sum():
    inputs = make(OP, 1)
    for key, expected in results(long_convolution_naive, inputs).items():
        assert torch.equal(results(long_convolution, inputs)[key], expected)


@pytest.mark.parametrize("length", [1, 9])
def test_misfitting_arguments_are_refused_with_the_numbers(length):
    function = inspect.unwrap(long_convolution)  # without the tests' checks
    inputs = make(OP, length, taps=10)
    with pytest.raises(ValueError, match="kernel filters 3 channels, but x has 7"):
        function(inputs["x"], inputs["kernel"][:3])
    with pytest.raises(ValueError, match=r"needs \(2, at most 9, 7\)"):
        function(inputs["x"], inputs["kernel"], inputs["x"].new_zeros(2, 10, 7))


def test_second_derivative_is_refused():
    inputs = make(OP, 5)
    x = inputs["x"].requires_grad_()
    y, _ = long_convolution_blocks(**inputs)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
