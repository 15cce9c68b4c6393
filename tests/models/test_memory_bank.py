"""A language model with a memory bank: exact, sparse in training, and as large as the paper's."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mneme.layers import (
    GENERIC,
    BankOptions,
    BankShape,
    GatedConvolution,
    HierarchicalFFN,
    MemoryBank,
    SwiGLU,
    state_tensors,
)
from mneme.models import LanguageModel, budget, generate, make_optimizer
from mneme.models.diagnosis import first_nonfinite
from mneme.models.optim import coalesced
from tests.helpers import assert_close

D, V, T = 16, 11, 7
NEVER = BankOptions(branching=3, hidden=(4, 0, 2), generic_probability=0.0)
KINDS = ("ffn", "lora", "kv")
MIXER = partial(GatedConvolution, conv_size=3)
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def model_with(ffn, n_layers=2) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(D, vocab_size=V, n_layers=n_layers, pattern=[[MIXER, ffn]])


def banked(options=NEVER, *, fill=True, **more) -> LanguageModel:
    """A model whose blocks answer, as trained ones do."""
    model = model_with(partial(HierarchicalFFN, bank=options), **more)
    with torch.no_grad():
        for parameter in model.bank.parameters() if fill else ():
            parameter.normal_(std=0.5)
    return model


def tokens_of(batch: int) -> torch.Tensor:
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(1))


def loss_of(model, tokens, route):
    state = None if route is None else model.init_state(len(tokens), torch.tensor(route))
    logits = model(tokens, state).y
    return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


# Sizes


@pytest.mark.parametrize(
    ("places", "width", "hidden", "fetch", "bank"),
    [
        (35, 512, (256, 64, 16, 0), 18.06e6, 4.624e9),
        (24, 1024, (512, 128, 32, 0), 49.5e6, 12.68e9),
        (24, 2048, (768, 256, 16, 0), 153.4e6, 21.14e9),
        (35, 512, (0, 0, 16, 0), 860_160, 3.523e9),
    ],
    ids=["160M", "410M", "1.4B", "level 3 of 160M"],
)
def test_sizes_are_those_of_the_paper_and_the_generic_block(places, width, hidden, fetch, bank):
    shape = BankShape(places, 16, hidden, 3 * width)
    assert shape.fetched == pytest.approx(fetch, rel=1e-3)
    assert shape.parameters - shape.fetched == pytest.approx(bank, rel=1e-3)
    assert shape.leaves == 65_536


def test_a_bank_has_as_many_numbers_as_its_shape_says():
    bank = banked().bank
    assert sum(p.numel() for p in bank.parameters()) == bank.shape.parameters
    assert bank.fetch(torch.tensor([0]))[0].numel() == bank.shape.fetched


def test_budgets_charge_fetched_blocks_as_state():
    plain, with_bank = budget(model_with(SwiGLU), T), budget(banked(), T)
    fetched = 4 * 2 * (4 + 2) * 3 * D  # bytes, layers, units, numbers of a unit
    assert with_bank.state_bytes - plain.state_bytes == fetched
    assert with_bank.decode_bytes_per_token - plain.decode_bytes_per_token == fetched
    assert with_bank.active_parameters == plain.active_parameters


# Which blocks


def test_a_leaf_fetches_the_node_above_it_at_each_level():
    bank, p, k = banked().bank.eval(), 3, 3
    with torch.no_grad():
        for level in (1, 3):
            nodes = torch.arange(float(k**level))
            bank.get_parameter(f"level{level}").copy_(nodes[:, None].expand_as(bank._table(level)))
    blocks = bank.fetch(torch.arange(k**p))
    for leaf in range(k**p):
        assert (blocks[leaf, :, :4] == leaf // k ** (p - 1)).all()
        assert (blocks[leaf, :, 4:] == leaf // k ** (p - 3)).all()


@pytest.mark.parametrize("branching", [4, 16])
def test_training_fetches_the_generic_block_once_in_k_plus_1(branching):
    bank = MemoryBank(BankShape(1, branching, (1,), 6), 2, BankOptions(branching, (1,)))
    nn.init.ones_(bank.generic)
    route = torch.zeros(20_000, dtype=torch.long)
    share = bank.fetch(route)[:, 0, 0, -1].mean().item()
    assert share == pytest.approx(1 / (branching + 1), abs=0.01)
    assert not bank.eval().fetch(route)[:, 0, 0, -1].any()


def test_layers_without_a_bank_may_come_first():
    bank = partial(HierarchicalFFN, bank=NEVER)
    model = LanguageModel(
        D, vocab_size=V, n_layers=4, pattern=[[SwiGLU], [SwiGLU], [bank], [bank]]
    ).eval()
    assert model.bank.shape.places == 2
    route = torch.tensor([5, GENERIC])
    blocks = model.bank.fetch(route)
    first, second = state_tensors(model.init_state(2, route))
    assert torch.equal(first, blocks[:, 0])
    assert torch.equal(second, blocks[:, 1])
    assert not torch.equal(first, second)


# What is computed


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_bank_changes_no_bit_of_its_base_model(kind):
    base_model = model_with(SwiGLU)
    model = banked(BankOptions(branching=3, hidden=(4, 2), kind=kind), fill=False)
    missing = model.load_state_dict(base_model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("bank.") for name in missing.missing_keys)
    tokens = tokens_of(4)
    for route in ([0, 8, 4, GENERIC], None):
        state = None if route is None else model.init_state(4, torch.tensor(route))
        assert torch.equal(model(tokens, state).y, base_model(tokens).y)


def test_a_new_bank_changes_no_gradient_of_its_base_model():
    base_model, model = model_with(SwiGLU), banked(fill=False)
    model.load_state_dict(base_model.state_dict(), strict=False)
    tokens = tokens_of(4)
    for case, route in ((base_model, None), (model, [0, 26, 9, 9])):
        loss_of(case, tokens, route).backward()
    for name, parameter in base_model.named_parameters():
        assert_close(model.get_parameter(name).grad, parameter.grad, name, 1e-6)


def test_a_widened_feed_forward_is_one_of_concatenated_weights():
    torch.manual_seed(0)
    layer = HierarchicalFFN(D, bank=BankOptions(hidden=(5,))).double()
    blocks = torch.randn(2, 5, 3 * D, dtype=torch.float64)
    x = torch.randn(2, T, D, dtype=torch.float64)
    layer(x, blocks).y.square().sum().backward()
    hidden, gradients = layer.out_proj.in_features, []
    for i in range(2):
        m1, m2, m3 = blocks[i].chunk(3, dim=1)
        w1, w2 = layer.in_proj.weight.detach().chunk(2)
        wide = SwiGLU(D, expand=(hidden + 5) / D, multiple_of=1).double()
        wide.in_proj.weight.data = torch.cat([w1, m1, w2, m2])
        wide.out_proj.weight.data = torch.cat([layer.out_proj.weight.detach(), m3.T], dim=1)
        y = wide(x[i : i + 1]).y
        assert_close(layer(x, blocks).y[i : i + 1], y, "output", 1e-13)
        y.square().sum().backward()
        own = [part[:hidden] for part in wide.in_proj.weight.grad.chunk(2)]
        gradients.append((torch.cat(own), wide.out_proj.weight.grad[:, :hidden]))
    for i, name in enumerate(("in_proj", "out_proj")):
        expected = gradients[0][i] + gradients[1][i]
        assert_close(layer.get_parameter(f"{name}.weight").grad, expected, name, 1e-13)


def test_lora_blocks_are_merged_matrices():
    torch.manual_seed(0)
    options, r = BankOptions(hidden=(3,), kind="lora"), 3
    layer = HierarchicalFFN(D, bank=options).double()
    x, h = torch.randn(1, T, D, dtype=torch.float64), layer.out_proj.in_features
    block = torch.randn(1, r, 3 * (D + h), dtype=torch.float64)
    a_gate, a_value, b_gate, b_value, a_out, b_out = block[0].split([D, D, h, h, h, D], dim=1)
    merged = SwiGLU(D).double()
    change = torch.cat([b_gate.T @ a_gate, b_value.T @ a_value])
    merged.in_proj.weight.data = layer.in_proj.weight.detach() + 2 * change
    merged.out_proj.weight.data = layer.out_proj.weight.detach() + 2 * b_out.T @ a_out
    assert_close(layer(x, block).y, merged(x).y, "output", 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_a_batch_read_their_own_blocks(kind):
    model = banked(BankOptions(branching=3, hidden=(4, 2), kind=kind)).double().eval()
    tokens, route = tokens_of(5), torch.tensor([0, 8, GENERIC, 4, 8])
    with torch.no_grad():
        together = model(tokens, model.init_state(5, route)).y
        for i in range(5):
            alone = model(tokens[i : i + 1], model.init_state(1, route[i : i + 1])).y
            assert_close(together[i : i + 1], alone, f"sequence {i}", 1e-12)
        others = model(tokens, model.init_state(5, route.flip(0))).y
    same = [torch.allclose(together[i], others[i]) for i in range(5)]
    assert same == [False, False, True, False, False]


def test_blocks_are_carried_from_token_to_token():
    model = banked().double().eval()
    tokens, route = tokens_of(2), torch.tensor([20, GENERIC])
    with torch.no_grad():
        state = model.init_state(2, route)
        whole = model(tokens, state).y
        pieces = []
        for token in tokens.split(1, dim=1):
            y, state, _ = model(token, state)
            pieces.append(y)
    assert_close(torch.cat(pieces, dim=1), whole, "logits", 1e-12)
    new, _ = generate(model, tokens, 3, temperature=0, state=model.init_state(2, route))
    assert torch.equal(new[:, 0], whole[:, -1].argmax(-1))
    told = torch.cat([tokens, new[:, :2]], dim=1)
    with torch.no_grad():
        expected = model(told, model.init_state(2, route)).y[:, -1].argmax(-1)
    assert torch.equal(new[:, 2], expected)


# What is trained

ROUTES = [[0, 1, 26], [13, 13, 1]]
TOUCHED = {1: [[0, 2], [0, 1]], 3: [[0, 1, 26], [1, 13]]}  # nodes by level and step


def test_only_fetched_blocks_have_a_gradient():
    model = banked()
    loss_of(model, tokens_of(3), ROUTES[0]).backward()
    for level in (1, 3):
        gradient = coalesced(model.bank.get_parameter(f"level{level}").grad)
        assert gradient.indices()[0].tolist() == TOUCHED[level][0]
        assert gradient.values().ne(0).any(1).all()
    assert not model.bank.generic.grad.any()


@pytest.mark.parametrize("update", ["lazy", "rowwise"])
def test_a_step_leaves_other_blocks_and_their_state_alone(update):
    options = BankOptions(3, (4, 0, 2), generic_probability=0.0, update=update, weight_decay=0.1)
    model = banked(options)
    optimizer = make_optimizer(model, ADAMW)
    for step, route in enumerate(ROUTES):
        before = {level: snapshot(model, optimizer, level) for level in (1, 3)}
        optimizer.zero_grad()
        loss_of(model, tokens_of(3), route).backward()
        optimizer.step()
        for level, tensors in before.items():
            after = snapshot(model, optimizer, level)
            for name, was in tensors.items():
                moved = after[name].ne(was).view(len(was), -1).any(1).nonzero()[:, 0].tolist()
                assert moved == TOUCHED[level][step], f"{name} of level {level}, step {step}"


def snapshot(model, optimizer, level) -> dict[str, torch.Tensor]:
    """A level's blocks and what the optimizer keeps of each, a row per block."""
    table = model.bank.get_parameter(f"level{level}")
    kept = {k: v for k, v in optimizer.state[table].items() if isinstance(v, torch.Tensor)}
    return {name: t.detach().clone() for name, t in {"blocks": table, **kept}.items()}


