"""Every form of every op takes pieces of no token and batches of no sequence."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mneme.ops import OPS
from tests.ops.calls import EMPTY_STARTS, EVERY_OP, ident, make

FORMS = [
    (name, form, regime)
    for name in EVERY_OP
    for form in ("naive", *OPS[name].forms)
    for regime in OPS[name].regimes
]
SHAPES = [(2, 0), (0, 3), (0, 0)]


def form_of(name, form):
    return OPS[name].naive if form == "naive" else OPS[name].forms[form]


def leaves(values):
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def parts(op, result):
    """Outputs and, of a stateful op, the tensors of its state."""
    return (leaves(result[0]), leaves(result[1])) if op.stateful else (leaves(result), [])


@pytest.mark.parametrize("case", FORMS, ids=ident)
def test_ops_give_nothing(case):
    for shape in SHAPES:
        gives_nothing(*case, shape)


def gives_nothing(name, form, regime, shape):
    op, function, (batch, length) = OPS[name], form_of(name, form), shape
    inputs = make(op, length, batch=batch, regime=regime)
    inputs = tree_map_only(
        Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, inputs
    )
    # the shapes of one sequence of as many tokens, or of one token, are known to be right
    usual = parts(op, function(**make(op, length or 1, batch=batch or 2, regime=regime)))
    outputs, state = parts(op, function(**inputs))
    for got, known in zip(outputs, usual[0], strict=True):
        assert not got.numel()
        assert (got.ndim, got.shape[2:]) == (known.ndim, known.shape[2:])
        assert got.shape[:2] == shape
        assert got.dtype == known.dtype
    if op.stateful and not length:
        for after, before in zip(state, leaves(inputs["state"]), strict=True):
            prefixed = "prefix" in inputs  # which is written before the first token
            assert prefixed or torch.equal(after, before)
    elif op.stateful:
        for after, known in zip(state, usual[1], strict=True):
            assert after.shape == (batch, *known.shape[1:])
    results = [x for x in (*outputs, *state) if x.requires_grad]
    wanted = [x for x in leaves(inputs) if x.requires_grad]
    for gradient in torch.autograd.grad(sum(x.sum() for x in results), wanted):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "case", [case for case in FORMS if case[2] == OPS[case[0]].regimes[0]], ids=ident
)
def test_outputs_of_nothing_pass_no_gradient(case):
    name, form, regime = case
    op, function = OPS[name], form_of(name, form)
    inputs = make(op, 0, regime=regime)
    inputs = tree_map_only(
        Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, inputs
    )
    wanted = [x for x in leaves(inputs) if x.requires_grad]
    outputs, _ = parts(op, function(**inputs))
    total = sum(x.sum() for x in outputs if x.requires_grad)
    assert not any(x.any() for x in torch.autograd.grad(total, wanted))


@pytest.mark.parametrize("case", EMPTY_STARTS, ids=ident)
def test_no_state_and_no_token_give_the_state_of_the_start(case):
    name, form = case
    op, some = OPS[name], make(OPS[name], 5)
    nothing = make(op, 0)
    del some["state"], nothing["state"]
    for function in (op.naive, op.forms[form]):
        start = function(**nothing)[1]
        pairs = zip(leaves(function(**some, state=start)), leaves(function(**some)), strict=True)
        assert all(torch.equal(from_start, without) for from_start, without in pairs)
