"""A piece may hold no token and a batch no sequence: layers and models give nothing, and go on."""

from itertools import product

import pytest
import torch

from mneme.layers import LAYERS, Memory, is_loss, map_state, state_tensors
from mneme.models import generate
from tests.conformance.test_models import every_model, small_model, tokens
from tests.helpers import (
    LAYER_EXAMPLES,
    assert_close,
    assert_states_close,
    example_input,
    example_layer,
)

every_layer = pytest.mark.parametrize(("name", "example"), LAYER_EXAMPLES, ids=str)
every_memory = pytest.mark.parametrize(
    ("name", "example"),
    [c for c in LAYER_EXAMPLES if issubclass(LAYERS[c[0]].cls, Memory)],
    ids=str,
)
SHAPES = [(2, 0), (0, 3), (0, 0)]


def state_after_nothing(layer, x, shape, before):
    """Without a token, as before; without a sequence, none in the shape that states then have."""
    if not shape[1]:
        return before
    return map_state(lambda tensor: tensor[:0], layer(x[:, : shape[1]]).state)


@every_layer
def test_layers_give_nothing(name, example):
    layer, full = example_layer(name, example), example_input(name)
    for shape, training in product(SHAPES, [True, False]):
        gives_nothing(layer.train(training), full, shape)


def gives_nothing(layer, full, shape):
    layer.zero_grad()
    x = full[: shape[0], : shape[1]].clone().requires_grad_()
    y, state, aux = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert_states_close(state, state_after_nothing(layer, full, shape, layer.init_state(shape[0])))
    assert aux.keys() == layer(full).aux.keys()
    for key, value in aux.items():
        assert value == 0 or key == "loss_tail", f"{key} is {value}"  # that one prices parameters
    (y.sum() + sum(value for key, value in aux.items() if is_loss(key))).backward()
    assert x.grad.shape == x.shape
    for key, parameter in layer.named_parameters():
        # a process without sequences averages gradients with others, which have all of them
        assert parameter.grad is not None, f"{key} has no gradient"
        assert not parameter.grad.to_dense().any() or "loss_tail" in aux, f"{key} would move"


@every_layer
def test_a_piece_without_tokens_leaves_a_state_as_it_is(name, example):
    layer, x = example_layer(name, example), example_input(name)
    before = layer(x).state
    y, after, _ = layer(x[:, :0], before)
    assert y.shape == x[:, :0].shape
    for a, b in zip(state_tensors(after), state_tensors(before), strict=True):
        assert torch.equal(a, b)
    x_in = x.clone().requires_grad_()
    first = layer(x_in[:, :5])
    middle = layer(x_in[:, 5:5], first.state)
    last = layer(x_in[:, 5:], middle.state).y
    assert_close(torch.cat([first.y, middle.y, last], 1), layer(x).y, "output in pieces")
    (pieces,) = torch.autograd.grad(last.square().sum(), x_in)
    (whole,) = torch.autograd.grad(layer(x_in).y[:, 5:].square().sum(), x_in)
    assert_close(pieces, whole, "gradient through a piece without tokens", 1e-9)


@every_memory
def test_memories_recall_nothing(name, example):
    memory, x = example_layer(name, example), example_input(name)
    written = memory(x).state
    for batch, length in SHAPES:
        state = map_state(lambda tensor, batch=batch: tensor[:batch].detach(), written)
        asked = x[:batch, :length].clone().requires_grad_()
        answer = memory.recall(asked, state)
        assert answer.shape == asked.shape
        answer.sum().backward()
        assert asked.grad.shape == asked.shape


@every_model
def test_models_give_nothing(mixer, pattern):
    model, x = small_model(mixer, pattern), tokens()
    for batch, length in SHAPES:
        model.zero_grad()
        state = map_state(lambda tensor, batch=batch: tensor[:batch], model(x).state)
        logits, after, aux = model(x[:batch, :length], state)
        assert logits.shape == (batch, length, model.vocab_size)
        if not length:
            for a, b in zip(state_tensors(after), state_tensors(state), strict=True):
                assert torch.equal(a, b)
        (logits.sum() + sum(value for key, value in aux.items() if is_loss(key))).backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert all(gradient.to_dense().isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_prompt_is_continued_by_nothing(temperature):
    model = small_model("gated_deltanet", "lm").float().eval()
    new, state = generate(model, tokens()[:0], 3, temperature=temperature, top_k=2, top_p=0.5)
    assert new.shape == (0, 3)
    assert all(tensor.shape[0] == 0 for tensor in state_tensors(state))


def test_every_layer_is_tried():
    assert {name for name, _ in LAYER_EXAMPLES} == set(LAYERS)
