"""What is peculiar to the sLSTM: its stabilizer and its empty state."""

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.slstm import SLSTMState, slstm_naive, slstm_scan
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["slstm"]
FORMS = [slstm_naive, slstm_scan]


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("log_weight", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("forget", [-200.0, 200.0])
def test_first_token_is_written_with_weight_one(function, log_weight, forget):
    inputs = make(OP, 1, dtype=torch.float32) | {"state": None}
    inputs["wx"][:, :, 0], inputs["wx"][:, :, 1] = log_weight, forget
    i, _, z, o = (inputs["wx"] + inputs["b"])[:, 0].unbind(1)
    y, state = function(**inputs)
    torch.testing.assert_close(y[:, 0], o.sigmoid() * z.tanh())
    torch.testing.assert_close(state.m, i, rtol=0, atol=0)
    torch.testing.assert_close(state.n, torch.ones_like(i), rtol=0, atol=0)
    grads = gradients(function, inputs, only="y")
    assert all(x.isfinite().all() for x in grads.values())
    assert (grads["d['wx']"][:, :, :2].abs() < 1e-6).all()  # nothing to weigh it against


@pytest.mark.parametrize("function", FORMS)
def test_stabilizer_changes_nothing_but_the_range(function):
    inputs = make(OP, 30) | {"state": None}
    h = c = n = torch.zeros(2, 3, 10, dtype=torch.float64)
    out = []
    for wx in inputs["wx"].unbind(1):
        recurrent = torch.einsum("bhd,ghde->bghe", h, inputs["r"])
        i, f, z, o = (wx + recurrent + inputs["b"]).unbind(1)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        out.append(h)
    y, state = function(**inputs)
    held = {"c": state.c * state.m.exp(), "n": state.n * state.m.exp()}
    assert_close({"y": y, **held}, {"y": torch.stack(out, 1), "c": c, "n": n}, 1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_normalizer_is_at_least_one(function):
    inputs = make(OP, 60, regime="saturated", dtype=torch.float32) | {"state": None}
    for length in (1, 2, 9, 60):
        _, state = function(**inputs | {"wx": inputs["wx"][:, :length]})
        assert (state.n >= 1).all()
        assert (state.c.abs() <= state.n * (1 + 1e-6)).all()


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("length", [1, 20])
def test_empty_sequences_may_stand_beside_others(function, length):
    inputs = make(OP, length)
    h, c, n, m = inputs["state"]
    h[0], n[0] = 0, 0  # what c and m hold for it has no influence
    both = results(function, inputs)
    for row, state in ((0, None), (1, SLSTMState(*(x[1:] for x in (h, c, n, m))))):
        alone = results(function, inputs | {"wx": inputs["wx"][row : row + 1], "state": state})
        assert_close({key: x[row : row + 1] for key, x in both.items()}, alone, 1e-14)


def test_gradient_of_a_partly_empty_state_is_that_of_the_loop():
    inputs = make(OP, 20)
    inputs["state"].n[:, 1] = 0
    grads = gradients(slstm_scan, inputs)
    assert_close(grads, gradients(slstm_naive, inputs), 1e-10)
    assert all(grads[f"d['state'].{name}"][:, 1].count_nonzero() == 0 for name in "cnm")


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("size", [50.0, 1000.0])
def test_huge_gates_stay_finite_in_value_and_gradient(function, size):
    inputs = make(OP, 40, dtype=torch.float32) | {"state": None}
    signs = torch.randn(inputs["wx"].shape, generator=torch.Generator().manual_seed(2)).sign()
    inputs["wx"] = size * signs
    assert all(x.isfinite().all() for x in results(function, inputs).values())
    assert all(x.isfinite().all() for x in gradients(function, inputs).values())


def test_float32_keeps_the_digits_of_long_sequences():
    inputs = make(OP, 1000, batch=1, dtype=torch.float32)
    exact = {key: x.double() for key, x in inputs.items() if key != "state"}
    exact["state"] = SLSTMState(*(x.double() for x in inputs["state"]))
    assert_close(results(slstm_scan, inputs), results(slstm_scan, exact), 1e-5)
