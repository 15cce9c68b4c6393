"""What is particular to the three ways to join a memory and attention."""

from functools import partial

import pytest
import torch

from mneme.layers import (
    MLP,
    GatedDeltaNet,
    Memory,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    Output,
    Parallel,
    Residual,
    select_state,
    state_tensors,
)
from mneme.layers.parts.rotary import rotate
from mneme.models import LanguageModel, budget
from tests.helpers import assert_close, assert_states_close, run_in_pieces

WIDTH, LENGTH, SEGMENT = 16, 12, 5
WINDOWED = (MemoryAsGate, MemoryAsLayer)
ALL = (MemoryAsContext, *WINDOWED)

every_layer = pytest.mark.parametrize("cls", ALL)
every_windowed = pytest.mark.parametrize("cls", WINDOWED)


def build(cls, memory=GatedDeltaNet, **options):
    torch.manual_seed(0)
    options = {"heads": 2, "persistent": 3} | options
    options |= {"segment": SEGMENT} if cls is MemoryAsContext else {"window": 4}
    return cls(WIDTH, memory=partial(memory, heads=2), **options).double()


def x(length=LENGTH):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def forgetful(layer):
    """The same layer with a memory that has forgotten everything when the next token comes."""
    with torch.no_grad():
        layer.memory.decay.A_log.fill_(8.0)
        layer.memory.decay.dt_bias.fill_(1.0)
    return layer


def attended_by_hand(layer, recalled, segment):
    """One softmax per token, over lists of what it may see."""

    def heads(t):
        return t.unflatten(-1, (layer.heads, -1))

    def at(j, t):
        return rotate(t, positions=torch.tensor([[j]]), base=layer.rope_base)[0]

    def keys_and_values(t):
        return [heads(part) for part in layer.kv_proj(t).chunk(2, dim=-1)]

    prefix_k, prefix_v = keys_and_values(layer.persistent.expand(len(segment), -1, -1))
    k, v, outputs = [prefix_k], [prefix_v], []
    recalled = layer.recall_norm(recalled)
    for j, (h, s) in enumerate(zip(recalled.split(1, 1), segment.split(1, 1), strict=True)):
        for seen in (h, s):
            key, value = keys_and_values(seen)
            k.append(at(j, key))
            v.append(value)
        q = at(j, heads(layer.q_proj(s)))
        scores = torch.einsum("bthk,bshk->bhts", q, torch.cat(k, 1)) / q.shape[-1] ** 0.5
        y = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), torch.cat(v, 1))
        outputs.append(layer.attention_proj(y.flatten(-2)))
    return torch.cat(outputs, 1)


def context_by_hand(layer, inputs):
    """Outputs, what attention made, and the memory at the end, segment by segment."""
    outputs, attended, memory = [], [], None
    for segment in inputs.split(layer.segment, dim=1):
        recalled = layer.memory.recall(layer.query_proj(segment), memory)
        y = attended_by_hand(layer, recalled, segment)
        m, memory, _ = layer.memory(y, memory)
        outputs.append(gated_by_hand(layer.gate, y, m))
        attended.append(y)
    return torch.cat(outputs, 1), torch.cat(attended, 1), memory


def gated_by_hand(gate, y, m):
    def normalized(t, norm):
        return norm.weight * t / (t.square().mean(-1, keepdim=True) + norm_eps).sqrt()

    norm_eps = 1e-5
    return (1 + normalized(y, gate.attention_norm)) * (1 + normalized(m, gate.memory_norm)) - 1


def test_recall_is_forward_without_decay_writing_and_convolution():
    memory = GatedDeltaNet(WIDTH, heads=2, conv_size=1).double()
    state = memory(x()).state
    with torch.no_grad():
        memory.decay.A_log.fill_(-60.0)
    memory.max_beta = 0.0
    read = memory(x().flip(1), state)
    assert_close(memory.recall(x().flip(1), state), read.y, "recalled")
    assert_close(read.state.memory, state.memory, "memory that nothing was written to")


def test_context_is_the_papers_equations_segment_by_segment():
    layer = build(MemoryAsContext)
    with torch.no_grad():
        layer.gate.attention_norm.weight.uniform_(0.5, 2.0)
        layer.gate.memory_norm.weight.uniform_(0.5, 2.0)
    y, _, memory = context_by_hand(layer, x())
    output = layer(x())
    assert_close(output.y, y, "output")
    assert_states_close(output.state.memory, memory)


def test_context_attends_before_it_writes_and_writes_what_attention_made():
    layer, segment = build(MemoryAsContext), x(SEGMENT)
    attended = attended_by_hand(layer, layer.memory.recall(layer.query_proj(segment)), segment)
    state = layer(segment).state
    assert_states_close(state.memory, layer.memory(attended).state)
    assert not torch.allclose(state.memory.memory, layer.memory(segment).state.memory)


