"""What is peculiar to the diagonal state space: its kernel, its numerics and its maps."""

import inspect

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.diagonal_state_space import (
    diagonal_state_space,
    diagonal_state_space_chunk,
    diagonal_state_space_naive,
)
from mneme.ops.diagonal_state_space.hold import zero_order_hold
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["diagonal_state_space"]
FORMS = [diagonal_state_space_naive, diagonal_state_space_chunk]


@pytest.mark.parametrize("function", FORMS)
def test_response_to_an_impulse_is_the_kernel_of_the_paper(function):
    inputs = make(OP, 150)
    del inputs["state"]
    inputs["x"] = torch.zeros_like(inputs["x"])
    inputs["x"][:, 0] = 1
    y, _ = function(**inputs)
    rate, write, read = (torch.view_as_complex(inputs[name]) for name in "ABC")
    decay = torch.exp(inputs["step"][:, None] * rate)
    power = decay[None] ** torch.arange(150)[:, None, None]
    kernel = 2 * (read * (decay - 1) / rate * write * power).sum(-1).real  # [T, D]
    assert_close({"y": y}, {"y": kernel.expand_as(y)}, 1e-10)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 50, 200])
@pytest.mark.parametrize("regime", OP.regimes)
def test_chunk_size_changes_nothing(chunk_size, regime):
    inputs = make(OP, 130, regime=regime)
    chunked = inputs | {"chunk_size": chunk_size}
    assert_close(results(diagonal_state_space_chunk, chunked), results(OP.naive, inputs), 1e-10)
    fast = gradients(diagonal_state_space_chunk, chunked)
    assert_close(fast, gradients(OP.naive, inputs), 1e-10)


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_groups_of_channels_change_nothing(monkeypatch, channels):
    monkeypatch.setattr("mneme.ops.diagonal_state_space.chunk._GROUP_ELEMENTS", 1)
    monkeypatch.setattr("mneme.ops.diagonal_state_space.chunk._LEAST_GROUP", channels)
    inputs = make(OP, 130)
    assert_close(results(diagonal_state_space_chunk, inputs), results(OP.naive, inputs), 1e-10)
    assert_close(gradients(diagonal_state_space_chunk, inputs), gradients(OP.naive, inputs), 1e-10)


@pytest.mark.parametrize("step", [1e-6, 1e-3, 0.1, 3.0])
def test_hold_keeps_its_digits_in_float32(step):
    inputs = make(OP, 1, dtype=torch.float32)
    steps = torch.full_like(inputs["step"], step)
    _, write = zero_order_hold(inputs["A"], inputs["B"], steps)
    rate, before = (torch.view_as_complex(inputs[name].double()) for name in "AB")
    exact = torch.expm1(steps[:, None].double() * rate) / rate * before
    error = (write - exact).abs() / exact.abs()  # of every mode: some are written weakly
    assert error.max() < 2e-6


@pytest.mark.parametrize("step", [1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_steps_stay_finite(step, dtype):
    inputs = make(OP, 200, dtype=dtype, regime="fast")
    inputs["step"] = step * inputs["step"]
    assert all(x.isfinite().all() for x in results(diagonal_state_space, inputs).values())
    assert all(x.isfinite().all() for x in gradients(diagonal_state_space, inputs).values())


def test_gradients_keep_their_digits_in_float32():
    inputs = make(OP, 500, dtype=torch.float32)
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(gradients(diagonal_state_space, inputs), gradients(OP.naive, exact), 1e-4)


def test_float32_drift_is_bounded_over_8192_tokens():
    inputs = make(OP, 8192, batch=1, dtype=torch.float32)
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(results(diagonal_state_space, inputs), results(diagonal_state_space, exact), 1e-4)


def test_entry_point_decodes_with_the_recurrence():
    inputs = make(OP, 1)
    for key, expected in results(diagonal_state_space_naive, inputs).items():
        assert torch.equal(results(diagonal_state_space, inputs)[key], expected)


@pytest.mark.parametrize("length", [1, 20])
def test_state_is_real_and_float32_for_bfloat16_inputs(length):
    y, state = diagonal_state_space(**make(OP, length, dtype=torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("length", [1, 5])
def test_misfitting_arguments_are_refused_with_the_numbers(length):
    function = inspect.unwrap(diagonal_state_space)  # without the tests' checks
    inputs = make(OP, length)
    with pytest.raises(ValueError, match=r"C has shape .* needs \(7, 5, 2\)"):
        function(**inputs | {"C": inputs["C"][..., 0]})
    with pytest.raises(ValueError, match=r"step has shape \(1,\); x has 7 channels"):
        function(**inputs | {"step": inputs["step"][:1]})
    with pytest.raises(ValueError, match="chunk_size is 0; it must be at least 1"):
        function(**inputs, chunk_size=0)


def test_second_derivative_is_refused():
    inputs = make(OP, 5)
    x = inputs["x"].requires_grad_()
    y, _ = diagonal_state_space_chunk(**inputs)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
