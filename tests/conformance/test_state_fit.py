"""A state that does not fit its call is refused with what was given and what is needed."""

import copy
import io
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
from torch.func import functional_call
from torch.utils import _pytree as pytree

from mneme.layers import (
    LAYERS,
    GatedDeltaNet,
    Memory,
    Residual,
    SavingLayer,
    SoftmaxAttention,
    SwiGLU,
    detach_state,
    load_state,
    map_state,
    save_state,
    select_state,
    state_tensors,
)
from mneme.layers.state_fit import require_fit
from mneme.models import LanguageModel
from tests.helpers import LAYER_EXAMPLES, example_input, example_layer

TOKENS = 20  # more than any example's window, chunk or segment


@cache
def layer_of(name, example):
    return example_layer(name, example)


@cache
@torch.no_grad()
def states_of(name, example):
    """A layer's own states of two sequences after 0 to `TOKENS` tokens."""
    layer = layer_of(name, example)
    states = [layer.init_state(2)]
    for token in example_input(name, length=TOKENS).split(1, dim=1):
        states.append(layer(token, states[-1]).state)
    return states


def carried(name, example):
    return states_of(name, example)[13]


STATEFUL = [case for case in LAYER_EXAMPLES if state_tensors(layer_of(*case).init_state(1))]
every_stateful = pytest.mark.parametrize(("name", "example"), STATEFUL, ids=str)


def refused(layer, x, state):
    """The message of every entry that a layer has, which are to agree."""
    entries = [layer]
    entries += [layer.recall] if isinstance(layer, Memory) else []
    entries += [layer.forward_saving] if isinstance(layer, SavingLayer) else []
    messages = set()
    for entry in entries:
        with pytest.raises(ValueError, match="cannot go on from this state") as caught:
            entry(x, state)
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message
    return message


def looks_like_one_of(state, own):
    """Whether a state has the structure of a layer's own, and sizes between those that occur."""
    if pytree.tree_structure(state) != pytree.tree_structure(own[0]):
        return False
    for tensor, *others in zip(*map(pytree.tree_leaves, [state, *own]), strict=True):
        if tensor is None or others[0] is None:
            if tensor is not others[0]:
                return False
            continue
        sizes = list(zip(*(other.shape for other in others), strict=True))
        if tensor.ndim != len(sizes) or tensor.dtype != others[0].dtype:
            return False
        if not all(min(s) <= n <= max(s) for n, s in zip(tensor.shape, sizes, strict=True)):
            return False
    return True


@every_stateful
@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_size_is_refused(name, example, batch):
    message = refused(layer_of(name, example), example_input(name, batch), carried(name, example))
    assert f"with {batch} sequences" in message
    assert f"[{batch}, " in message or f"[{batch}]" in message
    assert "[2, " in message or "[2]" in message


@pytest.mark.parametrize(("name", "example"), LAYER_EXAMPLES, ids=str)
def test_states_of_other_layers_are_refused(name, example):
    """All that a layer's own states could not be; those of a layer alike cannot be told."""
    layer, x, own = layer_of(name, example), example_input(name, length=2), states_of(name, example)
    for other in STATEFUL:
        state = carried(*other)
        if looks_like_one_of(state, own):
            require_fit(layer, x, state)
        else:
            refused(layer, x, state)


@every_stateful
def test_another_family_of_dtypes_is_refused(name, example):
    layer, x = layer_of(name, example), example_input(name)
    leaves, spec = pytree.tree_flatten(carried(name, example))
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            changed = leaf.long() if leaf.is_floating_point() else leaf.double()
            message = refused(
                layer, x, pytree.tree_unflatten([*leaves[:i], changed, *leaves[i + 1 :]], spec)
            )
            assert ("floating-point [" if leaf.is_floating_point() else "integer [") in message


@every_stateful
def test_another_device_is_refused(name, example):
    state = map_state(lambda tensor: tensor.to("meta"), carried(name, example))
    message = refused(layer_of(name, example), example_input(name), state)
    assert "on meta, and must be" in message
    assert message.endswith("on cpu")


