"""What is peculiar to the memory with scalar decay: what a write means, and what serves whom."""

import math

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.scalar_decay import scalar_decay, scalar_decay_chunk, scalar_decay_naive
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["scalar_decay"]
FORMS = [scalar_decay_naive, scalar_decay_chunk]


def _retention(heads):
    """RetNet's log decays, one per head: the log of 1 - 2^(-5-h)."""
    return torch.log1p(-(2.0 ** -(5 + torch.arange(heads, dtype=torch.float64))))


@pytest.mark.parametrize("function", FORMS)
def test_what_is_written_under_a_key_adds_up(function):
    inputs = make(OP, 70, regime="no_decay")
    key = torch.zeros_like(inputs["k"])
    key[..., 3] = 1
    out, state = function(q=key, k=key, v=inputs["v"], g=None, scale=1.0)
    torch.testing.assert_close(out, inputs["v"].cumsum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(state[:, :, 3], inputs["v"].sum(1), rtol=0, atol=1e-12)
    assert not state[:, :, :3].any()


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("regime", ["typical", "mixed_decay", "grouped"])
def test_reads_are_masked_attention(function, regime):
    inputs = make(OP, 40, regime=regime)
    q, k, v, g = (inputs[name].transpose(1, 2) for name in "qkvg")
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    since = g.cumsum(-1)
    weights = torch.exp(since[..., :, None] - since[..., None, :]).tril()
    expected = (0.3 * (q @ k.mT) * weights @ v).transpose(1, 2)
    out, _ = function(**inputs | {"state": None, "scale": 0.3})
    assert_close({"y": out}, {"y": expected}, 1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_no_decay_is_a_log_decay_of_zero(function):
    none = make(OP, 130, regime="no_decay")
    zero = none | {"g": torch.zeros(none["v"].shape[:3], dtype=torch.float64)}
    assert_close(results(function, none), results(function, zero), 1e-12)
    expected = gradients(function, zero)
    del expected["d['g']"]
    assert_close(gradients(function, none), expected, 1e-12)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("decays", [True, False], ids=["decay", "no_decay"])
def test_heads_of_a_group_share_queries_and_keys(function, groups, decays):
    inputs = make(OP, 70)
    inputs |= {name: inputs[name][:, :, :groups] for name in "qk"}
    inputs |= {} if decays else {"g": None}

    def repeated(q, k, **others):
        q, k = (x.repeat_interleave(6 // groups, 2) for x in (q, k))
        return scalar_decay_naive(q, k, **others)

    assert_close(results(function, inputs), results(repeated, inputs), 1e-12)
    assert_close(gradients(function, inputs), gradients(repeated, inputs), 1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_constant_decays_forget_geometrically(function):
    inputs = make(OP, 100)
    g = _retention(6).expand(2, 100, 6)
    _, state = function(**inputs | {"g": g})
    left = torch.exp(_retention(6) * torch.arange(99, -1, -1)[:, None])  # [T, H]
    written = torch.einsum("bthk,th,bthv->bhkv", inputs["k"], left, inputs["v"])
    expected = written + torch.exp(100 * _retention(6))[:, None, None] * inputs["state"]
    assert_close({"state": state}, {"state": expected}, 1e-12)


def test_one_decay_a_head_collects_the_gradient_of_every_token():
    inputs = make(OP, 100) | {"g": _retention(6)}

    def constant(function):
        return lambda g, **others: function(g=g.expand(2, 100, 6), **others)

    expected = gradients(constant(scalar_decay_naive), inputs)
    assert_close(gradients(constant(scalar_decay_chunk), inputs), expected, 1e-10)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 48, 128, 200])
@pytest.mark.parametrize("regime", ["no_decay", "grouped"])
def test_chunk_size_changes_nothing(chunk_size, regime):
    inputs = make(OP, 130, regime=regime)
    expected = results(OP.naive, inputs)
    assert_close(results(scalar_decay_chunk, inputs | {"chunk_size": chunk_size}), expected, 1e-10)


@pytest.mark.parametrize("function", [scalar_decay, scalar_decay_chunk])
def test_chunk_size_must_be_positive(function):
    with pytest.raises(ValueError, match="chunk_size is 0; it must be at least 1"):
        function(**make(OP, 1), chunk_size=0)


@pytest.mark.parametrize("function", [*FORMS, scalar_decay])
@pytest.mark.parametrize("groups", [4, 12])
def test_groups_must_divide_the_heads(function, groups):
    inputs = make(OP, 5)
    inputs |= {name: inputs[name][:, :, :1].expand(-1, -1, groups, -1) for name in "qk"}
    with pytest.raises(ValueError, match=f"q and k have {groups} heads and v has 6"):
        function(**inputs)


@pytest.mark.parametrize("regime", ["no_decay", "grouped"])
def test_several_segments_carry_state_and_gradient(regime, monkeypatch):
    monkeypatch.setattr("mneme.ops.tiling._SEGMENT_ELEMENTS", 2 * 12 * 16 * 20)
    inputs = make(OP, 150, regime=regime) | {"chunk_size": 16}
    plain = {key: x for key, x in inputs.items() if key != "chunk_size"}
    assert_close(results(scalar_decay_chunk, inputs), results(OP.naive, plain), 1e-10)
    assert_close(gradients(scalar_decay_chunk, inputs), gradients(OP.naive, plain), 1e-10)


@pytest.mark.parametrize("floor", [-1.0, -20.0, -50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strong_and_mixed_decays_stay_finite(floor, dtype):
    inputs = make(OP, 200, dtype=dtype)
    inputs["g"] = torch.empty_like(inputs["g"]).uniform_(floor, 0, generator=torch.manual_seed(0))
    inputs["g"][:, ::3] = floor
    assert all(x.isfinite().all() for x in results(scalar_decay_chunk, inputs).values())
    assert all(x.isfinite().all() for x in gradients(scalar_decay_chunk, inputs).values())


@pytest.mark.parametrize("regime", ["typical", "strong_decay", "mixed_decay", "grouped"])
def test_gradients_keep_their_digits_in_float32(regime):
    inputs = make(OP, 130, dtype=torch.float32, regime=regime)
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(gradients(scalar_decay_chunk, inputs), gradients(OP.naive, exact), 1e-4)


def test_float32_drift_is_bounded_over_8192_tokens():
    inputs = make(OP, 8192, batch=1, dtype=torch.float32, regime="no_decay", heads=2)
    exact = {key: x if x is None else x.double() for key, x in inputs.items()}
    assert_close(results(scalar_decay_chunk, inputs), results(scalar_decay_chunk, exact), 1e-5)


def test_entry_point_decodes_with_the_recurrence():
    inputs = make(OP, 1)
    for key, expected in results(scalar_decay_naive, inputs).items():
        assert torch.equal(results(scalar_decay, inputs)[key], expected)


@pytest.mark.parametrize("regime", ["typical", "no_decay"])
def test_state_is_float32_for_bfloat16_inputs(regime):
    y, state = scalar_decay(**make(OP, 20, dtype=torch.bfloat16, regime=regime))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_default_scale_is_that_of_attention():
    inputs = make(OP, 20)
    for function in (*FORMS, scalar_decay):
        explicit = results(function, inputs | {"scale": 1 / math.sqrt(12)})
        assert_close(results(function, inputs), explicit, 1e-15)


def test_inputs_and_state_are_left_as_they_were():
    inputs = make(OP, 70)
    before = {key: x.clone() for key, x in inputs.items()}
    gradients(scalar_decay_chunk, inputs)
    assert all(torch.equal(inputs[key], x) for key, x in before.items())


def test_second_derivative_is_refused():
    inputs = make(OP, 5)
    q = inputs["q"].requires_grad_()
    y, _ = scalar_decay_chunk(**inputs)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
