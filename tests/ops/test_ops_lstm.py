"""What is peculiar to the LSTM: it is PyTorch's with one head, and its heads are independent."""

import inspect

import pytest
import torch

from mneme.ops import OPS
from mneme.ops.lstm import lstm, lstm_naive, lstm_scan
from tests.ops.calls import gradients, make, results
from tests.ops.closeness import assert_close

OP = OPS["lstm"]
FORMS = [lstm_naive, lstm_scan]


@pytest.mark.parametrize("function", FORMS)
def test_one_head_is_the_lstm_of_pytorch(function):
    inputs = make(OP, 20, heads=1)
    reference = torch.nn.LSTM(7, 10, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 20, 7, dtype=torch.float64)
    with torch.no_grad():
        reference.weight_hh_l0.copy_(inputs["r"][:, 0].mT.flatten(0, 1))
        reference.bias_ih_l0.copy_(inputs["b"].flatten())
        reference.bias_hh_l0.zero_()
    h, c = inputs["state"]
    expected, (last_h, last_c) = reference(x, (h.transpose(0, 1), c.transpose(0, 1)))
    inputs["wx"] = (x @ reference.weight_ih_l0.mT).view(2, 20, 4, 1, 10)
    y, state = function(**inputs)
    assert_close(
        {"y": y[:, :, 0], "h": state.h, "c": state.c},
        {"y": expected, "h": last_h.transpose(0, 1), "c": last_c.transpose(0, 1)},
        1e-14,
    )


@pytest.mark.parametrize("name", ["lstm", "slstm"])
def test_heads_do_not_see_each_other(name):
    op = OPS[name]
    inputs = make(op, 20)
    changed = inputs | {"wx": inputs["wx"].clone()}
    changed["wx"][:, :, :, 1] += 1.0
    for function in (op.naive, op.forms["scan"]):
        before, after = (results(function, x)["y"] for x in (inputs, changed))
        assert torch.equal(before[:, :, [0, 2]], after[:, :, [0, 2]])
        assert not torch.equal(before[:, :, 1], after[:, :, 1])


@pytest.mark.parametrize("name", ["lstm", "slstm"])
@pytest.mark.parametrize("length", [1, 20])
def test_no_state_is_a_state_of_zeros(name, length):
    op = OPS[name]
    inputs = make(op, length)
    state = inputs.pop("state")
    zeros = inputs | {"state": type(state)(*(torch.zeros_like(x) for x in state))}
    for function in (op.naive, *op.forms.values()):
        expected = results(function, zeros)
        for key, value in results(function, inputs).items():
            assert torch.equal(value, expected[key])


RESULTS = {"lstm": ["y", "state.h", "state.c"], "slstm": ["y", *(f"state.{x}" for x in "hcnm")]}


@pytest.mark.parametrize(("name", "only"), [(name, x) for name in RESULTS for x in RESULTS[name]])
def test_several_segments_carry_state_and_every_gradient(name, only, monkeypatch):
    monkeypatch.setattr("mneme.ops.lstm.scan._SEGMENT_ELEMENTS", 7 * 2 * 3 * 10)
    op = OPS[name]
    inputs = make(op, 40)
    scan = op.forms["scan"]
    assert_close(results(scan, inputs), results(op.naive, inputs), 1e-12)
    expected = gradients(op.naive, inputs, only=only)
    assert_close(gradients(scan, inputs, only=only), expected, 1e-10)


def test_inputs_are_left_as_they_were():
    inputs = make(OP, 20, batch=1, heads=1)  # where transposed views stay contiguous
    copies = {name: inputs[name].clone() for name in ("wx", "r", "b")}
    start = [x.clone() for x in inputs["state"]]
    gradients(lstm_scan, inputs)
    assert all(torch.equal(inputs[name], x) for name, x in copies.items())
    assert all(torch.equal(x, y) for x, y in zip(inputs["state"], start, strict=True))


def test_results_may_be_overwritten():
    inputs = make(OP, 20, batch=1, heads=1)
    inputs["wx"].requires_grad_()
    expected = torch.autograd.grad(lstm_scan(**inputs)[0].sum(), inputs["wx"])[0]
    y, state = lstm_scan(**inputs)
    loss = y.sum()
    with torch.no_grad():
        y.zero_()
        state.h.zero_()
    assert torch.equal(torch.autograd.grad(loss, inputs["wx"])[0], expected)


def test_gradients_of_mixed_dtypes_come_back_in_their_own():
    inputs = make(OP, 20, dtype=torch.bfloat16)
    inputs["r"] = inputs["r"].float()
    inputs["wx"].requires_grad_()
    inputs["r"].requires_grad_()
    y, state = lstm_scan(**inputs)
    assert (y.dtype, state.c.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(y.sum(), (inputs["wx"], inputs["r"]))
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", ["lstm", "slstm"])
def test_entry_point_decodes_with_the_recurrence(name):
    op = OPS[name]
    inputs = make(op, 1)
    for key, expected in results(op.naive, inputs).items():
        assert torch.equal(results(op.forms["auto"], inputs)[key], expected)


@pytest.mark.parametrize("length", [1, 20])
def test_misfitting_weights_are_refused_with_the_shapes(length):
    function, inputs = inspect.unwrap(lstm), make(OP, length)  # without the tests' checks
    with pytest.raises(ValueError, match=r"needs \(4, 3, 10, 10\) and \(4, 3, 10\)"):
        function(**inputs | {"r": inputs["r"][:3]})
    with pytest.raises(ValueError, match=r"b \(4, 3, 9\); wx"):
        function(**inputs | {"b": inputs["b"][..., 1:]})
