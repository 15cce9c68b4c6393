"""What every registered op owes: each fast form is the naive one, causal, and fed in any pieces."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from mneme import ops
from mneme.ops import OPS
from tests.ops.calls import (
    EMPTY_STARTS,
    EVERY_FORM,
    EVERY_OP,
    EVERY_REGIME,
    STATEFUL_FORMS,
    cut,
    gradients,
    ident,
    make,
    replaced,
    results,
    scalar,
    tensors,
)
from tests.ops.closeness import assert_close


def test_every_op_folder_is_registered():
    folders = {path.parent.name for path in Path(ops.__file__).parent.glob("*/naive.py")}
    assert folders == set(OPS)
    assert all(name == op.name for name, op in OPS.items())


@pytest.mark.parametrize("name", EVERY_OP)
def test_op_explains_itself_and_has_a_fast_form(name):
    assert (Path(ops.__file__).parent / name / "README.md").is_file()
    assert OPS[name].forms


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("case", EVERY_REGIME, ids=ident)
def test_form_equals_naive_in_value_state_and_gradient(case, length):
    name, form, regime = case
    op = OPS[name]
    inputs = make(op, length, regime=regime)
    assert_close(results(op.forms[form], inputs), results(op.naive, inputs), 1e-10)
    assert_close(gradients(op.forms[form], inputs), gradients(op.naive, inputs), 1e-10)


@pytest.mark.parametrize("case", STATEFUL_FORMS, ids=ident)
@pytest.mark.parametrize("only", ["y", "state"])
def test_gradient_through_one_result_alone(case, only):
    name, form = case
    op = OPS[name]
    inputs = make(op, 70)
    fast = gradients(op.forms[form], inputs, only=only)
    assert_close(fast, gradients(op.naive, inputs, only=only), 1e-10)


@pytest.mark.parametrize("case", EVERY_FORM, ids=ident)
def test_gradient_of_one_input_alone(case):
    name, form = case
    op = OPS[name]
    inputs = make(op, 70)
    expected = gradients(op.forms[form], inputs)
    for wanted, value in tensors(inputs).items():
        leaf = value.clone().requires_grad_()
        loss = scalar(results(op.forms[form], replaced(inputs, {wanted: leaf})))
        (grad,) = torch.autograd.grad(loss, leaf)
        assert_close({wanted: grad}, {wanted: expected[f"d{wanted}"]}, 1e-12)


@pytest.mark.parametrize("case", EVERY_FORM, ids=ident)
def test_gradcheck(case):
    name, form = case
    op = OPS[name]
    inputs = make(op, 9, batch=1)
    leaves = {path: x.detach().requires_grad_() for path, x in tensors(inputs).items()}

    def function(*values):
        out = results(op.forms[form], replaced(inputs, dict(zip(leaves, values, strict=True))))
        return tuple(out.values())

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", EMPTY_STARTS, ids=ident)
def test_no_state_is_a_state_of_zeros(case):
    name, form = case
    op = OPS[name]
    inputs = make(op, 20)
    zeros = inputs | {"state": tree_map_only(Tensor, torch.zeros_like, inputs["state"])}
    missing = {key: x for key, x in inputs.items() if key != "state"}
    for function in (op.naive, op.forms[form]):
        for key, expected in results(function, zeros).items():
            torch.testing.assert_close(
                results(function, missing)[key], expected, rtol=0, atol=0, msg=key
            )


@pytest.mark.parametrize("case", STATEFUL_FORMS, ids=ident)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_split_of_the_sequence_gives_the_same(case, data):
    name, form = case
    op = OPS[name]
    length = data.draw(st.integers(2, 150), label="length")
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3), label="cuts"))
    inputs = make(op, length)
    state, pieces = inputs["state"], []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        y, state = op.forms[form](**cut(inputs, op, start, stop) | {"state": state})
        pieces.append(y)
    states = {f"state{path}": x for path, x in tensors(state).items()}
    assert_close({"y": torch.cat(pieces, 1)} | states, results(op.naive, inputs), 1e-10)


@pytest.mark.parametrize("position", [0, 40, 64, 99])
@pytest.mark.parametrize("case", EVERY_REGIME, ids=ident)
def test_changing_a_token_leaves_earlier_outputs_bit_equal(case, position):
    name, form, regime = case
    op = OPS[name]
    length = 100
    inputs = make(op, length, regime=regime, dtype=torch.float32)
    changed = dict(inputs)
    for key in op.timed:
        changed[key] = tree_map_only(Tensor, torch.clone, inputs[key])
        for x in tensors(changed[key]).values():
            x[:, position - length] -= 0.5
    before, after = (results(op.forms[form], x)["y"] for x in (inputs, changed))
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("case", EVERY_FORM, ids=ident)
def test_bfloat16_is_finite_at_length_16k(case):
    name, form = case
    op = OPS[name]
    small = {"heads": 2} if "heads" in op.odd_sizes else {}
    inputs = make(op, 16384, batch=1, dtype=torch.bfloat16, **small)
    out = results(op.forms[form], inputs)
    assert out["y"].dtype == torch.bfloat16
    assert all(x.isfinite().all() for x in out.values())


@pytest.mark.parametrize("case", EVERY_FORM, ids=ident)
def test_bfloat16_inputs_cost_only_their_own_rounding(case):
    name, form = case
    op = OPS[name]
    inputs = make(op, 130, dtype=torch.bfloat16)
    exact = tree_map_only(Tensor, Tensor.double, inputs)
    of_value, of_gradient = (2**-6, 2**-3) if op.half_products else (2**-8, 2**-6)
    assert_close(results(op.forms[form], inputs), results(op.naive, exact), of_value)
    assert_close(gradients(op.forms[form], inputs), gradients(op.naive, exact), of_gradient)


@pytest.mark.parametrize("case", EVERY_FORM, ids=ident)
def test_checkpointing_changes_nothing(case):
    name, form = case
    op = OPS[name]
    inputs = make(op, 70)

    def checkpointed(**arguments):
        return checkpoint(op.forms[form], use_reentrant=False, **arguments)

    expected = gradients(op.forms[form], inputs)
    assert_close(gradients(checkpointed, inputs), expected, 1e-14)


@pytest.mark.parametrize("case", EVERY_FORM, ids=ident)
def test_compiling_changes_nothing(case, compiled):
    assert compiled("op", *case) == ""
