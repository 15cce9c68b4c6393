"""Routes of tokens, their dispatch into sequences, and their grouping by expert."""

import math

import pytest
import torch

from mneme.ops.routing import (
    balance_loss,
    combine,
    dispatch,
    group,
    grouped,
    load,
    plan_dispatch,
    route,
    router_logits,
    router_telemetry,
    spread,
    ungrouped,
    z_loss,
)

MULTIPLE = 64
SIZES = [  # batch, tokens, memories, k
    (1, 1, 1, 1),
    (3, 7, 4, 2),
    (2, 64, 3, 3),
    (2, 65, 5, 1),
    (4, 300, 6, 4),
    (1, 70_000, 8, 2),
]
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


def routes_of(size, seed=0, dtype=torch.float64):
    batch, tokens, memories, k = size
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, tokens, memories, generator=generator, dtype=dtype)
    return route(logits, k)


def plan_of(size, seed=0):
    return plan_dispatch(routes_of(size, seed).memory, size[2], multiple=MULTIPLE)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3)], ids=str)
def test_without_tokens_losses_and_telemetry_are_zero(shape):
    logits = torch.zeros(shape, requires_grad=True)
    routes = route(logits, 2)
    for value in (balance_loss(routes), z_loss(logits), *router_telemetry(routes).values()):
        assert value == 0
    assert not load(routes).any()


def sent(token, memory):
    """A probability of nearly one for a memory."""
    return torch.nn.functional.one_hot(torch.tensor(token), memory).double() * 20


@every_size
def test_routes_are_the_likeliest_memories_and_their_weights_sum_to_one(size):
    routes = routes_of(size)
    expected = routes.probability.argsort(-1, descending=True)[..., : size[3]]
    assert torch.equal(routes.memory, expected)
    chosen = routes.probability.gather(-1, routes.memory)
    torch.testing.assert_close(routes.weight * chosen.sum(-1, keepdim=True), chosen)
    torch.testing.assert_close(routes.weight.sum(-1), torch.ones(size[:2]).double())


@every_size
def test_a_sequence_holds_the_tokens_of_its_memory_and_row_in_the_order_of_time(size):
    batch, tokens, memories, _ = size
    routes, plan = routes_of(size), plan_of(size)
    for memory in range(memories):
        for row in range(batch):
            sequence = memory * batch + row
            goes = (routes.memory[row] == memory).any(-1)
            expected = row * tokens + goes.nonzero()[:, 0]  # in the order of time
            held = plan.token[sequence][plan.present[sequence]]
            assert torch.equal(held, expected)
            assert plan.tokens[sequence] == len(expected)


