"""What is peculiar to decays per channel: what they mean, and that none is too strong."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mneme.ops import OPS
from mneme.ops.diagonal_decay import diagonal_decay, diagonal_decay_chunk, diagonal_decay_naive
from mneme.ops.scalar_decay import scalar_decay_naive
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close, relative_error

OP = OPS["diagonal_decay"]
FORMS = [diagonal_decay_naive, diagonal_decay_chunk]
EXTREME = ["no", "strong", "mixed"]  # beginnings of regimes that are unlike the typical one


@pytest.mark.parametrize("function", FORMS)
def test_equal_channels_are_a_scalar_decay(function):
    inputs = make(OP, 130)
    inputs["g"] = inputs["g"][..., 0]

    def repeated(g, **others):
        return function(g=g[..., None].expand_as(others["k"]), **others)

    assert_close(results(repeated, inputs), results(scalar_decay_naive, inputs), 1e-12)
    assert_close(gradients(repeated, inputs), gradients(scalar_decay_naive, inputs), 1e-10)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("regime", ["typical", "mixed_decay"])
def test_reads_weigh_each_channel_of_each_earlier_write(function, regime):
    inputs = make(OP, 40, regime=regime)
    since = inputs["g"].cumsum(1)
    decay = (
        torch.exp(since[:, :, None] - since[:, None]) * torch.ones(40, 40).tril()[..., None, None]
    )
    weights = torch.einsum("bihk,bjhk,bijhk->bhij", inputs["q"], inputs["k"], decay)
    expected = 0.3 * torch.einsum("bhij,bjhv->bihv", weights, inputs["v"])
    out, _ = function(**inputs | {"state": None, "scale": 0.3})
    assert_close({"y": out}, {"y": expected}, 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 8, 16, 32, 64, 128])
def test_chunk_size_changes_nothing(chunk_size):
    inputs = make(OP, 130, regime="mixed_decay")
    chunked = inputs | {"chunk_size": chunk_size}
    assert_close(results(diagonal_decay_chunk, chunked), results(OP.naive, inputs), 1e-10)
    assert_close(gradients(diagonal_decay_chunk, chunked), gradients(OP.naive, inputs), 1e-10)


@pytest.mark.parametrize("chunk_size", [0, 48, -64])
def test_chunk_size_must_be_a_power_of_two(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size is {chunk_size}; it must be a power of two"):
        diagonal_decay(**make(OP, 5), chunk_size=chunk_size)


@pytest.mark.parametrize("regime", ["typical", "mixed_decay"])
def test_several_segments_carry_state_and_gradient(regime, monkeypatch):
    monkeypatch.setattr("mneme.ops.diagonal_decay.chunk._SEGMENT_ELEMENTS", 2 * 6 * 16 * 20)
    inputs = make(OP, 150, regime=regime)
    chunked = inputs | {"chunk_size": 16}  # segments of two chunks, the last of one and a part
    assert_close(results(diagonal_decay_chunk, chunked), results(OP.naive, inputs), 1e-10)
    assert_close(gradients(diagonal_decay_chunk, chunked), gradients(OP.naive, inputs), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_mild_strong_and_mixed_decays_beside_each_other_are_exact(dtype, tolerance):
    inputs = make(OP, 130, batch=4, dtype=dtype)
    inputs["g"][1:] = torch.stack(
        [make(OP, 130, dtype=dtype, regime=f"{kind}_decay")["g"][0] for kind in EXTREME]
    )
    inputs["g"][2, 70:75, 2, 3] = -torch.inf
    exact = {key: x.double() for key, x in inputs.items()}
    for function in (results, gradients):
        value, expected = function(diagonal_decay_chunk, inputs), function(OP.naive, exact)
        for sample in range(4):
            assert_close(
                {name: x[sample] for name, x in value.items()},
                {name: x[sample] for name, x in expected.items()},
                tolerance,
            )


@pytest.mark.parametrize("regime", EXTREME)
@pytest.mark.parametrize("length", [3, 130])
def test_no_sample_moves_a_bit_of_another(regime, length):
    """Whatever its decays are, in value, state and gradient."""
    inputs = make(OP, length, batch=3, dtype=torch.float32)
    extreme = inputs | {"g": inputs["g"].clone()}
    extreme["g"][1] = make(OP, length, dtype=torch.float32, regime=f"{regime}_decay")["g"][0]
    extreme["g"][1, length // 2, 2, 3] = -torch.inf
    for function in (results, gradients):
        before, after = function(diagonal_decay, inputs), function(diagonal_decay, extreme)
        for name, x in before.items():
            assert torch.equal(after[name][::2], x[::2]), name
            assert not torch.equal(after[name][1], x[1]), name


def test_nothing_waits_for_the_value_of_a_number():
    """A fake tensor has no values, so that asking for one fails; on a GPU it would wait."""
    with FakeTensorMode() as mode:
        inputs = {key: mode.from_tensor(x) for key, x in make(OP, 130).items()}
        inputs = {key: x.requires_grad_() for key, x in inputs.items()}
        y, state = diagonal_decay(**inputs)
        torch.autograd.backward((y, state), (torch.ones_like(y), torch.ones_like(state)))
    assert inputs["g"].grad.shape == inputs["g"].shape


def test_what_is_not_a_number_stays_where_it_is():
    inputs = make(OP, 130)
    inputs["g"][0, 70, 1] = torch.nan
    inputs["g"][1, 5, 0] = -1000.0
    y, state = diagonal_decay_chunk(**inputs)
    assert y[0, 70:, 1].isnan().all()
    assert state[0, 1].isnan().all()
    assert y[0, :, 0].isfinite().all()
    assert y[1].isfinite().all()


def _scattered(values, like):
    """Each entry one of the values, at random."""
    generator = torch.Generator().manual_seed(2)
    index = torch.randint(len(values), like.shape, generator=generator)
    return torch.tensor(values, dtype=like.dtype)[index]


EXTREMES = [[-50.0], [-1e4], [-torch.inf], [0.0, -20.0], [0.0, -50.0, -1e4, -torch.inf]]


@pytest.mark.parametrize("values", EXTREMES, ids=str)
def test_extreme_decays_are_exact(values):
    inputs = make(OP, 130)
    inputs["g"] = _scattered(values, inputs["g"])
    assert_close(results(diagonal_decay_chunk, inputs), results(OP.naive, inputs), 1e-10)
    assert_close(gradients(diagonal_decay_chunk, inputs), gradients(OP.naive, inputs), 1e-10)


@pytest.mark.parametrize("values", EXTREMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_decays_stay_finite(values, dtype):
    inputs = make(OP, 130, dtype=dtype)
    inputs["g"] = _scattered(values, inputs["g"])
    assert all(x.isfinite().all() for x in results(diagonal_decay_chunk, inputs).values())
    assert all(x.isfinite().all() for x in gradients(diagonal_decay_chunk, inputs).values())


def test_gradient_of_strong_decays_among_weak_keeps_its_digits_in_float32():
    inputs = make(OP, 130, dtype=torch.float32)
    strong = torch.zeros_like(inputs["g"], dtype=torch.bool)
    strong[:, 5::7, :, ::2] = True
    inputs["g"][strong] = -20.0  # of a gradient of about 1e-9, among others of about 1
    exact = {key: x.double() for key, x in inputs.items()}
    dg = gradients(diagonal_decay_chunk, inputs)["d['g']"]
    expected = gradients(OP.naive, exact)["d['g']"]
    assert relative_error(dg[strong], expected[strong]) < 1e-5
    assert relative_error(dg[~strong], expected[~strong]) < 1e-5


def test_float32_drift_is_bounded_over_8192_tokens():
    inputs = make(OP, 8192, batch=1, dtype=torch.float32, regime="no_decay")
    exact = {key: x.double() for key, x in inputs.items()}
    assert_close(results(diagonal_decay_chunk, inputs), results(diagonal_decay_chunk, exact), 1e-5)


@pytest.mark.parametrize("function", FORMS)
def test_a_decay_to_nothing_starts_afresh(function):
    inputs = make(OP, 100)
    inputs["g"][:, 70] = -torch.inf
    late = {key: inputs[key][:, 70:] for key in OP.timed}
    y, state = function(**inputs)
    y_late, state_late = function(**late)
    whole, fresh = {"y": y[:, 70:], "state": state}, {"y": y_late, "state": state_late}
    assert_close(whole, fresh, 1e-12)


def test_entry_point_decodes_with_the_recurrence():
    inputs = make(OP, 1)
    for key, expected in results(diagonal_decay_naive, inputs).items():
        assert torch.equal(results(diagonal_decay, inputs)[key], expected)


def test_state_is_float32_for_bfloat16_inputs():
    y, state = diagonal_decay(**make(OP, 20, dtype=torch.bfloat16))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_second_derivative_is_refused():
    inputs = make(OP, 5)
    q = inputs["q"].requires_grad_()
    y, _ = diagonal_decay_chunk(**inputs)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
