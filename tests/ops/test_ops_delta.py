"""What is peculiar to the delta rule: the meaning of a write, and the gated rule without decay."""

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.delta import delta, delta_chunk, delta_naive
from mneme.ops.gated_delta import gated_delta, gated_delta_chunk, gated_delta_naive
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["delta"]
FORMS = [delta_naive, delta_chunk]


def one_key(inputs):
    """A unit key along the fourth axis at every token."""
    key = torch.zeros_like(inputs["k"])
    key[..., 3] = 1
    return key


@pytest.mark.parametrize("function", FORMS)
def test_a_key_written_twice_holds_the_second_value(function):
    inputs = make(OP, 70)
    key, ones = one_key(inputs), torch.ones_like(inputs["beta"])
    out, state = function(key, key, inputs["v"], ones, inputs["state"], scale=1.0)
    torch.testing.assert_close(out, inputs["v"], rtol=0, atol=1e-13)
    torch.testing.assert_close(state[:, :, 3], inputs["v"][:, -1], rtol=0, atol=1e-13)
    others = [row for row in range(12) if row != 3]
    assert torch.equal(state[:, :, others], inputs["state"][:, :, others])


@pytest.mark.parametrize("function", FORMS)
def test_a_write_of_strength_zero_leaves_the_state(function):
    inputs = make(OP, 70)
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    assert torch.equal(results(function, inputs)["state"], inputs["state"])


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize(("tokens", "sign"), [(7, -1), (8, 1), (70, 1)])
def test_writing_nothing_with_strength_two_flips_what_is_stored(function, tokens, sign):
    inputs = make(OP, tokens)
    key, twos = one_key(inputs), torch.full_like(inputs["beta"], 2)
    expected = inputs["state"].clone()
    expected[:, :, 3] *= sign
    _, state = function(key, key, torch.zeros_like(inputs["v"]), twos, inputs["state"])
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("plain", "gated"),
    [(delta_naive, gated_delta_naive), (delta_chunk, gated_delta_chunk), (delta, gated_delta)],
)
@pytest.mark.parametrize("gates", ["zero", "none"])
def test_is_the_gated_rule_without_decay(plain, gated, gates):
    inputs = make(OP, 130)
    g = torch.zeros_like(inputs["beta"]) if gates == "zero" else None
    assert_close(results(plain, inputs), results(gated, inputs | {"g": g}), 1e-14)
    expected = gradients(gated, inputs | {"g": g})
    expected.pop("d['g']", None)
    assert_close(gradients(plain, inputs), expected, 1e-12)


def test_several_segments_carry_state_and_gradient(monkeypatch):
    monkeypatch.setattr("mneme.ops.tiling._SEGMENT_ELEMENTS", 2 * 6 * 16 * 20)
    inputs = make(OP, 150)
    chunked = inputs | {"chunk_size": 16}
    assert_close(results(delta_chunk, chunked), results(OP.naive, inputs), 1e-10)
    assert_close(gradients(delta_chunk, chunked), gradients(OP.naive, inputs), 1e-10)


def test_inputs_are_left_as_they_were():
    inputs = make(OP, 64, batch=1, heads=1)  # tiles of one memory may be views of the inputs
    before = {name: x.clone() for name, x in inputs.items()}
    gradients(delta_chunk, inputs)
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


def test_entry_point_decodes_with_the_recurrence():
    inputs = make(OP, 1)
    for key, expected in results(delta_naive, inputs).items():
        assert torch.equal(results(delta, inputs)[key], expected)


@pytest.mark.parametrize("length", [1, 70])
def test_chunk_size_must_be_a_power_of_two(length):
    with pytest.raises(ValueError, match="chunk_size is 48; it must be a power of two, at least 4"):
        delta(**make(OP, length), chunk_size=48)