@every_size
def test_padding_comes_last_is_marked_and_belongs_to_the_sequences_own_row(size):
    batch, tokens, *_ = size
    plan = plan_of(size)
    places = torch.arange(plan.token.shape[1])
    assert torch.equal(plan.present, places < plan.tokens[:, None])
    rows = torch.arange(len(plan.token)) % batch
    assert torch.equal(plan.token // tokens, rows[:, None].expand_as(plan.token))


@every_size
def test_every_token_lies_at_its_k_places(size):
    batch, tokens, _, k = size
    routes, plan = routes_of(size), plan_of(size)
    flat = plan.token.flatten()[plan.place]
    assert torch.equal(
        flat, torch.arange(batch * tokens).view(batch, tokens, 1).expand_as(plan.place)
    )
    assert plan.present.flatten()[plan.place].all()
    assert plan.place.unique().numel() == plan.present.sum() == batch * tokens * k
    sequence = plan.place // plan.token.shape[1]
    rows = torch.arange(batch)[:, None, None]
    assert torch.equal(sequence, routes.memory * batch + rows)


def test_a_sequence_is_as_long_as_the_fullest_rounded_up_and_never_longer_than_the_text():
    short = plan_dispatch(torch.tensor([[[0], [1], [0]]]), 2, multiple=4)
    assert short.token.shape == (2, 3)  # a text within one multiple: whatever the routes
    index = torch.zeros(1, 10, 1, dtype=torch.long)
    assert plan_dispatch(index, 2, multiple=4).token.shape == (2, 10)  # the text is no multiple
    index[0, 7:] = 1
    assert plan_dispatch(index, 2, multiple=4).token.shape == (2, 8)
    index[0, 4:] = torch.tensor([1, 1, 2, 2, 2, 2])[:, None]
    assert plan_dispatch(index, 3, multiple=4).token.shape == (3, 4)


def test_length_hardly_depends_on_the_routes():
    size = (2, 1000, 4, 2)
    lengths = {plan_of(size, seed).token.shape[1] for seed in range(20)}
    assert lengths <= {512, 576}


def test_order_of_a_tokens_choices_does_not_matter():
    index = routes_of((2, 100, 5, 3)).memory
    one, other = (plan_dispatch(i, 5, multiple=MULTIPLE) for i in (index, index.flip(-1)))
    assert torch.equal(one.token, other.token)
    assert torch.equal(one.place, other.place.flip(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packing_and_weighting_what_comes_back_is_the_sum_over_memories(dtype):
    size = (3, 130, 4, 2)
    routes, plan = routes_of(size), plan_of(size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 130, 5, generator=generator, dtype=torch.float64)
    factor = torch.randn(4, 5, generator=generator, dtype=torch.float64)  # what each memory does
    leaves = [t.to(dtype).requires_grad_() for t in (x, factor)]
    weight = routes.weight.clone().requires_grad_()

    rows = dispatch(leaves[0], plan).unflatten(0, (4, 3)) * leaves[1][:, None, None]
    got = combine(rows.flatten(0, 1), plan, weight)
    exact = [t.detach().double().requires_grad_() for t in (*leaves, weight)]
    expected = torch.einsum("btd,btkd,btk->btd", exact[0], exact[1][routes.memory], exact[2])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(got.double().square().sum(), [*leaves, weight])
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for gradient, want in zip(gradients, wanted, strict=True):
        error = (gradient.double() - want).norm() / want.norm()
        assert error <= tolerance


def test_whole_numbers_are_packed_too():
    plan = plan_of((2, 9, 3, 2))
    positions = torch.arange(18).view(2, 9, 1)
    assert torch.equal(dispatch(positions, plan)[..., 0], plan.token)


def test_balance_loss_is_k_when_balanced_and_grows_to_the_number_of_memories():
    memories = 4
    balanced = sent([[0, 1, 2, 3]], memories)
    for k in (1, 2, 4):
        even = balanced + balanced.roll(1, -1) / 2 + balanced.roll(2, -1) / 4  # neighbors follow
        assert balance_loss(route(even, k)).item() == pytest.approx(k)
    collapsed = balance_loss(route(sent([[0, 0, 0, 0]], memories), 1))
    assert collapsed.item() == pytest.approx(memories, rel=1e-6)
    leaning = balance_loss(route(sent([[0, 0, 2, 3]], memories), 1))
    assert 1 < leaning < collapsed


def test_descending_the_balance_loss_empties_the_fullest_memory():
    logits = sent([[0, 0, 0, 1]], 3) / 20
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(balance_loss(route(logits, 1)), logits)
    mean = gradient.mean((0, 1))
    assert mean[0] > 0 > mean[2]


def test_load_counts_choices_per_token():
    index = torch.tensor([[[0, 2], [2, 1], [2, 0], [0, 2]]])
    logits = torch.zeros(1, 4, 4).scatter(-1, index, 2.0)
    shares = load(route(logits, 2))
    assert shares.tolist() == [0.75, 0.25, 1.0, 0.0]


def test_a_second_choice_whose_weight_underflows_is_still_packed():
    logits = torch.tensor([[[200.0, 0.0, -50.0]]])
    routes = route(logits, 2)
    assert routes.weight.tolist() == [[[1.0, 0.0]]]
    assert plan_dispatch(routes.memory, 3, multiple=MULTIPLE).tokens.tolist() == [1, 1, 0]


def test_equal_logits_choose_different_memories():
    routes = route(torch.zeros(2, 50, 4), 3)
    assert all(len(set(choice)) == 3 for choice in routes.memory.flatten(0, 1).tolist())
    assert routes.weight.sum().item() == pytest.approx(100)
    assert math.isclose(routes.weight[0, 0, 0].item(), 1 / 3, rel_tol=1e-6)


def test_weights_can_be_left_as_probabilities():
    logits = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    raw, normed = route(logits, 3, renormalize=False), route(logits, 3)
    assert torch.equal(raw.weight, raw.probability.gather(-1, raw.memory))
    assert torch.equal(raw.memory, normed.memory)
    torch.testing.assert_close(normed.weight * raw.weight.sum(-1, keepdim=True), raw.weight)


def test_weights_spread_over_all_memories():
    routes = routes_of((2, 9, 5, 2))
    weights = spread(routes)
    assert weights.shape == (2, 9, 5)
    assert ((weights > 0).sum(-1) == 2).all()
    assert torch.equal(weights.gather(-1, routes.memory), routes.weight)


def test_telemetry_of_a_router():
    index = torch.tensor([[[0, 2], [2, 1], [2, 0], [0, 2]]])
    routes = route(torch.zeros(1, 4, 4).scatter(-1, index, 2.0).requires_grad_(), 2)
    told = router_telemetry(routes)
    assert told["load_max"].item() == 0.5
    assert told["load_min"].item() == 0
    p = torch.tensor([math.exp(2), math.exp(2), 1, 1]) / (2 * math.exp(2) + 2)
    assert told["router_entropy"].item() == pytest.approx(-(p * p.log()).sum().item())
    assert not any(value.requires_grad for value in told.values())
    certain = router_telemetry(route(sent([[0, 1]], 3) * 100, 1))
    assert certain["router_entropy"] == 0


def test_z_loss_is_the_squared_log_partition():
    assert z_loss(torch.zeros(2, 3, 4)).item() == pytest.approx(math.log(4) ** 2)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
def test_a_routers_logits_are_exact_in_half_precision(autocast):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in ((2, 9, 16), (5, 16)))
    if not autocast:
        x, weight = x.bfloat16(), weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = router_logits(x, weight)
    torch.testing.assert_close(logits, x.float() @ weight.float().T)
    assert router_logits(x.double(), weight).dtype == torch.float64


# Groups.

MANY = 40


def grouping_of(seed, experts, most, multiple):
    """Up to `most` copies of each of MANY tokens, to different experts."""
    generator = torch.Generator().manual_seed(seed)
    copies = torch.randint(0, most + 1, (MANY,), generator=generator)
    chosen = [torch.randperm(experts, generator=generator)[:n] for n in copies]
    expert = torch.cat(chosen)
    return expert, copies, group(expert, copies, experts, multiple=multiple)


CASES = [(0, 5, 3, 8), (1, 6, 6, 1), (2, 3, 1, 4), (3, 64, 2, 8), (4, 4, 0, 8), (5, 1, 1, 8)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@every_case
def test_a_group_holds_the_tokens_of_its_expert_in_order_then_padding(case):
    expert, copies, groups = grouping_of(*case)
    tokens = torch.arange(MANY).repeat_interleave(copies)
    multiple = case[3]
    assert len(groups.token) == sum(groups.rows)
    for e, rows in enumerate(groups.token.split(groups.rows)):
        held = tokens[expert == e]
        assert torch.equal(rows[: len(held)], held)
        assert not rows[len(held) :].any()
        assert len(rows) == -(-len(held) // multiple) * multiple


@every_case
def test_every_copy_lies_in_a_row_of_its_own_with_its_expert(case):
    expert, copies, groups = grouping_of(*case)
    tokens = torch.arange(MANY).repeat_interleave(copies)
    assert torch.equal(groups.token[groups.place], tokens)
    assert groups.place.unique().numel() == len(expert)
    of_row = torch.arange(case[1]).repeat_interleave(torch.tensor(groups.rows))
    assert torch.equal(of_row[groups.place], expert)
    assert torch.equal(groups.offset, copies.cumsum(0) - copies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_case
def test_grouping_and_weighting_what_comes_back_is_the_sum_over_experts(case, dtype):
    expert, copies, groups = grouping_of(*case)
    generator = torch.Generator().manual_seed(1)
    x, factor, weight = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((MANY, 5), (case[1], 5), (len(expert),))
    )
    of_row = torch.arange(case[1]).repeat_interleave(torch.tensor(groups.rows))
    got = ungrouped(grouped(x, groups) * factor[of_row], groups, weight)
    assert got.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in (x, factor, weight)]
    tokens = torch.arange(MANY).repeat_interleave(copies)
    terms = exact[0][tokens] * exact[1][expert] * exact[2][:, None]
    expected = torch.zeros(MANY, 5).double().index_add(0, tokens, terms)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(got.double().square().sum(), [x, factor, weight])
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for gradient, want in zip(gradients, wanted, strict=True):
        error = (gradient.double() - want).norm() / want.norm().clamp(min=1)
        assert error <= tolerance


def test_without_numbers_loads_are_even_and_nothing_is_padded():
    expert = torch.zeros(23, dtype=torch.long, device="meta")
    groups = group(expert, expert.new_zeros(10), 4, multiple=8)
    assert groups.rows == [6, 6, 6, 5]
    x = torch.zeros(10, 3, device="meta")
    y = ungrouped(grouped(x, groups), groups, torch.zeros(23, device="meta"))
    assert y.shape == (10, 3)