def test_what_a_token_recalls_reaches_it_and_later_tokens_of_its_segment_only():
    layer, inputs, changed = build(MemoryAsContext), x(), x()
    token = SEGMENT + 2
    changed[:, token] += 1.0
    state = layer(inputs[:, :SEGMENT]).state
    asked = [layer.query_proj(t[:, SEGMENT : 2 * SEGMENT]) for t in (inputs, changed)]
    recalled, other = (layer.memory.recall(t, state.memory) for t in asked)
    differ = (recalled - other).abs().amax((0, 2)) > 1e-6
    assert differ.tolist() == [False, False, True, False, False]
    difference = (layer(inputs).y - layer(changed).y).abs().amax((0, 2))
    assert torch.equal(difference[:token], torch.zeros(token).double())
    assert difference[token:].min() > 1e-6
    segment = inputs[:, SEGMENT : 2 * SEGMENT]
    through_h = attended_by_hand(layer, other, segment) - attended_by_hand(layer, recalled, segment)
    assert (through_h.abs().amax((0, 2)) > 1e-6).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("sizes", [[7], [3, 4], [5, 2], [1] * 7], ids=str)
def test_segments_begin_at_absolute_positions(sizes):
    layer = build(MemoryAsContext)
    state = run_in_pieces(layer, x(7), sizes).state
    boundary = layer(x(7)[:, :SEGMENT]).state
    assert_states_close(state.start, boundary.memory)
    assert state.k.shape[1] == state.v.shape[1] == 2
    assert boundary.k.shape[1] == boundary.v.shape[1] == 0
    assert_states_close(boundary.start, boundary.memory, 0.0)


def test_across_a_boundary_the_memory_is_all_that_is_carried():
    layer, inputs = build(MemoryAsContext), x()
    state, fresh = layer(inputs[:, :SEGMENT]).state, layer.memory.init_state(2)
    rest = inputs[:, SEGMENT:]
    forgotten = layer(rest, state._replace(memory=fresh, start=fresh)).y
    assert_close(forgotten, layer(rest).y, "after forgetting")
    assert (layer(rest, state).y - forgotten).abs().amax(-1).min() > 1e-6


def test_the_loop_of_memory_and_attention_forgets_a_change():
    torch.manual_seed(0)
    layer = MemoryAsContext(64, memory=partial(GatedDeltaNet, heads=2), segment=16).double()
    inputs = torch.randn(1, 512, 64).double()
    changed = inputs.clone()
    changed[:, 0] += 1e-7
    with torch.no_grad():
        effect = (layer(inputs).y - layer(changed).y).abs().amax(-1)[0]
    assert effect[-16:].max() < 0.1 * effect[:16].max()


def test_no_value_is_read_to_know_where_a_segment_ends():
    layer, state = build(MemoryAsContext).to("meta"), None
    for length in (3, 1, 1, 7):
        y, state, _ = layer(torch.zeros(2, length, WIDTH, dtype=torch.double, device="meta"), state)
        assert y.is_meta
    assert state.k.shape[1] == LENGTH % SEGMENT


def windowed_by_hand(layer, inputs):
    """The memory's answers, worked out over the persistent tokens and the inputs together."""
    tokens = layer.attention.persistent.expand(len(inputs), -1, -1)
    return layer.memory(torch.cat([tokens, inputs], 1)).y[:, tokens.shape[1] :]


def test_gate_is_the_papers_equations():
    layer = build(MemoryAsGate)
    gated = gated_by_hand(layer.gate, layer.attention(x()).y, windowed_by_hand(layer, x()))
    assert_close(layer(x()).y, gated, "output")


def test_layer_is_attention_over_what_the_memory_answers():
    layer = build(MemoryAsLayer)
    y = layer.attention(layer.norm(windowed_by_hand(layer, x()))).y
    assert_close(layer(x()).y, y, "output")


@every_windowed
def test_the_memory_has_read_the_persistent_tokens_that_attention_sees(cls):
    layer = build(cls)
    names = [name for name, _ in layer.named_parameters() if "persistent" in name]
    assert names == ["attention.persistent"]
    read = layer.memory(layer.attention.persistent[None]).state
    initial = layer.init_state(3).memory
    assert_states_close(initial, select_state(read, torch.zeros(3, dtype=torch.long)))
    without = build(cls, persistent=0)
    assert_states_close(without.init_state(3).memory, without.memory.init_state(3), 0.0)
    (gradient,) = torch.autograd.grad(initial.memory.square().sum(), layer.attention.persistent)
    assert gradient.abs().amax(-1).min() > 1e-9


