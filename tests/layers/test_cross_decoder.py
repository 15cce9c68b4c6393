"""What is particular to the cross-decoder and to the units that read a saved representation."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import (
    MLP,
    CrossDecoder,
    GatedDeltaNet,
    GatedMemoryUnit,
    LinearAttention,
    Mamba,
    Mamba2,
    SavingLayer,
    SoftmaxAttention,
    TestTimeMemory,
    state_tensors,
)
from mneme.layers.parts.rotary import rotate
from mneme.models import LanguageModel, budget
from mneme.ops.gated_delta import gated_delta_naive
from tests.helpers import assert_close, assert_states_close, run_in_pieces

WIDTH, LENGTH = 16, 9
RECURRENT = partial(GatedDeltaNet, heads=2)
ATTENTION = partial(SoftmaxAttention, heads=4, kv_heads=2)


def build(memory=RECURRENT, **options):
    torch.manual_seed(0)
    options = {"attention": ATTENTION, "ffn": partial(MLP, expand=2)} | options
    layer = CrossDecoder(WIDTH, memory=memory, **options).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0)
    return layer


def x(length=LENGTH, width=WIDTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, width, generator=generator).double()


def normalized(t, norm):
    eps = 1e-5
    return norm.weight * t / (t.square().mean(-1, keepdim=True) + eps).sqrt()


# The gated memory unit


@pytest.mark.parametrize("norm", [True, False])
def test_the_unit_is_a_gated_product_between_two_maps(norm):
    torch.manual_seed(0)
    unit = GatedMemoryUnit(WIDTH, saved_dim=24, norm=norm).double()
    saved = x(width=24, seed=2)
    product = saved * F.silu(x() @ unit.gate_proj.weight.mT)
    if norm:
        product = normalized(product, unit.norm)
    assert_close(unit(x(), saved), product @ unit.out_proj.weight.mT, "output")
    parameters = sum(p.numel() for p in unit.parameters())
    assert parameters == 2 * WIDTH * 24 + (24 if norm else 0)


def test_a_unit_needs_something_to_read():
    with pytest.raises(ValueError, match="saved_dim must be 1 or more, got 0"):
        GatedMemoryUnit(WIDTH, saved_dim=0)


# What is saved


def saved_by_hand(memory, t):
    """What the rule reads, token by token, before norm, gate and output projection."""
    qkv, raw = memory.in_proj(t).tensor_split([sum(memory.widths)], dim=-1)
    q, k, v, g, beta = memory.operands(memory.conv(qkv).y, raw, None)
    return gated_delta_naive(q, k, v, g, beta)[0].flatten(-2)


def test_a_memory_saves_what_it_reads_before_its_gate_and_projection():
    torch.manual_seed(0)
    memory = GatedDeltaNet(WIDTH, heads=2, expand_v=2.0).double()
    output, saved = memory.forward_saving(x())
    assert memory.saved_dim == saved.shape[-1] == 2 * WIDTH
    assert_close(saved, saved_by_hand(memory, x()), "saved")
    assert_close(output.y, memory(x()).y, "output")
    assert_states_close(output.state, memory(x()).state)


def test_what_is_saved_goes_on_from_a_state():
    torch.manual_seed(0)
    memory = RECURRENT(WIDTH).double()
    first, saved = memory.forward_saving(x()[:, :4])
    _, rest = memory.forward_saving(x()[:, 4:], first.state)
    assert_close(torch.cat([saved, rest], 1), memory.forward_saving(x())[1], "saved in pieces")


@pytest.mark.parametrize("memory", [RECURRENT, partial(LinearAttention, heads=2), Mamba2, Mamba])
def test_matrix_and_state_space_memories_can_save(memory):
    assert isinstance(memory(64), SavingLayer)
    assert not isinstance(MLP(64), SavingLayer)


# The decoder


def attended_by_hand(q, k, v, base):
    """Every query against the tokens up to it; rotated to their positions."""
    positions = torch.arange(q.shape[1])[None]
    q, k = rotate(q, k, positions=positions, base=base)
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    outputs = []
    for t in range(q.shape[1]):
        logits = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1]) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("bhs,bshk->bhk", logits.softmax(-1), v[:, : t + 1]))
    return torch.stack(outputs, 1).flatten(-2)


def by_hand(layer, h):
    """The steps one after another, each with its norm."""
    start, ffns = h, iter(layer.ffns)

    def fed(h):
        step = next(ffns, None)
        return h if step is None else h + step.parts[0](normalized(h, step.norm)).y

    memory, attention = layer.memory.parts[0].layer, layer.attention.parts[0]
    inside = normalized(h, layer.memory.norm)
    saved = saved_by_hand(memory, inside)
    h = fed(h + memory(inside).y)
    inside = normalized(h, layer.attention.norm)
    k, v = (t.unflatten(-1, (2, -1)) for t in attention.kv_proj(inside).chunk(2, dim=-1))
    q = attention.q_proj(inside).unflatten(-1, (4, -1))
    h = fed(h + attention.out_proj(attended_by_hand(q, k, v, attention.rope_base)))
    for i, step in enumerate(layer.readers):
        reader, inside = step.parts[0].reader, normalized(h, step.norm)
        if i % 2:
            q = reader.q_proj(inside).unflatten(-1, (4, -1))
            y = reader.out_proj(attended_by_hand(q, k, v, attention.rope_base))
        else:
            y = reader(inside, saved)
        h = fed(h + y)
    return h - start


@pytest.mark.parametrize("options", [{}, {"ffn": None, "units": 2, "norm": False}], ids=str)
def test_it_is_its_steps_one_after_another(options):
    layer = build(**options)
    assert_close(layer(x()).y, by_hand(layer, x()), "output")


def test_only_what_the_steps_add_comes_out():
    layer = build()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.zero_()
    assert torch.equal(layer(x()).y, torch.zeros_like(x()))


def test_the_memory_learns_through_what_it_saved():
    layer = build()
    memory = layer.memory.parts[0].layer
    with torch.no_grad():
        memory.out_proj.weight.zero_()
    (gradient,) = torch.autograd.grad(layer(x()).y.square().sum(), memory.in_proj.weight)
    assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("units", [1, 3])
def test_one_memory_and_one_cache_are_carried_whatever_reads_them(units):
    layer = build(units=units)
    state = layer(x()).state
    alone = sum(recipe(WIDTH).state_size(LENGTH) for recipe in (RECURRENT, ATTENTION))
    assert layer.state_size(LENGTH) == alone
    assert sum(t[0].numel() for t in state_tensors(state)) == alone
    assert state.attention.k.shape == (2, LENGTH, 2, 4)


@pytest.mark.parametrize(
    "memory",
    [
        partial(LinearAttention, heads=2),
        partial(Mamba2, head_dim=8, state_dim=4),
        Mamba,
        partial(TestTimeMemory, heads=2, chunk_size=4),
        partial(SoftmaxAttention, heads=2, window=3),
        partial(MLP, expand=2),
    ],
    ids=lambda recipe: getattr(recipe, "func", recipe).__name__,
)
def test_any_layer_can_be_the_memory(memory):
    layer = build(memory)
    whole, pieces = layer(x()), run_in_pieces(layer, x(), [5, 1, 3])
    assert_close(pieces.y, whole.y, "output in pieces")
    assert_states_close(pieces.state, whole.state)


def test_a_memory_that_cannot_save_what_it_read_saves_its_output():
    layer = build(partial(MLP, expand=2))
    saving = layer.memory.parts[0]
    output = saving(x())
    assert saving.saved_dim == WIDTH
    assert torch.equal(output.state[1], output.y)


def test_a_model_scales_every_step_inside_with_the_depth():
    torch.manual_seed(0)
    model = LanguageModel(WIDTH, vocab_size=11, n_layers=1, pattern=[[lambda _: build()]])
    unscaled = dict(build().named_parameters())
    scaled = dict(model.blocks[0].parts[0].parts[0].named_parameters())
    for name, parameter in scaled.items():
        factor = 9**0.5 if name.endswith("out_proj.weight") else 1.0  # 8 inside, 1 around them
        assert_close(parameter * factor, unscaled[name], name)
    ends = [name for name in scaled if name.endswith("out_proj.weight")]
    assert len(ends) == 8


def test_the_costs_of_a_model_of_it_are_known_beforehand():
    model = LanguageModel(WIDTH, vocab_size=11, n_layers=1, pattern=[[lambda _: build()]]).double()
    costs = budget(model, LENGTH)
    state = model(torch.zeros(1, LENGTH, dtype=torch.long)).state
    assert costs.state_bytes == sum(t.numel() * t.element_size() for t in state_tensors(state))
    assert costs.active_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": 0}, "units must be 1 or more, got 0"),
        ({"attention": RECURRENT}, "attention must be SoftmaxAttention, got GatedDeltaNet"),
        (
            {"attention": partial(ATTENTION, window=4)},
            "attention must have neither a window nor persistent tokens",
        ),
        ({"attention": partial(ATTENTION, persistent=2)}, "neither a window nor persistent"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
