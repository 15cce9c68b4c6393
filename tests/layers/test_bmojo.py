"""What is particular to B'MOJO: its three sets of keys."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import MLP, BMojo, GatedDeltaNet, Layer, Output, SoftmaxAttention, select_state
from mneme.layers.parts.rotary import rotate
from tests.helpers import assert_close, assert_states_close, run_in_pieces

WIDTH, LENGTH = 16, 17
RECURRENT = partial(GatedDeltaNet, heads=2)


def build(memory=RECURRENT, **options):
    torch.manual_seed(0)
    layer = BMojo(WIDTH, memory=memory, **({"heads": 2, "window": 4} | options)).double()
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2.0)
    return layer


def x(length=LENGTH, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, generator=generator).double()


class Given(Layer):
    """A memory whose answers are given, whatever it reads."""

    def __init__(self, d_model, length=LENGTH):
        super().__init__()
        self.answers = torch.nn.Parameter(torch.randn(length, d_model))

    def forward(self, x, state=None):
        return Output(self.answers.expand(len(x), -1, -1), aux={"given": x.mean()})


# The equations


def keys_and_values(layer, t):
    """Before rotation, `[T, G, K]` each."""
    parts = layer.attention.kv_proj(t).chunk(2, dim=-1)
    return [part.unflatten(-1, (layer.attention.kv_heads, -1)) for part in parts]


def rotated(layer, t):
    """Every token of `[T, heads, K]` at its position."""
    if layer.attention.rope_base is None:
        return t
    positions = torch.arange(len(t))[None]
    return rotate(t[None], positions=positions, base=layer.attention.rope_base)[0][0]


def surprises(k, v):
    """Norm over heads of the error of a delta rule with unit keys and beta 1/2."""
    memory = torch.zeros(*k.shape[1:], k.shape[2]).double()
    scores = []
    for key, value in zip(F.normalize(k, dim=-1), v, strict=True):
        error = value - torch.einsum("gkv,gk->gv", memory, key)
        memory = memory + 0.5 * torch.einsum("gk,gv->gkv", key, error)
        scores.append(error.norm().item())
    return scores


def kept_by_hand(scores, block, window, limit):
    """Tokens that queries of a block find: the worst predicted of those up to the last but one."""
    left = range(max(0, (block - 1) * window))
    return sorted(left, key=lambda j: -scores[j])[:limit]


def by_hand(layer, u):
    """One softmax per token of one sequence, over lists of what it may see."""
    attention, w = layer.attention, layer.window
    y = layer.memory(u[None]).y[0]
    y = layer.norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    q = rotated(layer, attention.q_proj(u).unflatten(-1, (attention.heads, -1)))
    k, v = keys_and_values(layer, u)
    scores, k = surprises(k, v), rotated(layer, k)
    faded_k, faded_v = keys_and_values(layer, y)
    faded_k = rotated(layer, faded_k)
    outputs = []
    for i in range(len(u)):
        near = range(max(0, i - w + 1), i + 1)
        far = range(max(0, i - 2 * w + 1), max(0, i - w + 1))
        kept = kept_by_hand(scores, i // w, w, layer.eidetic)
        seen_k = torch.stack([*(k[j] for j in (*near, *kept)), *(faded_k[j] for j in far)])
        seen_v = torch.stack([*(v[j] for j in (*near, *kept)), *(faded_v[j] for j in far)])
        seen_k, seen_v = (
            t.repeat_interleave(attention.heads // attention.kv_heads, 1) for t in (seen_k, seen_v)
        )
        logits = torch.einsum("hk,shk->hs", q[i], seen_k) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hs,shk->hk", logits.softmax(-1), seen_v).flatten())
    return attention.out_proj(torch.stack(outputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eidetic": 3},
        {"eidetic": 7, "window": 3, "heads": 4, "kv_heads": 2, "rope_base": None},
        {"eidetic": 2, "window": 1},
        {"eidetic": 3, "window": 20},
    ],
    ids=str,
)
def test_it_is_one_softmax_over_three_sets(options):
    layer = build(**options)
    assert_close(layer(x()).y, torch.stack([by_hand(layer, u) for u in x()]), "output")


@pytest.mark.parametrize("eidetic", [0, 3])
def test_without_tokens_that_left_the_window_it_is_attention(eidetic):
    layer = build(window=LENGTH, eidetic=eidetic)
    attention = SoftmaxAttention(WIDTH, heads=2).double()
    attention.load_state_dict(layer.attention.state_dict())
    assert_close(layer(x()).y, attention(x()).y, "output")


# Fading memory


def test_answers_are_seen_as_tokens_leave_the_window():
    layer = build(memory=Given)
    y = layer(x(batch=1)).y[0]
    for i in range(LENGTH):
        (gradient,) = torch.autograd.grad(
            y[i].square().sum(), layer.memory.answers, retain_graph=True
        )
        seen = gradient.abs().amax(-1) > 1e-9
        assert seen.nonzero().flatten().tolist() == list(range(max(0, i - 7), max(0, i - 3)))


def test_the_scale_of_the_memorys_answers_does_not_matter():
    layer = build(memory=Given)
    before = layer(x()).y
    with torch.no_grad():
        layer.memory.answers *= 100.0
    assert_close(layer(x()).y, before, "output", 1e-4)


def test_what_the_memory_reports_is_passed_on():
    assert list(build(memory=Given)(x()).aux) == ["memory/given"]


@pytest.mark.parametrize("memory", [partial(MLP, expand=2), partial(SoftmaxAttention, heads=2)])
def test_any_layer_can_be_the_memory(memory):
    layer = build(memory, eidetic=3)
    whole, pieces = layer(x()), run_in_pieces(layer, x(), [6, 1, 10])
    assert_close(pieces.y, whole.y, "output in pieces")
    assert_states_close(pieces.state, whole.state)


# Eidetic memory


def dull_text(surprising, length=40):
    """One token again and again, but for others at some places."""
    text = x(1, batch=1).repeat(1, length, 1)
    text[:, surprising] = 2 * x(length, batch=1)[:, surprising]
    return text


def test_surprising_tokens_are_kept_and_dull_ones_are_not():
    surprising = [5, 6, 15, 22]
    layer = build(memory=partial(Given, length=40), eidetic=4, rope_base=None)
    text = dull_text(surprising)
    (state,) = layer(text).state.eidetic
    k, v = keys_and_values(layer, text[0])
    known = torch.stack([k, v], 1)
    places = [
        torch.isclose(known, token).flatten(1).all(1).nonzero().flatten().tolist()
        for token in state.tokens[0]
    ]
    assert sorted(places) == [[place] for place in surprising]
    assert (state.score.diff() <= 0).all()


@pytest.mark.parametrize(("eidetic", "reaches"), [(0, False), (1, True)])
def test_a_kept_token_is_seen_from_everywhere_and_no_other_way_leads_there(eidetic, reaches):
    layer = build(memory=partial(Given, length=40), eidetic=eidetic)
    text = dull_text([5])
    changed = text.clone()
    changed[:, 5] *= 1.5
    effect = (layer(changed).y - layer(text).y)[0].abs().amax(-1)
    assert (effect[5:9] > 1e-6).all()
    assert torch.equal(effect[9:12], torch.zeros(3).double())  # waits for its block to be judged
    assert (effect[12:] > 1e-6).all() == reaches
    assert reaches or torch.equal(effect[12:], torch.zeros(28).double())


def test_gradients_reach_a_kept_token():
    layer, text = build(memory=partial(Given, length=40), eidetic=1), dull_text([5])
    text.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(text).y[:, -1].square().sum(), text)
    touched = (gradient[0].abs().amax(-1) > 1e-9).nonzero().flatten().tolist()
    assert touched == [5, 36, 37, 38, 39]


def test_each_sequence_keeps_its_own():
    layer = build(eidetic=3)
    state = layer(x(batch=3)).state
    alone = layer(x(batch=3)[1:2]).state
    assert_states_close(select_state(state, torch.tensor([1])), alone)


@pytest.mark.parametrize("sizes", [[8, 4, 5], [1] * 17, [3, 13, 1]], ids=str)
def test_blocks_begin_at_absolute_positions(sizes):
    layer = build(eidetic=3)
    whole, pieces = layer(x()), run_in_pieces(layer, x(), sizes)
    assert_close(pieces.y, whole.y, "output in pieces")
    assert_states_close(pieces.state, whole.state)


def test_no_value_is_read_to_know_where_a_block_begins():
    layer, state = build(eidetic=5).to("meta"), None
    for length in (3, 1, 1, 12):
        y, state, _ = layer(torch.zeros(2, length, WIDTH, dtype=torch.double, device="meta"), state)
        assert y.is_meta
    (eidetic,) = state.eidetic
    assert eidetic.tokens.shape[1] == 5
    assert eidetic.waiting.shape[1] == state.recent.shape[1] == 4 + LENGTH % 4
    assert state.fading.shape[1] == 2 * 4 - 1


def test_equal_tokens_are_no_trouble():
    layer = build(eidetic=3)
    whole, pieces = layer(0 * x()), run_in_pieces(layer, 0 * x(), [6, 1, 10])
    assert whole.y.isfinite().all()
    assert_close(pieces.y, whole.y, "output in pieces")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eidetic": -1}, "eidetic must be 0 or more, got -1"),
        ({"window": 0}, "window must be 1 or more, got 0"),
        ({"heads": 3}, r"heads \(3\) must divide d_model \(16\)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
