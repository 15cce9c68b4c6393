"""What is peculiar to the gated delta rule: its numerics, and the meaning of a write."""

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.gated_delta import gated_delta, gated_delta_chunk, gated_delta_naive
from mneme.ops.gated_delta.chunk import inverse_of_one_minus
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["gated_delta"]
FORMS = [gated_delta_naive, gated_delta_chunk]


@pytest.mark.parametrize("function", FORMS)
def test_a_key_written_twice_holds_the_second_value(function):
    inputs = make(OP, 70, regime="no_decay", dtype=torch.float64)
    key = torch.zeros_like(inputs["k"])
    key[..., 3] = 1
    out, state = function(
        q=key, k=key, v=inputs["v"], g=inputs["g"], beta=torch.ones_like(inputs["beta"]), scale=1.0
    )
    torch.testing.assert_close(out, inputs["v"], rtol=0, atol=1e-13)
    torch.testing.assert_close(state[:, :, 3], inputs["v"][:, -1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [4, 8, 16, 32, 64, 128])
def test_chunk_size_changes_nothing(chunk_size):
    inputs = make(OP, 130)
    expected = results(OP.naive, inputs)
    assert_close(results(gated_delta_chunk, inputs | {"chunk_size": chunk_size}), expected, 1e-10)


@pytest.mark.parametrize("chunk_size", [0, 2, 48, -64])
def test_chunk_size_must_be_a_power_of_two(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size is {chunk_size}; it must be a power of two"):
        gated_delta_chunk(**make(OP, 5), chunk_size=chunk_size)


def test_several_segments_carry_state_and_gradient(monkeypatch):
    monkeypatch.setattr("mneme.ops.tiling._SEGMENT_ELEMENTS", 2 * 6 * 16 * 20)
    inputs = make(OP, 150) | {"chunk_size": 16}
    plain = {key: x for key, x in inputs.items() if key != "chunk_size"}
    assert_close(results(gated_delta_chunk, inputs), results(OP.naive, plain), 1e-10)
    assert_close(gradients(gated_delta_chunk, inputs), gradients(OP.naive, plain), 1e-10)


@pytest.mark.parametrize("floor", [-1.0, -20.0, -50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strong_and_mixed_decays_stay_finite(floor, dtype):
    inputs = make(OP, 200, dtype=dtype, regime="beta_two")
    inputs["g"] = torch.empty_like(inputs["g"]).uniform_(floor, 0, generator=torch.manual_seed(0))
    inputs["g"][:, ::3] = floor
    assert all(x.isfinite().all() for x in results(gated_delta_chunk, inputs).values())
    assert all(x.isfinite().all() for x in gradients(gated_delta_chunk, inputs).values())


def test_gradient_of_a_strong_decay_keeps_its_digits_in_float32():
    inputs = make(OP, 130, dtype=torch.float32, regime="strong_decay")
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(gradients(gated_delta_chunk, inputs), gradients(OP.naive, exact), 1e-4)


def test_float32_drift_is_bounded_over_8192_tokens():
    inputs = make(OP, 8192, batch=1, dtype=torch.float32, regime="no_decay")
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(results(gated_delta_chunk, inputs), results(gated_delta_chunk, exact), 1e-5)


def test_entry_point_decodes_with_the_recurrence():
    inputs = make(OP, 1)
    for key, expected in results(gated_delta_naive, inputs).items():
        assert torch.equal(results(gated_delta, inputs)[key], expected)


def test_state_is_float32_for_bfloat16_inputs():
    y, state = gated_delta(**make(OP, 20, dtype=torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_second_derivative_is_refused():
    inputs = make(OP, 5)
    q = inputs["q"].requires_grad_()
    y, _ = gated_delta_chunk(**inputs)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("side", [4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("repeated", [False, True])
def test_inverse_is_accurate_in_float32(side, beta, repeated):
    keys = torch.randn(5, side, 24, generator=torch.Generator().manual_seed(0))
    if repeated:  # entries of -1 or -2 throughout, where a power series cancels
        keys = keys[:, :1].expand_as(keys)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    n = -beta * keys @ keys.mT
    exact = torch.linalg.inv(torch.eye(side, dtype=torch.float64) - n.double().tril(-1))
    assert_close({"inverse": inverse_of_one_minus(n)}, {"inverse": exact}, 2e-5)
