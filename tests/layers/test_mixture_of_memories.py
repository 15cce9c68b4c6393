"""What is particular to mixtures of memories, against a plain recurrence."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import (
    LAYERS,
    GatedDeltaNet,
    MatrixMemory,
    MixtureOfMemories,
    SwiGLU,
    detach_state,
    recording,
    state_tensors,
)
from mneme.ops.gated_delta import gated_delta_naive
from mneme.ops.routing import route
from tests.helpers import assert_close, assert_states_close, run_in_pieces

D, HEADS = 16, 2
BASES = [
    (name, example)
    for name, entry in LAYERS.items()
    if issubclass(entry.cls, MatrixMemory)
    for example in entry.examples
]
every_base = pytest.mark.parametrize(("name", "example"), BASES, ids=lambda value: str(value))


FORMS = {  # of what goes before the rule
    "after": {"convolve": "after"},
    "before": {"convolve": "before"},
    "single_projection": {"convolve": "before", "single_projection": True},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def mixture(dtype=torch.float64, memory=None, conv_size=4, **options):
    torch.manual_seed(0)
    memory = memory or partial(GatedDeltaNet, heads=HEADS, conv_size=conv_size)
    layer = MixtureOfMemories(D, memory=memory, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return layer


def inputs(batch=2, length=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, D, generator=generator, dtype=torch.float64).to(dtype)


def routes_of(layer, *pieces):
    """Weights of all memories for each token, `[B, T, M]`, and the states, from what it reports."""
    state = None
    with recording() as record:
        for x in pieces:
            state = layer(x, state).state
    return record.by_layer(layer)[""]["route"], state


# The oracle: one row, one token, one memory at a time.


class Memory:
    """One memory of one row: a matrix per head and a convolution's tail."""

    def __init__(self, base, write, taps):
        self.base, self.write, self.taps = base, write, taps
        self.matrix = torch.zeros(1, HEADS, base.key_dim, base.value_dim).double()
        self.tail = torch.zeros(0 if taps is None else taps.shape[1] - 1, sum(base.widths)).double()

    def step(self, x):
        """Writes a token `[D]` and reads it, `[H, V]`."""
        width = self.base.widths[0]
        query = self.base.in_proj.weight[:width] @ x
        key_value, decay, beta = (self.write @ x).split([2 * width, HEADS, HEADS])
        qkv = torch.cat([query, key_value])
        if self.taps is not None:
            window = torch.cat([self.tail, qkv[None]])
            qkv, self.tail = (window * self.taps.T).sum(0), window[1:]
        q, k, v = F.silu(qkv).view(3, 1, 1, HEADS, -1)
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        gate = self.base.decay
        decay = -gate.A_log.exp() * F.softplus(decay + gate.dt_bias)
        gates = decay.view(1, 1, -1), beta.sigmoid().view(1, 1, -1)
        y, self.matrix = gated_delta_naive(q, k, v, *gates, self.matrix)
        return y[0, 0]


def writes_of(layer):
    """Each memory's projection of keys, values and gates."""
    own = layer.base.in_proj.weight[layer.base.widths[0] :]
    if layer.single_projection:
        return [own] * layer.memories
    return [*layer.write_proj] if layer.shared else [own, *layer.write_proj]


