"""What is peculiar to the selective scan: its numerics, its memory, and the meaning of a step."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mneme.ops import OPS
from mneme.ops.selective_scan import selective_scan, selective_scan_chunk, selective_scan_naive
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["selective_scan"]
FORMS = [selective_scan_naive, selective_scan_chunk]


@pytest.mark.parametrize("function", FORMS)
def test_an_impulse_fades_by_the_steps_that_follow(function):
    inputs = make(OP, 70)
    inputs["x"][:, 1:] = 0
    del inputs["state"]
    _, state = function(**inputs)
    first = inputs["step"][:, 0] * inputs["x"][:, 0]
    time = inputs["step"][:, 1:].sum(1)
    expected = first[..., None] * inputs["B"][:, :1] * torch.exp(time[..., None] * inputs["A"])
    assert_close({"state": state}, {"state": expected}, 1e-13)


@pytest.mark.parametrize("function", FORMS)
def test_a_step_of_zero_leaves_the_states_alone(function):
    inputs = make(OP, 70, regime="no_step", dtype=torch.float32)
    _, state = function(**inputs)
    assert torch.equal(state, inputs["state"])


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
def test_length_of_chunks_changes_nothing(monkeypatch, tokens):
    for bound in ("_LEAST_CHUNK", "_LARGEST_CHUNK"):
        monkeypatch.setattr(f"mneme.ops.selective_scan.chunk.{bound}", tokens)
    inputs = make(OP, 50, regime="long_steps")
    assert_close(results(selective_scan_chunk, inputs), results(OP.naive, inputs), 1e-12)
    assert_close(gradients(selective_scan_chunk, inputs), gradients(OP.naive, inputs), 1e-12)


class _Largest(TorchDispatchMode):
    """Notes the largest number of elements in memory of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_no_tensor_holds_the_states_of_all_tokens():
    inputs = make(OP, 1000, channels=32, states=16)
    with _Largest() as largest:
        gradients(selective_scan_chunk, inputs)
    work = 3 * 64 * inputs["state"].numel()
    assert largest.numel <= max(work, inputs["x"].numel())


@pytest.mark.parametrize("longest", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_and_mixed_steps_stay_finite(longest, dtype):
    inputs = make(OP, 200, dtype=dtype)
    inputs["step"] = longest * torch.rand_like(inputs["step"])
    inputs["step"][:, ::3] = 0
    assert all(x.isfinite().all() for x in results(selective_scan_chunk, inputs).values())
    assert all(x.isfinite().all() for x in gradients(selective_scan_chunk, inputs).values())


@pytest.mark.parametrize("regime", OP.regimes)
def test_gradients_keep_their_digits_in_float32(regime):
    inputs = make(OP, 130, dtype=torch.float32, regime=regime)
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(gradients(selective_scan_chunk, inputs), gradients(OP.naive, exact), 1e-5)


def test_float32_drift_is_bounded_over_8192_tokens():
    inputs = make(OP, 8192, batch=1, dtype=torch.float32)
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(results(selective_scan_chunk, inputs), results(selective_scan_chunk, exact), 1e-5)


def test_entry_point_decodes_with_the_recurrence():
    inputs = make(OP, 1)
    for key, expected in results(selective_scan_naive, inputs).items():
        assert torch.equal(results(selective_scan, inputs)[key], expected)


def test_state_is_float32_for_bfloat16_inputs():
    y, state = selective_scan(**make(OP, 20, dtype=torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("length", [1, 5])
def test_misfitting_shapes_are_refused_with_the_numbers(length):
    function, inputs = inspect.unwrap(selective_scan), make(OP, length)  # without the tests' checks
    with pytest.raises(ValueError, match=rf"step has shape .* needs \(2, {length}, 7\)"):
        function(**inputs | {"step": inputs["step"][..., :1]})
    with pytest.raises(ValueError, match=rf"B has shape .* needs \(2, {length}, 5\)"):
        function(**inputs | {"B": inputs["B"][..., :4]})


def test_second_derivative_is_refused():
    inputs = make(OP, 5)
    x = inputs["x"].requires_grad_()
    y, _ = selective_scan_chunk(**inputs)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
