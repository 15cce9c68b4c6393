"""What every registered layer promises; a layer is tested by being registered."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mneme.layers import (
    LAYERS,
    Memory,
    detach_state,
    load_state,
    map_state,
    save_state,
    select_state,
    state_tensors,
)
from tests.helpers import (
    LAYER_EXAMPLES,
    assert_close,
    assert_states_close,
    example_input,
    example_layer,
    run_in_pieces,
)

every_layer = pytest.mark.parametrize(
    ("name", "example"), LAYER_EXAMPLES, ids=lambda value: str(value)
)
every_memory = pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, example in LAYER_EXAMPLES if issubclass(LAYERS[name].cls, Memory)],
    ids=lambda value: str(value),
)
LENGTH = 13


@every_layer
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    places=st.sets(st.floats(0, 1), max_size=4),
)
def test_pieces_give_what_the_whole_gives(name, example, batch, length, places):
    layer, x = example_layer(name, example), example_input(name, batch, length)
    cuts = {int(place * length) for place in places} | {0, length}
    edges = sorted(cuts)
    sizes = [b - a for a, b in pairwise(edges)]
    whole, pieces = layer(x), run_in_pieces(layer, x, sizes)
    assert_close(pieces.y, whole.y, f"output in pieces {sizes}")
    assert_states_close(pieces.state, whole.state)


@every_layer
def test_token_by_token_gives_what_the_whole_gives(name, example):
    layer, x = example_layer(name, example), example_input(name, length=LENGTH)
    whole, pieces = layer(x), run_in_pieces(layer, x, [1] * LENGTH)
    assert_close(pieces.y, whole.y, "output token by token")
    assert_states_close(pieces.state, whole.state)


@every_layer
def test_gradients_flow_through_the_carried_state_as_through_the_whole(name, example):
    layer, x = example_layer(name, example), example_input(name, length=LENGTH)
    gradients = []
    for sizes in ([LENGTH], [5, 1, LENGTH - 6]):
        x_in = x.clone().requires_grad_()
        y = run_in_pieces(layer, x_in, sizes).y
        inputs = [x_in, *layer.parameters()]
        gradients.append(torch.autograd.grad(y.square().sum(), inputs))
    for i, (pieces, whole) in enumerate(zip(*reversed(gradients), strict=True)):
        assert_close(pieces, whole, f"gradient {i}", 1e-9)


@every_layer
def test_initial_state_is_the_start_of_a_sequence(name, example):
    layer, x = example_layer(name, example), example_input(name)
    assert torch.equal(layer(x, layer.init_state(len(x))).y, layer(x).y)


@every_layer
def test_state_size_is_what_is_returned(name, example):
    layer = example_layer(name, example)
    for length in (1, 2, 20):
        state = layer(example_input(name, batch=1, length=length)).state
        assert layer.state_size(length) == sum(t.numel() for t in state_tensors(state))
    initial = state_tensors(layer.init_state(1))
    assert layer.state_size(0) == sum(t.numel() for t in initial)


@every_layer
def test_later_tokens_never_change_earlier_outputs(name, example):
    layer, x = example_layer(name, example), example_input(name, length=20)
    before = layer(x).y
    for position in (0, 7, 19):
        changed = x.clone()
        changed[0, position] += 10.0
        after = layer(changed).y
        assert torch.equal(after[0, :position], before[0, :position])
        assert torch.equal(after[1], before[1]), "another sequence of the batch changed"
        assert not torch.equal(after[0, position:], before[0, position:])


@every_layer
def test_batch_size_changes_nothing(name, example):
    layer, x = example_layer(name, example), example_input(name, batch=3)
    together = layer(x).y
    for i in range(3):
        assert_close(layer(x[i : i + 1]).y, together[i : i + 1], f"sequence {i} alone", 1e-12)


@every_layer
def test_states_can_be_selected_like_beams(name, example):
    layer, x = example_layer(name, example), example_input(name, batch=3)
    rows = torch.tensor([2, 0, 2])
    state = layer(x).state
    chosen = layer(x[rows], select_state(state, rows)).y
    assert_close(chosen, layer(x, state).y[rows], "after selecting rows", 1e-12)


@every_layer
def test_a_call_leaves_the_state_it_was_given_alone(name, example):
    layer, x = example_layer(name, example), example_input(name)
    state = layer(x).state
    copy = map_state(torch.clone, state)
    layer(x, state)
    for a, b in zip(state_tensors(state), state_tensors(copy), strict=True):
        assert torch.equal(a, b)


@every_layer
def test_state_can_be_saved_detached_and_loaded(name, example, tmp_path):
    layer, x = example_layer(name, example), example_input(name)
    state = detach_state(layer(x).state)
    assert not any(t.requires_grad for t in state_tensors(state))
    save_state(state, tmp_path / "state.pt")
    loaded = load_state(tmp_path / "state.pt", like=layer.init_state(len(x)))
    assert torch.equal(layer(x, loaded).y, layer(x, state).y)


@every_layer
def test_gradients_reach_every_parameter(name, example):
    layer, x = example_layer(name, example), example_input(name)
    output = layer(x)
    (output.y.square().sum() + sum(output.aux.values())).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    missing = [n for n, g in gradients.items() if g is None or g.to_dense().abs().max() < 1e-9]
    assert not missing


@every_layer
def test_gradient_of_the_input_is_right(name, example):
    layer, x = example_layer(name, example), example_input(name, batch=1, length=5)
    state = detach_state(layer(x).state)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, state).y, (x,), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_finite_in_bf16_over_16k_tokens_from_initialization(name):
    example = next(iter(LAYERS[name].examples))
    layer = example_layer(name, example, torch.bfloat16)
    x = example_input(name, batch=1, length=16_384, dtype=torch.bfloat16)
    with torch.no_grad():
        output = layer(x)
    assert output.y.dtype == torch.bfloat16
    assert output.y.isfinite().all()
    assert all(t.isfinite().all() for t in state_tensors(output.state))


@every_layer
def test_autocast_follows_fp32(name, example):
    layer = example_layer(name, example, torch.float32)
    x = example_input(name, length=64, dtype=torch.float32)
    exact = layer(x).y
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x).y
    assert_close(mixed, exact, "bf16 autocast", 0.05)


@every_layer
def test_no_option_is_swallowed(name, example):
    with pytest.raises(TypeError, match="no_such_option"):
        LAYERS[name].cls(16, no_such_option=1, **LAYERS[name].examples[example])


@every_memory
def test_tokens_are_recalled_alone(name, example):
    memory, x = example_layer(name, example), example_input(name)
    state = memory(x).state
    together = memory.recall(x, state)
    assert together.shape == x.shape
    alone = torch.cat([memory.recall(token, state) for token in x.split(1, dim=1)], dim=1)
    assert_close(alone, together, "recalled one by one", 1e-12)


@every_memory
def test_recall_without_a_state_is_that_of_the_initial_memory(name, example):
    memory, x = example_layer(name, example), example_input(name)
    assert torch.equal(memory.recall(x), memory.recall(x, memory.init_state(len(x))))


@every_memory
def test_what_was_written_is_recalled(name, example):
    memory, x = example_layer(name, example), example_input(name)
    once = memory(x).state
    twice = memory(x.flip(1), once).state
    answers = [memory.recall(x, state) for state in (None, once, twice)]
    for before, after in pairwise(answers):
        assert (after - before).abs().amax(-1).min() > 1e-6, "a token is answered as before"


@every_memory
def test_recall_leaves_the_state_alone(name, example):
    memory, x = example_layer(name, example), example_input(name)
    state = memory(x).state
    copy = map_state(torch.clone, state)
    memory.recall(x, state)
    for a, b in zip(state_tensors(state), state_tensors(copy), strict=True):
        assert torch.equal(a, b)


@every_memory
def test_gradients_flow_through_recall(name, example):
    # 16 tokens: whole chunks, as a memory may be written at the end of a chunk only
    memory, x = example_layer(name, example), example_input(name, batch=1, length=16)
    written, asked = x.clone().requires_grad_(), x.flip(1).requires_grad_()
    answer = memory.recall(asked, memory(written).state)
    for gradient in torch.autograd.grad(answer.square().sum(), [written, asked]):
        assert gradient.abs().amax(-1).min() > 1e-9, "a token has no gradient"
    state = detach_state(memory(x).state)
    assert torch.autograd.gradcheck(lambda x: memory.recall(x, state), (asked,), fast_mode=True)


@every_memory
def test_recall_in_bf16_and_under_autocast_follows_fp32(name, example):
    memory, x = example_layer(name, example, torch.float32), example_input(name, length=64).float()
    state = detach_state(memory(x).state)
    exact = memory.recall(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(memory.recall(x, state), exact, "bf16 autocast", 0.05)
    memory, x = memory.bfloat16(), x.bfloat16()
    assert memory.recall(x, memory(x).state).dtype == torch.bfloat16
