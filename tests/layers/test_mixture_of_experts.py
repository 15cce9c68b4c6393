"""What is particular to mixtures of experts, against all experts computed for every token."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mneme.layers import (
    LAYERS,
    BlockFFN,
    ChunkMixtureOfExperts,
    ChunkState,
    MixtureOfExperts,
    SwiGLU,
    recording,
)
from mneme.models.language_model import LanguageModel
from mneme.ops.routing import route
from tests.helpers import assert_close, assert_order_of_tokens_means_nothing, mean_square

D = 16


def built(cls, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = cls(D, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return layer


def mixture(dtype=torch.float64, **options):
    return built(MixtureOfExperts, dtype, **{"experts": 5, "expand": 1, **options})


def block(dtype=torch.float64, **options):
    return built(BlockFFN, dtype, **{"experts": 12, "expert_dim": 8, **options})


def inputs(batch=2, length=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, D, generator=generator, dtype=torch.float64).to(dtype)


# The oracle: every expert computes every token, and gates are zero where a token does not go.


def dense(experts, x, gates):
    """Experts weighted by gates `[B, T, E]`."""
    y = 0
    for e in range(experts.experts):
        hidden = x @ experts.in_proj.weight[e].T
        if experts.gated:
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.silu(hidden)
        y = y + gates[..., e : e + 1] * (hidden @ experts.out_proj.weight[e].T)
    return y


def top_k_gates(layer, x):
    p = layer.router(x).softmax(-1)
    kept = p * (p >= p.topk(layer.top_k, dim=-1).values[..., -1:])
    return kept / kept.sum(-1, keepdim=True) if layer.renormalize else kept


def dense_mixture(layer, x):
    y = dense(layer.experts, x, top_k_gates(layer, x))
    return y if layer.shared is None else y + layer.shared(x).y


def relu_gates(layer, x):
    a = layer.router(x).relu()
    scale = (a.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return a * scale * layer.norm.weight


def dense_block(layer, x):
    return dense(layer.experts, x, relu_gates(layer, x))


def assert_is(layer, reference, x):
    """Values, and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    names, wanted = zip(*[("input", x), *layer.named_parameters()], strict=True)
    y, expected = layer(x).y, reference(layer, x)
    assert_close(y, expected, "output")
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), wanted)
    expected = torch.autograd.grad((expected * weight).sum(), wanted)
    for name, gradient, want in zip(names, gradients, expected, strict=True):
        assert_close(gradient, want, f"gradient of {name}")


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "raw"])
@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_it_is_all_experts_with_masked_gates(top_k, renormalize, shared):
    layer = mixture(top_k=top_k, renormalize=renormalize, shared_experts=shared)
    assert_is(layer, dense_mixture, inputs(length=40))


def test_weights_are_the_probabilities_of_the_router_as_in_olmoe():
    layer, x = mixture(top_k=3), inputs()
    p = layer.router(x).softmax(-1)
    gates = p.masked_fill(p < p.sort(-1, descending=True).values[..., 2:3], 0)
    assert_close(layer(x).y, dense(layer.experts, x, gates), "output")


def test_one_choice_learns_through_its_weight():
    assert_is(mixture(top_k=1), dense_mixture, inputs(length=40))


def test_with_as_many_choices_as_experts_it_is_a_dense_mixture():
    layer, x = mixture(top_k=5), inputs()
    expected = dense(layer.experts, x, layer.router(x).softmax(-1))
    assert_close(layer(x).y, expected, "output")


def test_one_expert_is_a_swiglu():
    layer, x = mixture(experts=1, top_k=1), inputs()
    one = SwiGLU(D, expand=1).double()
    with torch.no_grad():
        one.in_proj.weight.copy_(layer.experts.in_proj.weight[0])
        one.out_proj.weight.copy_(layer.experts.out_proj.weight[0])
    assert_close(layer(x).y, one(x).y, "output")


@pytest.mark.parametrize("make", [mixture, block])
def test_names_of_experts_mean_nothing(make):
    layer, x = make(), inputs()
    before = layer(x)
    order = torch.randperm(layer.experts.experts)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[order])  # the first axis of all is the expert
    after = layer(x)
    assert_close(after.y, before.y, "output", 1e-12)
    for name in before.aux:
        assert_close(after.aux[name], before.aux[name], name, 1e-12)