@every_stateful
def test_another_structure_is_refused(name, example):
    layer, x, state = layer_of(name, example), example_input(name), carried(name, example)
    leaves, spec = pytree.tree_flatten(state)
    if not isinstance(state, torch.Tensor):  # for which None is a start
        refused(layer, x, pytree.tree_unflatten([None, *leaves[1:]], spec))
    refused(layer, x, (state,))
    refused(layer, x, leaves)
    refused(layer, x, {"state": state})


@every_stateful
def test_states_that_fit_are_taken(name, example, tmp_path):
    layer, x, rows = layer_of(name, example), example_input(name), torch.tensor([1, 1])
    for state in states_of(name, example)[::6]:
        save_state(detach_state(state), tmp_path / "state.pt")
        loaded = load_state(tmp_path / "state.pt", like=layer.init_state(2))
        for valid in (state, select_state(state, rows), loaded, copy.deepcopy(state)):
            layer(x, valid)


@every_stateful
def test_precision_is_free(name, example):
    layer, x = example_layer(name, example, torch.float32), example_input(name).float()
    full = layer(x).state
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x, full).state
    layer(x, mixed)
    require_fit(layer.bfloat16(), x.bfloat16(), full)  # not all layers keep more than they compute


@every_stateful
def test_what_is_known_of_states_travels_with_a_layer(name, example):
    layer, x, state = layer_of(name, example), example_input(name), carried(name, example)
    wrong, keys = map_state(lambda tensor: tensor[:1], state), set(layer.state_dict())
    refused(layer, x, wrong)
    assert set(layer.state_dict()) == keys
    copied = copy.deepcopy(layer)
    refused(copied, x, wrong)
    copied(x, state)
    refused(example_layer(name, example).float(), x, wrong)
    parameters = dict(layer.named_parameters())
    functional_call(layer, parameters, (x, state))
    with pytest.raises(ValueError, match="cannot go on"):
        functional_call(layer, parameters, (x, wrong))


def test_layers_are_pickled_after_a_check():
    layer = Residual(16, layer=partial(GatedDeltaNet, heads=2))
    x, file = torch.randn(3, 2, 16), io.BytesIO()
    state = layer(x, layer.init_state(3)).state
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    refused(loaded, x, layer.init_state(1))
    assert torch.equal(loaded(x, state).y, layer(x, state).y)


def test_a_state_may_be_given_by_its_name():
    layer, x = GatedDeltaNet(16, heads=2), torch.randn(3, 2, 16)
    with pytest.raises(ValueError, match=r"memory is float32 \[1, 2, 8, 8\] on cpu, and must be"):
        layer(x, state=layer.init_state(1))


def small_model(*layers):
    return LanguageModel(16, vocab_size=11, n_layers=2, pattern=[layers])


def test_models_refuse_what_their_layers_do():
    attention, delta = partial(SoftmaxAttention, heads=2), partial(GatedDeltaNet, heads=2)
    model, other = small_model(attention, delta), small_model(delta, SwiGLU)
    tokens = torch.zeros(3, 4, dtype=torch.long)
    state = model(tokens).state
    model(tokens, state)
    for wrong in (select_state(state, torch.tensor([0])), other(tokens).state, state[:1], state[0]):
        with pytest.raises(ValueError, match="cannot go on from this state with 3 sequences"):
            model(tokens, wrong)


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounter
from mneme.layers import GatedDeltaNet, Residual
layer, other = (Residual(16, layer=lambda d: GatedDeltaNet(d, heads=2)) for _ in range(2))
counter = CompileCounter()
compiled = torch.compile(layer, backend=counter, fullgraph=True)
x = torch.randn(3, 2, 16)
with torch.no_grad():
    state = other(x).state
    for _ in range(3):
        compiled(x, state)
    assert counter.frame_count == 1, counter.frame_count
    wrong = layer.init_state(1)
    try:
        torch.compile(layer, backend="eager")(x, wrong)
    except ValueError as error:
        print(error)
"""


def test_compiled_layers_refuse_too_and_are_traced_once():
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "GatedDeltaNet cannot go on from this state with 3 sequences" in done.stdout


def test_every_layer_is_tried():
    assert {name for name, _ in LAYER_EXAMPLES} == set(LAYERS)
