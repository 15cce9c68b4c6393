"""Routes of tokens, and their packing into one sequence per memory and row."""

import math

import pytest
import torch

from ops.routing import balance_loss, load, pack, packed, route, unpacked

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


def packing_of(size, seed=0):
    return pack(routes_of(size, seed).memory, size[2], multiple=MULTIPLE)


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
    routes, packing = routes_of(size), packing_of(size)
    for memory in range(memories):
        for row in range(batch):
            sequence = memory * batch + row
            goes = (routes.memory[row] == memory).any(-1)
            expected = row * tokens + goes.nonzero()[:, 0]  # in the order of time
            held = packing.token[sequence][packing.present[sequence]]
            assert torch.equal(held, expected)
            assert packing.tokens[sequence] == len(expected)


@every_size
def test_padding_comes_last_is_marked_and_belongs_to_the_sequences_own_row(size):
    batch, tokens, *_ = size
    packing = packing_of(size)
    places = torch.arange(packing.token.shape[1])
    assert torch.equal(packing.present, places < packing.tokens[:, None])
    rows = torch.arange(len(packing.token)) % batch
    assert torch.equal(packing.token // tokens, rows[:, None].expand_as(packing.token))


@every_size
def test_every_token_lies_at_its_k_places(size):
    batch, tokens, _, k = size
    routes, packing = routes_of(size), packing_of(size)
    flat = packing.token.flatten()[packing.place]
    assert torch.equal(
        flat, torch.arange(batch * tokens).view(batch, tokens, 1).expand_as(packing.place)
    )
    assert packing.present.flatten()[packing.place].all()
    assert packing.place.unique().numel() == packing.present.sum() == batch * tokens * k
    sequence = packing.place // packing.token.shape[1]
    rows = torch.arange(batch)[:, None, None]
    assert torch.equal(sequence, routes.memory * batch + rows)


def test_a_sequence_is_as_long_as_the_fullest_rounded_up_and_never_longer_than_the_text():
    short = pack(torch.tensor([[[0], [1], [0]]]), 2, multiple=4)
    assert short.token.shape == (2, 3)  # a text within one multiple: whatever the routes
    index = torch.zeros(1, 10, 1, dtype=torch.long)
    assert pack(index, 2, multiple=4).token.shape == (2, 10)  # the text is no multiple
    index[0, 7:] = 1
    assert pack(index, 2, multiple=4).token.shape == (2, 8)
    index[0, 4:] = torch.tensor([1, 1, 2, 2, 2, 2])[:, None]
    assert pack(index, 3, multiple=4).token.shape == (3, 4)


def test_length_hardly_depends_on_the_routes():
    size = (2, 1000, 4, 2)
    lengths = {packing_of(size, seed).token.shape[1] for seed in range(20)}
    assert lengths <= {512, 576}


def test_order_of_a_tokens_choices_does_not_matter():
    index = routes_of((2, 100, 5, 3)).memory
    one, other = (pack(i, 5, multiple=MULTIPLE) for i in (index, index.flip(-1)))
    assert torch.equal(one.token, other.token)
    assert torch.equal(one.place, other.place.flip(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packing_and_weighting_what_comes_back_is_the_sum_over_memories(dtype):
    size = (3, 130, 4, 2)
    routes, packing = routes_of(size), packing_of(size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 130, 5, generator=generator, dtype=torch.float64)
    factor = torch.randn(4, 5, generator=generator, dtype=torch.float64)  # what each memory does
    leaves = [t.to(dtype).requires_grad_() for t in (x, factor)]
    weight = routes.weight.clone().requires_grad_()

    rows = packed(leaves[0], packing).unflatten(0, (4, 3)) * leaves[1][:, None, None]
    got = unpacked(rows.flatten(0, 1), packing, weight)
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
    packing = packing_of((2, 9, 3, 2))
    positions = torch.arange(18).view(2, 9, 1)
    assert torch.equal(packed(positions, packing)[..., 0], packing.token)


def test_balance_loss_is_k_when_balanced_and_grows_to_the_number_of_memories():
    memories = 4
    balanced = sent([[0, 1, 2, 3]], memories)
    for k in (1, 2, 4):
        even = balanced + balanced.roll(1, -1) / 2 + balanced.roll(2, -1) / 4  # neighbours follow
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
    assert pack(routes.memory, 3, multiple=MULTIPLE).tokens.tolist() == [1, 1, 0]


def test_equal_logits_choose_different_memories():
    routes = route(torch.zeros(2, 50, 4), 3)
    assert all(len(set(choice)) == 3 for choice in routes.memory.flatten(0, 1).tolist())
    assert routes.weight.sum().item() == pytest.approx(100)
    assert math.isclose(routes.weight[0, 0, 0].item(), 1 / 3, rel_tol=1e-6)