def test_an_expert_that_nothing_goes_to_is_left_alone():
    layer, x = mixture(), inputs()
    x[..., 0] = 1
    with torch.no_grad():
        layer.router.weight[3] = 0
        layer.router.weight[3, 0] = -1e6
    output = layer(x)
    (output.y.square().sum() + sum(output.aux.values())).backward()
    assert output.aux["load_min"] == 0
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    for proj in (layer.experts.in_proj, layer.experts.out_proj):
        assert not proj.weight.grad[3].any()
        assert proj.weight.grad[2].any()
    assert_is(layer, dense_mixture, x)


def test_all_tokens_may_go_to_one_expert():
    layer, x = mixture(top_k=1), inputs(length=100)
    x[..., 0] = 1
    with torch.no_grad():
        layer.router.weight[2] = 0
        layer.router.weight[2, 0] = 1e4
    gates = F.one_hot(torch.tensor(2), 5).double().expand(2, 100, 5)
    assert_close(layer(x).y, dense(layer.experts, x, gates), "output")
    assert [layer(x).aux[f"load_{end}"].item() for end in ("max", "min")] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [mixture, block])
def test_no_token_changes_another_by_a_bit(make, dtype):
    layer, x = make(dtype), inputs(batch=3, length=30, dtype=dtype)
    with torch.no_grad():
        before = layer(x).y
        for token in range(30):
            changed = x.clone()
            changed[1, token] = changed[1, token] * -3 + 1
            after = layer(changed).y
            others = torch.ones(3, 30, dtype=torch.bool)
            others[1, token] = False
            assert torch.equal(after[others], before[others])
            assert not torch.equal(after[1, token], before[1, token])


@pytest.mark.parametrize(
    ("name", "example"),
    [(n, e) for n in ("MixtureOfExperts", "BlockFFN") for e in LAYERS[n].examples],
)
def test_order_of_tokens_means_nothing(name, example):
    assert_order_of_tokens_means_nothing(name, example)


@pytest.mark.parametrize("make", [mixture, block])
def test_what_is_not_finite_stays_in_its_token(make):
    layer, x = make(), inputs()
    before = layer(x).y
    x[0, 0] = float("nan")
    after = layer(x).y
    assert not after[0, 0].isfinite().any()
    assert torch.equal(after[0, 1:], before[0, 1:])
    assert torch.equal(after[1], before[1])


# Losses and what is reported.


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_uniform_router_has_a_balance_loss_of_alpha(top_k):
    layer = mixture(top_k=top_k, balance_loss=0.03)
    torch.nn.init.zeros_(layer.router.weight)
    assert layer(inputs()).aux["loss_balance"].item() == pytest.approx(0.03)


def test_a_collapsed_router_has_a_balance_loss_of_the_experts_over_k():
    layer, x = mixture(balance_loss=1.0), inputs()
    x[..., 0] = 1
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:2, 0] = 100
    assert layer(x).aux["loss_balance"].item() == pytest.approx(5 / 2)


def test_losses_and_telemetry_of_the_softmax_router():
    layer, x = mixture(balance_loss=0.1, z_loss=1e-3), inputs(length=40)
    aux = layer(x).aux
    assert set(aux) == {"load_max", "load_min", "router_entropy", "loss_balance", "loss_z"}
    p = layer.router(x).softmax(-1)
    share = (top_k_gates(layer, x) > 0).double().mean((0, 1)) / 2
    assert_close(aux["loss_balance"], 0.1 * 5 * (share * p.mean((0, 1))).sum(), "balance")
    z = layer.router(x).exp().sum(-1).log().square().mean()
    assert_close(aux["loss_z"], 1e-3 * z, "z")
    assert_close(aux["load_max"], share.max(), "load_max")
    assert_close(aux["load_min"], share.min(), "load_min")
    assert_close(aux["router_entropy"], -(p * p.log()).sum(-1).mean(), "entropy")
    assert not any(aux[name].requires_grad for name in aux if not name.startswith("loss_"))


@pytest.mark.parametrize(("make", "gates"), [(mixture, top_k_gates), (block, relu_gates)])
def test_weights_of_all_experts_are_reported(make, gates):
    layer, x = make(), inputs()
    with recording() as record:
        layer(x)
    torch.testing.assert_close(record.by_layer(layer)[""]["route"], gates(layer, x).float())


@pytest.mark.parametrize(
    "layer",
    [mixture(balance_loss=0.0, z_loss=0.0), block(chunk_loss=0.0, locality_loss=0.0)],
    ids=["moe", "blockffn"],
)
def test_losses_are_left_out_when_they_weigh_nothing(layer):
    assert not any(name.startswith("loss_") for name in layer(inputs()).aux)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