def recurrence(layer, x):
    """Outputs, matrices and tails `[B, M, ...]`, and the shared memory's, `[B, ...]`."""
    base, text = layer.base, x
    own = base.in_proj.weight[base.widths[0] :]
    writes = writes_of(layer)
    taps = None if base.conv is None else base.conv.weight
    if layer.conv is not None:
        history = F.pad(x, (0, 0, 3, 0))
        text = torch.stack(
            [(history[:, t : t + 4] * layer.conv.weight.T).sum(1) for t in range(x.shape[1])], 1
        )
    rows = []
    for row, words in zip(x, text, strict=True):
        memories = [Memory(base, write, taps) for write in writes]
        shared, outputs = Memory(base, own, taps), []
        for token, word in zip(row, words, strict=True):
            p = layer.router(word).softmax(0)
            chosen = sorted(range(len(p)), key=lambda m: -p[m].item())[: layer.top_k]
            y = shared.step(word) if layer.shared else 0
            for m in chosen:
                y = y + p[m] / sum(p[j] for j in chosen) * memories[m].step(word)
            y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            y = (y * base.norm.weight).flatten() * F.silu(base.gate_proj(token))
            outputs.append(base.out_proj(y))
        matrices = torch.cat([m.matrix for m in memories])
        tails = torch.stack([m.tail for m in memories])
        rows.append((torch.stack(outputs), matrices, tails, shared.matrix[0], shared.tail))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def assert_state_is(state, matrices, tails, shared, tail):
    assert_close(state.memories, matrices, "memories")
    assert_close(state.tails, tails, "tails")
    for held in state.shared:
        assert_close(held.memory, shared, "shared memory")
        assert_close(held.conv.tail, tail, "shared tail")


@every_form
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_it_is_a_recurrence_of_the_routed_memories(top_k, shared, form):
    layer, x = mixture(top_k=top_k, shared=shared, **form), inputs(length=9)
    with torch.no_grad():
        expected, *states = recurrence(layer, x)
        whole = layer(x)
        assert_close(whole.y, expected, "output")
        assert_state_is(whole.state, *states)
        for sizes in ([1] * 9, [2, 6, 1]):
            pieces = run_in_pieces(layer, x, sizes)
            assert_close(pieces.y, expected, f"output in pieces {sizes}")
            assert_state_is(pieces.state, *states)


@every_form
def test_its_gradients_are_those_of_the_recurrence(form):
    layer, x = mixture(**form), inputs(length=8).requires_grad_()
    wanted = [x, *layer.parameters()]
    expected, matrices, *_ = recurrence(layer, x)
    output = layer(x)
    loss = output.y.square().sum() + output.state.memories.square().sum()
    gradients = torch.autograd.grad(loss, wanted)
    expected = torch.autograd.grad(expected.square().sum() + matrices.square().sum(), wanted)
    names = ["input", *(name for name, _ in layer.named_parameters())]
    for name, gradient, want in zip(names, gradients, expected, strict=True):
        assert_close(gradient, want, f"gradient of {name}", 1e-9)


def test_sequences_of_several_tiles_are_the_recurrence_too():
    layer, x = mixture(), inputs(length=150)
    with torch.no_grad():
        expected, *states = recurrence(layer, x)
        output = layer(x)
    assert_close(output.y, expected, "output")
    assert_state_is(output.state, *states)


def test_decoding_after_a_prompt_gives_what_the_whole_gives():
    layer, x = mixture(memories=4, top_k=2), inputs(batch=3, length=90)
    with torch.no_grad():
        whole, pieces = layer(x), run_in_pieces(layer, x, [75] + [1] * 15)
    assert_close(pieces.y, whole.y, "output")
    assert_states_close(pieces.state, whole.state)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@every_form
def test_what_is_recalled_is_what_the_routed_memories_hold(form, shared):
    layer, x = mixture(shared=shared, **form), inputs(length=30)
    asked = inputs(batch=2, length=50)[:, 30:]
    with torch.no_grad():
        state = layer(x).state
        q = F.silu(asked @ layer.base.in_proj.weight[:D].T).unflatten(-1, (HEADS, -1))
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt() * 8**-0.5
        p = layer.router(asked).softmax(-1)
        kept = p * (p >= p.topk(2, dim=-1).values[..., 1:])
        mixed = torch.einsum("btm,bmhkv->bthkv", kept / kept.sum(-1, keepdim=True), state.memories)
        for held in state.shared:
            mixed = mixed + held.memory[:, None]
        y = layer.base.norm(torch.einsum("bthk,bthkv->bthv", q, mixed)).flatten(2)
        expected = layer.base.out_proj(y * F.silu(layer.base.gate_proj(asked)))
        assert_close(layer.recall(asked, state), expected, "recalled")