def test_a_block_that_is_no_number_is_found_by_its_route():
    model, tokens = banked(), tokens_of(2)
    with torch.no_grad():
        model.bank.record(3, 7)[1].fill_(float("nan"))
    bad, good = (model.init_state(2, torch.tensor([0, leaf])) for leaf in (7, 8))
    assert first_nonfinite(model, tokens, bad) == "blocks.1.parts.1.parts.0 at sequence 1, token 0"
    assert first_nonfinite(model, tokens, good).startswith("none")


@pytest.mark.parametrize("update", ["lazy", "dense"])
def test_blocks_learn_to_answer(update):
    """From the start, where they answer nothing: the same sequence, another answer by route."""
    options = BankOptions(2, (4, 4), generic_probability=0.0, update=update, lr_multiplier=3.0)
    model = banked(options, fill=False, n_layers=1)
    optimizer = make_optimizer(model, ADAMW)
    tokens, answers = torch.zeros(4, 3, dtype=torch.long), torch.tensor([1, 2, 3, 4])
    for _ in range(30):
        optimizer.zero_grad()
        logits = model(tokens, model.init_state(4, torch.arange(4))).y[:, -1]
        F.cross_entropy(logits, answers).backward()
        optimizer.step()
    assert torch.equal(logits.argmax(-1), answers)


def test_recomputed_blocks_have_the_same_gradients():
    model, gradients = banked().train(), []
    for again in (False, True):
        model.checkpoint_blocks = again
        model.zero_grad()
        loss_of(model, tokens_of(3), [0, 1, 26]).backward()
        gradients.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(once, twice) for once, twice in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (torch.tensor([0]), "1 routes were given for 2 sequences"),
        (torch.tensor([0, 27]), "routes must be from 0 to 26, .* got 0 to 27"),
    ],
    ids=["too few", "no leaf"],
)
def test_routes_that_lead_nowhere(route, message):
    with pytest.raises(ValueError, match=message):
        banked().init_state(2, route)