def test_routing_is_exact_in_half_precision(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, x = mixture(dtype), inputs(length=100, dtype=dtype)
    logits = F.linear(x.float(), layer.router.weight.float())
    expected = route(logits, 2, renormalize=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), recording() as record:
        aux = layer(x).aux
    wanted = torch.zeros(2, 100, 5).scatter(-1, expected.memory, expected.weight)
    weights = record.by_layer(layer)[""]["route"]
    torch.testing.assert_close(weights, wanted, rtol=1e-6, atol=0)
    assert all(value.dtype == torch.float32 for value in aux.values())


# BlockFFN.


def test_blockffn_is_all_experts_with_relu_gates():
    assert_is(block(), dense_block, inputs(length=40))


def test_a_token_without_an_active_expert_gets_nothing():
    layer, x = block(), inputs()
    x[..., 0] = 0
    x[0, 3], x[1] = 0, 0
    x[0, 3, 0] = x[1, :, 0] = -1
    with torch.no_grad():
        layer.router.weight[:, 0] = 1
    y = layer(x).y
    assert not y[0, 3].any()
    assert not y[1].any()
    assert y[0, :3].abs().amax(-1).min() > 0
    assert_is(layer, dense_block, x)
    only = layer(x[1:])  # nobody goes anywhere
    assert not only.y.any()
    (only.y.sum() + sum(only.aux.values())).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_losses_and_telemetry_of_the_relu_router():
    layer, x = block(chunk=4, chunk_loss=0.1, locality_loss=0.2), inputs(length=10)
    aux = layer(x).aux
    logits = layer.router(x)
    a = logits.relu()
    unused, used = [], []
    for row in a:
        for chunk in row.split(4):
            share = chunk / chunk.sum(-1, keepdim=True)
            unused.append((1 - share).log().sum(0).exp())
            used.append((chunk > 0).any(0))
    assert_close(aux["loss_chunk"], 0.1 * (1 - torch.stack(unused).mean()), "chunk")
    assert_close(aux["active_chunk"], torch.stack(used).double().mean(), "active_chunk")
    p, target = (100 * logits[:, :-1]).sigmoid(), (100 * logits[:, 1:]).sigmoid()
    cross = -(target * p.log() + (1 - target) * (1 - p).log())
    cross = torch.where(cross.isfinite(), cross, 100 * logits[:, :-1].abs() * (target - p).abs())
    assert_close(aux["loss_locality"], 0.2 * cross.mean(), "locality", 1e-3)
    share = (a > 0).double().mean((0, 1))
    assert_close(aux["active"], share.mean(), "active")
    assert_close(aux["load_max"], share.max(), "load_max")
    assert_close(aux["load_min"], share.min(), "load_min")


def test_one_token_has_no_neighbor_to_disagree_with():
    assert block()(inputs(length=1)).aux["loss_locality"] == 0


def test_its_losses_make_the_router_sparse_and_neighbors_alike():
    layer, x = block(torch.float32), inputs(4, 32, torch.float32)
    x[..., 0] = 1  # so that the router can turn an expert off
    optimizer = torch.optim.Adam(layer.router.parameters(), 0.01)
    start = layer(x).aux
    for _ in range(100):
        aux = layer(x).aux
        optimizer.zero_grad()
        (aux["loss_chunk"] + aux["loss_locality"]).backward()
        optimizer.step()
    for name in ("active", "active_chunk", "loss_chunk", "loss_locality"):
        assert aux[name] < 0.6 * start[name]


# Costs.


def flops(layer, length=64):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        layer.to("meta")(torch.zeros(1, length, layer.router.in_features))
    return counter.get_total_flops() / length


@pytest.mark.parametrize(("top_k", "shared"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_by_default_a_token_costs_what_it_does_in_a_swiglu(top_k, shared):
    d, experts = 48, 10
    layer = MixtureOfExperts(d, experts=experts, top_k=top_k, shared_experts=shared, multiple_of=1)
    dense_flops = 3 * 2 * d * 128
    assert flops(layer) == dense_flops + 2 * d * experts
    assert layer.active_parameters() == sum(p.numel() for p in SwiGLU(d).parameters()) + 10 * d


def test_blockffn_is_counted_with_half_of_its_experts():
    d, experts = 64, 32
    layer = BlockFFN(d)
    assert flops(layer) == 2 * 2 * d * 4 * d + 2 * d * experts
    assert layer.active_parameters() == 2 * d * 4 * d + experts * d + experts


def test_active_parameters_are_the_router_and_k_experts():
    layer = mixture(experts=5, top_k=2, shared_experts=1)
    expert = 3 * D * D
    assert layer.active_parameters() == 5 * D + 2 * expert + expert
    assert sum(p.numel() for p in layer.parameters()) == 5 * D + 5 * expert + expert


@pytest.mark.parametrize("cls", [MixtureOfExperts, BlockFFN])
def test_its_output_maps_are_scaled_with_depth(cls):
    torch.manual_seed(0)
    plain = cls(D).experts.out_proj.weight
    model = LanguageModel(D, vocab_size=4, n_layers=9, pattern=[[cls]])
    scaled = [p for n, p in model.named_parameters() if n.endswith("experts.out_proj.weight")]
    assert len(scaled) == 9
    assert scaled[0].std().item() == pytest.approx(plain.std().item() / 3, rel=0.1)


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("cls", [MixtureOfExperts, BlockFFN])
def test_outputs_start_at_the_scale_that_the_init_means(cls, width):
    """Maps into and out of an expert and the router's have a gain of 1/3; experts add as squares.

    BlockFFN's gates have squares that add up to E, and its output maps are smaller by sqrt(E).
    """
    torch.manual_seed(0)
    expected = mean_square(F.silu, std=3**-0.5) / 3
    if cls is MixtureOfExperts:
        logits = torch.randn(20_000, 8) / 3**0.5
        weights = logits.softmax(-1).topk(2).values
        expected *= weights.square().sum(-1).mean().item() / 3
    x = torch.randn(4, 64, width)
    with torch.no_grad():
        squares = [cls(width)(x).y.square().mean() for _ in range(6)]
    assert torch.stack(squares).mean().sqrt().item() == pytest.approx(expected**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 6}, r"top_k \(6\) must be at most experts \(5\)"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"experts": 0}, "experts must be 1 or more, got 0"),
        ({"expand": 0}, "hidden_width must be 1 or more, got 0"),
        ({"balance_loss": -0.1}, "balance_loss must be 0 or more, got -0.1"),
        ({"shared_experts": -1}, "shared_experts must be 0 or more, got -1"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        mixture(**options)


# Routing by chunks.


def by_chunk(mixture=None, chunk=4):
    mixture = mixture or partial(MixtureOfExperts, experts=5, expand=1)
    return built(ChunkMixtureOfExperts, mixture=mixture, chunk=chunk)


def seen_by_hand(layer, x):
    """What the router is to see of each token, one at a time."""
    rows = []
    for row in x:
        chunks = row.split(layer.chunk)
        seen = [layer.start, *(chunk.mean(0) for chunk in chunks[:-1])]
        rows.append(torch.cat([s.expand(len(c), -1) for s, c in zip(seen, chunks, strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 13])
@pytest.mark.parametrize("cls", [MixtureOfExperts, BlockFFN])
def test_a_chunk_goes_where_the_mean_of_the_one_before_says(cls, length):
    layer, x = by_chunk(partial(cls, experts=5)), inputs(length=length)
    gates = top_k_gates if cls is MixtureOfExperts else relu_gates

    def reference(layer, x):
        mixture = layer.mixture
        return dense(mixture.experts, x, gates(mixture, seen_by_hand(layer, x)))

    assert_is(layer, reference, x)


def test_sequences_of_a_batch_may_stand_at_different_places():
    layer, x = by_chunk(), inputs(batch=2, length=20)
    long, short = layer(x[:1, :6]).state, layer(x[1:, :1]).state
    state = ChunkState(*(torch.cat(pair) for pair in zip(long, short, strict=True)))
    assert state.place.tolist() == [2, 1]
    together = layer(torch.cat([x[:1, 6:17], x[1:, 1:12]]), state)
    for row, begin in enumerate((6, 1)):
        whole = layer(x[row : row + 1, : begin + 11])
        assert_close(together.y[row], whole.y[0, begin:], f"sequence {row}")
        for held, expected in zip(together.state, whole.state, strict=True):
            assert_close(held[row], expected[0], f"state of {row}")


def test_chunks_of_one_token_see_the_token_before():
    layer, x = by_chunk(chunk=1), inputs()
    before = torch.cat([layer.start.expand(2, 1, D), x[:, :-1]], 1)
    assert_close(layer(x).y, layer.mixture.routed(x, before).y, "output")


def test_a_chunk_mixture_costs_what_its_mixture_does():
    layer = by_chunk()
    assert layer.active_parameters() == layer.mixture.active_parameters() + D
    assert layer.state_size(9) == 2 * D + 1


def test_only_what_has_a_router_is_routed_by_chunks():
    with pytest.raises(ValueError, match="SwiGLU has no router"):
        by_chunk(SwiGLU)
    with pytest.raises(ValueError, match="chunk must be 1 or more, got 0"):
        by_chunk(chunk=0)