# Whose tokens go where.


def test_one_memory_is_the_base():
    layer, x = mixture(memories=1, top_k=1, shared=False), inputs(length=80)
    mixed, plain = layer(x), layer.base(x)
    assert_close(mixed.y, plain.y, "output")
    assert_close(mixed.state.memories[:, 0], plain.state.memory, "memory")
    assert_close(mixed.state.tails[:, 0], plain.state.conv.tail, "tail")
    assert mixed.aux == {}


def test_all_tokens_to_one_memory_make_it_the_base():
    layer, x = mixture(top_k=1, shared=False), inputs(length=80)
    x[..., 0] = 1
    with torch.no_grad():
        layer.router.weight[2] = 0
        layer.router.weight[2, 0] = 1e4
        mixed = layer(x)
        layer.base.in_proj.weight[layer.base.widths[0] :] = layer.write_proj[1]
    plain = layer.base(x)
    assert_close(mixed.y, plain.y, "output")
    assert_close(mixed.state.memories[:, 2], plain.state.memory, "memory")
    others = mixed.state.memories[:, [0, 1, 3]]
    assert torch.equal(others, torch.zeros_like(others))
    assert [mixed.aux[f"load_{end}"].item() for end in ("max", "min")] == [1, 0]


def test_names_of_memories_mean_nothing():
    layer, x = mixture(), inputs(length=70)
    before = layer(x)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight[order])
        layer.write_proj.copy_(layer.write_proj[order])
    after = layer(x)
    assert_close(after.y, before.y, "output", 1e-12)
    assert_close(after.state.memories, before.state.memories[:, order], "memories", 1e-12)
    assert_close(after.state.tails, before.state.tails[:, order], "tails", 1e-12)
    for name in before.aux:
        assert_close(after.aux[name], before.aux[name], name, 1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_form
def test_no_token_changes_what_came_before_or_other_rows(form, training):
    layer, x = mixture(**form).train(training), inputs(batch=3, length=24)
    with torch.no_grad():
        before = layer(x)
        for token in range(24):
            changed = x.clone()
            changed[1, token] += 10
            after = layer(changed)
            assert torch.equal(after.y[1, :token], before.y[1, :token])
            assert torch.equal(after.y[[0, 2]], before.y[[0, 2]])
            for a, b in zip(state_tensors(after.state), state_tensors(before.state), strict=True):
                assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert not torch.equal(after.y[1, token], before.y[1, token])


def test_no_token_changes_what_came_before_when_sequences_change_length():
    layer, x = mixture(), inputs(batch=2, length=200)
    with torch.no_grad():
        before = layer(x).y
        for token in (3, 64, 130):
            changed = x.clone()
            changed[1, token:] = 5 * x[1, token]  # all the rest goes to the same two memories
            after = layer(changed).y
            assert_close(after[1, :token], before[1, :token], "earlier", 1e-12)
            assert_close(after[0], before[0], "other row", 1e-12)


def test_what_is_not_finite_stays_in_its_row():
    layer, x = mixture(), inputs(batch=2, length=20)
    for row in (0, 1):
        broken = x.clone()
        broken[row, 0] = float("nan")
        output = layer(broken)
        assert not output.y[row].isfinite().any()
        assert torch.equal(output.y[1 - row], layer(x).y[1 - row])
        assert all(t[1 - row].isfinite().all() for t in state_tensors(output.state))


def test_batch_size_changes_nothing():
    layer, x = mixture(), inputs(batch=8, length=150)
    with torch.no_grad():
        together = layer(x)
        for row in range(8):
            alone = layer(x[row : row + 1])
            assert_close(alone.y, together.y[row : row + 1], f"row {row} alone", 1e-12)
            assert_close(
                alone.state.memories, together.state.memories[row : row + 1], "memories", 1e-12
            )


def test_tokens_between_two_memories_are_routed_alike_in_pieces():
    layer, x = mixture(), torch.zeros(1, 12, D).double()  # all logits are equal
    with torch.no_grad():
        for sizes in ([1] * 12, [5, 7]):
            pieces = run_in_pieces(layer, x, sizes)
            assert_states_close(pieces.state, layer(x).state)
    routes = [routes_of(layer, *x.split(size, 1))[0] for size in (12, 5, 1)]
    assert torch.equal(routes[0], routes[1])
    assert torch.equal(routes[0], routes[2])


# Around any matrix memory.


def away_from(layer, memory):
    """A router that sends nothing to a memory if the first input is one."""
    with torch.no_grad():
        layer.router.weight[memory] = 0
        layer.router.weight[memory, 0] = -1e6
    return layer


@every_base
def test_a_memory_that_nothing_goes_to_stays_as_it_was(name, example):
    memory = partial(LAYERS[name].cls, **LAYERS[name].examples[example])
    layer, x = mixture(memory=memory), inputs(length=70)
    x[..., 0] = 1
    before = detach_state(layer(x).state)
    for state in (None, before):
        output = away_from(layer, 2)(x, state)
        start = state_tensors((state or layer.init_state(2)).memories)
        for held, was in zip(state_tensors(output.state.memories), start, strict=True):
            assert torch.equal(held[:, 2], was[:, 2])
            assert not torch.equal(held[:, 1], was[:, 1])
        assert all(t.isfinite().all() for t in state_tensors(output.state))
        layer.zero_grad()
        (output.y.square().sum() + sum(output.aux.values())).backward()
        assert output.y.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        if state is None:
            assert not layer.write_proj.grad[2].any()


@every_base
def test_it_mixes_any_matrix_memory(name, example):
    memory = partial(LAYERS[name].cls, **LAYERS[name].examples[example])
    layer, x = mixture(memory=memory, memories=3), inputs(length=70)
    with torch.no_grad():
        whole, pieces = layer(x), run_in_pieces(layer, x, [66, 1, 3])
        assert_close(pieces.y, whole.y, "output in pieces")
        assert_states_close(pieces.state, whole.state)
        one = mixture(memory=memory, memories=1, top_k=1, shared=False)
        assert_close(one(x).y, one.base(x).y, "one memory")


# What it reports.


def test_losses_and_telemetry_of_the_router():
    layer, x = mixture(z_loss=1e-3, balance_loss=0.1, top_k=3), inputs(length=40)
    aux = layer(x).aux
    assert set(aux) == {"load_max", "load_min", "router_entropy", "loss_balance", "loss_z"}
    logits = layer.router(x)
    p = logits.softmax(-1)
    share = (routes_of(layer, x)[0] > 0).double().mean((0, 1))
    assert_close(aux["loss_balance"], 0.1 * 4 * (share * p.mean((0, 1))).sum(), "balance")
    assert_close(aux["loss_z"], 1e-3 * logits.exp().sum(-1).log().square().mean(), "z")
    assert_close(aux["load_max"], share.max() / 3, "load_max")
    assert_close(aux["load_min"], share.min() / 3, "load_min")
    assert_close(aux["router_entropy"], -(p * p.log()).sum(-1).mean(), "entropy")
    telemetry = [name for name in aux if not name.startswith("loss_")]
    assert not any(aux[name].requires_grad for name in telemetry)


def test_losses_are_left_out_when_they_weigh_nothing():
    aux = mixture(balance_loss=0.0)(inputs()).aux
    assert not any(name.startswith("loss_") for name in aux)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_weights_of_the_routed_memories_are_reported(top_k):
    layer, x = mixture(top_k=top_k), inputs(length=20)
    weights, _ = routes_of(layer, x[:, :6], x[:, 6:])
    assert weights.shape == (2, 20, 4)
    assert ((weights > 0).sum(-1) == top_k).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 20))
    largest = layer.router(x).topk(top_k, dim=-1).indices
    assert (weights.gather(-1, largest) > 0).all()


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bf16"])
def test_routing_is_exact_in_half_precision(mixed):
    dtype = torch.float32 if mixed else torch.bfloat16
    layer, x = mixture(dtype, z_loss=1e-3), inputs(length=100, dtype=dtype)
    expected = route(F.linear(x.float(), layer.router.weight.float()), 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        weights, _ = routes_of(layer, x)
        aux = layer(x).aux
    wanted = torch.zeros(2, 100, 4).scatter(-1, expected.memory, expected.weight)
    torch.testing.assert_close(weights, wanted, rtol=1e-6, atol=0)
    assert all(value.dtype == torch.float32 for value in aux.values())


# The random router.


def test_random_routes_depend_on_the_place_alone():
    layer = mixture(router="random")
    x = inputs(length=40)
    whole, state = routes_of(layer, x)
    pieces, last = routes_of(layer, *x.split([1, 25, 14], 1))
    assert torch.equal(whole, pieces)
    assert torch.equal(whole, routes_of(layer, x.flip(1) * 3)[0])
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(state.position[0], last.position[0])
    assert state.position[0].tolist() == [40, 40]


@pytest.mark.parametrize("memories", [3, 4])
def test_random_routes_have_no_pattern(memories):
    layer = mixture(router="random", memories=memories)
    weights, _ = routes_of(layer, torch.zeros(1, 4000, D).double())
    goes = (weights[0] > 0).double()
    share = 2 / memories
    assert (goes.mean(0) - share).abs().max() < 0.03
    together = goes.T @ goes / len(goes)
    pairs = together[~torch.eye(memories, dtype=bool)]
    assert (pairs - share / (memories - 1)).abs().max() < 0.03
    for lag in range(1, 9):  # how often a token's memory is also that of one before
        repeats = (goes[lag:] * goes[:-lag]).sum(-1).mean() / 2
        assert abs(repeats - share) < 0.03


def test_a_random_router_has_no_losses_and_gradients_reach_everything():
    layer, x = mixture(router="random", z_loss=1e-3), inputs(length=20)
    output = layer(x)
    assert set(output.aux) == {"load_max", "load_min", "router_entropy"}
    output.y.square().sum().backward()
    assert all(p.grad.abs().amax(tuple(range(1, p.ndim))).min() > 0 for p in layer.parameters())


# Sizes and errors.


def test_sizes_are_counted():
    layer = mixture(memories=5, top_k=2)
    matrix, tail, write = HEADS * 8 * 8, 3 * 3 * D, (2 * D + 2 * HEADS) * D
    assert layer.state_size(100) == (5 + 1) * (matrix + tail)
    assert mixture(memories=5, shared=False).state_size(100) == 5 * (matrix + tail)
    before = mixture(memories=5, convolve="before")
    assert before.state_size(100) == (5 + 1) * matrix + 3 * D
    assert mixture(memories=5, router="random").state_size(1) == layer.state_size(1) + 1

    held = sum(p.numel() for p in layer.parameters())
    shared_and_all = sum(p.numel() for p in layer.base.parameters())
    assert held == shared_and_all + 5 * write + 5 * D
    assert layer.active_parameters() == held - 3 * write
    unshared = mixture(memories=5, top_k=2, shared=False)
    assert sum(p.numel() for p in unshared.parameters()) == held - write
    assert unshared.active_parameters() == held - write - 3 * write
    single = mixture(memories=5, top_k=2, single_projection=True)
    parameters = sum(p.numel() for p in single.parameters())
    assert parameters == shared_and_all + 5 * D == single.active_parameters()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, r"top_k \(5\) must be at most memories \(4\)"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"memories": 0}, "memories must be 1 or more, got 0"),
        ({"balance_loss": -0.1}, "balance_loss must be 0 or more, got -0.1"),
        ({"z_loss": -1.0}, "z_loss must be 0 or more, got -1.0"),
        ({"memory": SwiGLU}, "memory must be a matrix memory.*SwiGLU has no matrix"),
        (
            {"memory": partial(MixtureOfMemories, memory=partial(GatedDeltaNet, heads=1))},
            "MixtureOfMemories has no matrix",
        ),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        mixture(**options)