@every_windowed
@pytest.mark.parametrize(("shift", "in_window"), [(3, True), (4, False)])
def test_a_token_outside_the_window_acts_through_the_memory_alone(cls, shift, in_window):
    def effect(layer):
        changed = x()
        changed[:, -1 - shift] += 1.0
        return (layer(changed).y - layer(x()).y)[:, -1].abs().amax(-1)

    layer = build(cls, partial(GatedDeltaNet, conv_size=1))
    assert (effect(layer) > 1e-6).all()
    assert (effect(forgetful(layer)) > 1e-6).all() == in_window
    assert in_window or torch.equal(effect(forgetful(layer)), torch.zeros(2).double())


@every_layer
def test_persistent_tokens_are_seen_by_every_token(cls):
    layer = forgetful(build(cls, partial(GatedDeltaNet, conv_size=1)))
    tokens = layer.persistent if cls is MemoryAsContext else layer.attention.persistent
    before = layer(x()).y
    for token in tokens:
        with torch.no_grad():
            token += 1.0
        after = layer(x()).y
        assert (after - before).abs().amax(-1).min() > 1e-6
        before = after


@every_windowed
def test_any_layer_can_be_the_memory(cls):
    layer = cls(WIDTH, memory=partial(MLP, expand=2), heads=2, window=4, persistent=3).double()
    whole, pieces = layer(x()), run_in_pieces(layer, x(), [5, 1, 6])
    assert whole.state.memory is None
    assert_close(pieces.y, whole.y, "output in pieces")


class Selective(GatedDeltaNet):
    """A memory of which a token touches few parameters, and that says what it was given."""

    def forward(self, x, state=None):
        y, state, _ = super().forward(x, state)
        return Output(y, state, {"given": x.mean()})

    def active_parameters(self):
        return 7


@every_layer
def test_active_parameters_are_those_of_the_memory_and_all_others(cls):
    layer = build(cls, Selective)
    dense = sum(p.numel() for p in layer.parameters())
    idle = sum(p.numel() for p in layer.memory.parameters()) - 7
    assert build(cls).active_parameters() == dense
    assert layer.active_parameters() == dense - idle
    for held in (
        Residual(WIDTH, layer=lambda _: layer),
        Parallel(WIDTH, layers=[lambda _: layer, partial(MLP, expand=2)]),
    ):
        assert held.active_parameters() == sum(p.numel() for p in held.parameters()) - idle


@every_layer
def test_the_costs_of_a_model_of_it_are_known_beforehand(cls):
    model = LanguageModel(WIDTH, vocab_size=11, n_layers=1, pattern=[[lambda _: build(cls)]])
    costs = budget(model.double(), LENGTH)
    state = model(torch.zeros(1, LENGTH, dtype=torch.long)).state
    assert costs.state_bytes == sum(t.numel() * t.element_size() for t in state_tensors(state))
    assert costs.flops_per_token > 0


@every_layer
def test_what_the_memory_reports_is_passed_on(cls):
    layer = build(cls, Selective)
    given = context_by_hand(layer, x())[1] if cls is MemoryAsContext else x()
    aux = layer(x()).aux
    assert list(aux) == ["memory/given"]
    assert_close(aux["memory/given"], given.mean(), "mean over all tokens")


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MemoryAsContext, {"segment": 0}, "segment must be 1 or more, got 0"),
        (MemoryAsContext, {"segment": 4, "heads": 3}, r"heads \(3\) must divide d_model \(16\)"),
        (MemoryAsContext, {"segment": 4, "heads": 16}, "an even head size, got 1"),
        (MemoryAsContext, {"segment": 4, "persistent": -1}, "persistent must be 0 or more"),
        (MemoryAsGate, {"window": 0}, "window must be 1 or more, got 0"),
        (MemoryAsGate, {"heads": 3}, r"heads \(3\) must divide d_model \(16\)"),
        (MemoryAsLayer, {"window": 0}, "window must be 1 or more, got 0"),
        (MemoryAsLayer, {"persistent": -1}, "persistent must be 0 or more, got -1"),
    ],
)
def test_sizes_that_do_not_fit(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(WIDTH, memory=partial(GatedDeltaNet, heads=2), **options)


def test_a_context_needs_a_memory_that_can_recall():
    with pytest.raises(ValueError, match="memory must be able to recall; MLP is no Memory"):
        MemoryAsContext(WIDTH, memory=MLP, segment=4)


def test_a_memory_without_a_recall_says_so():
    with pytest.raises(TypeError, match="Memory does not define recall"):
        Memory().recall(x())
