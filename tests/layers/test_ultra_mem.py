"""What is peculiar to UltraMem: Tucker keys, virtual tables, slices of values, its start."""

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import (
    SwiGLU,
    TableOptions,
    TuckerScores,
    UltraMem,
    UltraMemV2,
    bind_shared_parts,
)
from mneme.layers.sparse.ultra_mem import QUERY_PER_RANK, matched_std
from mneme.layers.sparse.ultra_mem_keys import TuckerKeys, VirtualSlots, unevenness
from mneme.ops.tucker import Leading, leading_vectors
from tests.helpers import assert_parameter_gradients_are_right

DENSE = TableOptions(update="dense")
both = pytest.mark.parametrize("cls", [UltraMem, UltraMemV2])


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def small(cls, **options):
    torch.manual_seed(0)
    options = {"heads": 2, "top_k": 6, "sub_keys": 4, "table": DENSE} | options
    return cls(16, **options).double()


def make_keys(d_model=16, *, heads=2, top_k=6, sub_keys=8, expansion=1, **scoring):
    torch.manual_seed(0)
    scores = TuckerScores(**scoring)
    return TuckerKeys(
        d_model,
        heads=heads,
        top_k=top_k,
        sub_keys=sub_keys,
        expansion=expansion,
        key_dim=12,
        scoring=scores,
    ).double()


def all_scores(keys, x):
    """Scores of every pair by each core, from the definition, `[B, T, h, c, n, n]`."""
    queries, ranks = keys.queries
    half = keys.keys.shape[-1]
    q = keys.query_norm(keys.query_proj(x).unflatten(-1, (queries, 2, ranks, half)))
    q = q.expand(*x.shape[:2], keys.heads, 2, keys.scoring.rank, half)
    sides = torch.einsum("bthsrk,hsrnk->sbthnr", q, keys.key_norm(keys.keys))
    return torch.einsum("bthir,crs,bthjs->bthcij", sides[0], keys.cores, sides[1])


@pytest.mark.parametrize("query_per_head", [False, True])
@pytest.mark.parametrize("query_per_rank", [False, True])
def test_the_best_pairs_of_the_definition_are_read(query_per_head, query_per_rank):
    keys = make_keys(
        top_k=8, rank=3, cores=2, query_per_head=query_per_head, query_per_rank=query_per_rank
    )
    x = normal(2, 5, 16)
    scores, rows, _, _ = keys(x)
    grids = all_scores(keys, x).flatten(-2)  # side_k >= n: the selection is exact
    best = grids.sum(3).topk(8)
    assert torch.equal(rows, best.indices)
    expected = grids.gather(-1, rows.unsqueeze(3).expand_as(scores))
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-12)


def test_equal_cores_are_one_core():
    one, two = make_keys(cores=1), make_keys(cores=2)
    two.load_state_dict(one.state_dict() | {"cores": one.cores.detach().repeat(2, 1, 1) / 2})
    x = normal(2, 5, 16)
    a, b = one(x), two(x)
    assert torch.equal(a.rows, b.rows)
    torch.testing.assert_close(b.scores[..., 0, :], b.scores[..., 1, :], rtol=0, atol=0)
    torch.testing.assert_close(b.scores.sum(-2), a.scores[..., 0, :])


@both
def test_each_core_scores_its_own_slice(cls):
    layer = small(cls, value_dim=8, scoring=TuckerScores(cores=2))
    layer.out_proj = torch.nn.Identity()
    x = normal(2, 5, 16)
    scores, rows, groups, _ = layer.keys(x)
    values = layer.values.weight.view(16, 8)[rows]  # [b, t, h, k, 8]
    weights = torch.cat([scores[..., [c], :].mT.expand(*rows.shape, 4) for c in (0, 1)], -1)
    if cls is UltraMemV2:
        pre = torch.einsum("bthkp,btp->bthk", layer.pre_values.weight[rows], layer.pre_proj(x))
        expected = (pre[..., None] * weights * values).sum((2, 3))
    else:
        pooled = [((groups == p)[..., None] * weights * values).sum((2, 3)) for p in range(4)]
        expected = torch.cat(pooled, -1)
    torch.testing.assert_close(layer(x).y, expected, rtol=1e-10, atol=1e-12)


def test_expansion_is_reading_virtual_tables():
    """Slot v reads row pi(v) mod N of V W_p, p = pi(v) div N; all sub-keys of a side survive."""
    layer, x = small(UltraMem, top_k=8, scoring=TuckerScores()), normal(2, 5, 16)
    table, maps = layer.values.weight, layer.out_proj.weight.view(16, 4, 8)
    virtual = torch.einsum("nv,dpv->pnd", table, maps).flatten(0, 1)  # [E N, D]
    best = all_scores(layer.keys, x).squeeze(3).flatten(-2).topk(8)
    slots = layer.keys.slots.permutation[best.indices]
    expected = torch.einsum("bthk,bthkd->btd", best.values, virtual[slots])
    torch.testing.assert_close(layer(x).y, expected, rtol=1e-10, atol=1e-12)


def test_every_row_is_in_every_group_once():
    slots = VirtualSlots(9, 4)
    rows, groups = slots(torch.arange(36)[None])
    assert (groups * 9 + rows).unique().numel() == 36
    assert not torch.equal(groups[0].sort().values, groups[0])
    assert torch.equal(VirtualSlots(9, 4).permutation, slots.permutation)


def test_without_expansion_slots_are_rows():
    slots = VirtualSlots(9, 1)
    rows, groups = slots(torch.arange(9)[None])
    assert torch.equal(rows[0], torch.arange(9))
    assert not groups.any()
    assert not list(slots.buffers())


def test_leading_vectors_are_right_from_the_start_and_follow_the_cores():
    keys = make_keys(cores=2)
    x = normal(2, 5, 16)
    expected = torch.stack(leading_vectors(keys.cores.sum(0)))
    torch.testing.assert_close(keys.leading, expected)
    with torch.no_grad():
        keys.cores += 0.3 * normal(2, 2, 2, seed=3)
    before = keys.leading.clone()
    keys.eval()(x)
    assert torch.equal(keys.leading, before)
    keys.train()(x)
    assert not torch.allclose(keys.leading, before)
    assert torch.equal(
        keys.leading, torch.stack(leading_vectors(keys.cores.sum(0), Leading(*before)))
    )


def test_the_sign_of_the_leading_vectors_survives_a_checkpoint():
    keys = make_keys()
    with torch.no_grad():
        keys.leading.neg_()  # as if training had led there
    x = normal(2, 5, 16)
    rows = keys(x).rows
    assert (keys.leading.sum() < 0).item()
    restored = make_keys()
    assert not torch.equal(restored(x).rows, rows)
    restored.load_state_dict(keys.state_dict())
    assert torch.equal(restored(x).rows, rows)
    assert torch.equal(restored.eval()(x).rows, rows)


def test_tail_loss_is_small_cores_away_from_rank_one():
    layer = small(UltraMem, scoring=TuckerScores(tail_loss=0.1))
    with torch.no_grad():
        layer.keys.cores.copy_(torch.diag(torch.tensor([1.0, 0.65]))[None])
    losses = layer(normal(1, 3, 16)).aux
    assert losses["loss_tail"].item() == pytest.approx(0.1 * 0.5**2)
    assert not small(UltraMemV2)(normal(1, 3, 16)).aux


@pytest.mark.parametrize("cores", [1, 2])
def test_rows_and_losses_under_autocast_are_those_of_full_precision(cores):
    keys = make_keys(64, top_k=16, sub_keys=40, cores=cores, tail_loss=1.0, balance_loss=1.0)
    with torch.no_grad():
        keys.cores.add_(torch.eye(2))  # a tail that costs something
    keys, x = keys.float(), normal(4, 100, 64).float()
    exact = keys(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = keys(x)
    assert torch.equal(mixed.rows, exact.rows)
    assert torch.equal(mixed.scores, exact.scores)
    for name, loss in exact.losses.items():
        assert mixed.losses[name].dtype == torch.float32
        assert loss > 0
        assert torch.equal(mixed.losses[name], loss)


@both
@pytest.mark.parametrize("expansion", [1, 4])
def test_it_can_be_built_where_there_are_no_numbers(cls, expansion):
    with torch.device("meta"):
        layer = cls(16, sub_keys=8, expansion=expansion)
        assert layer(torch.zeros(2, 5, 16)).y.shape == (2, 5, 16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_unevenness_is_one_for_even_use_and_more_for_any_other():
    even = torch.zeros(2, 4, 3)
    every = torch.arange(3).repeat(2, 4, 1)
    assert unevenness(even, every).item() == pytest.approx(1)
    biased = even + torch.tensor([0.0, 0.0, 2.0])
    assert unevenness(biased, torch.full((2, 4, 1), 2)) > 2
    assert unevenness(biased[:, :0], every[:, :0]) == 0


def test_balance_loss_counts_rows_and_columns_that_were_read():
    keys = make_keys(heads=1, top_k=3, balance_loss=0.5)
    x = normal(2, 5, 16)
    queries = keys.query_norm(keys.query_proj(x).unflatten(-1, (1, 2, 1, 6)))
    sides = torch.einsum("btgsak,hsrnk->sbtnr", queries, keys.key_norm(keys.keys))
    rows, expected = keys(x).rows, 0.0
    for side, vector, read in zip(sides, keys.leading, (rows // 8, rows % 8), strict=True):
        share = F.one_hot(read.flatten(), 8).double().mean(0)
        probability = (side @ vector).softmax(-1).mean((0, 1))
        expected += 0.5 * 8 * (share * probability).sum().item()
    assert keys(x).losses["loss_balance"].item() == pytest.approx(expected)


@pytest.mark.parametrize("d_model", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"heads": 2, "top_k": 16}, {"expansion": 4}], ids=str)
def test_v2_starts_with_the_variance_of_a_feed_forward(d_model, options):
    torch.manual_seed(0)
    x = torch.randn(2, 200, d_model)

    def spread(make):
        return torch.stack([make().square().mean() for _ in range(8)]).mean().sqrt().item()

    with torch.no_grad():
        wanted = spread(lambda: SwiGLU(d_model)(x).y)
        got = spread(lambda: UltraMemV2(d_model, sub_keys=48, table=DENSE, **options)(x).y)
    assert got == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("d_model", [64, 128, 256])
def test_v1_starts_with_the_spread_of_its_values(d_model):
    """Each of h k scores of mean square 1 adds a value of variance 0.02^2; the output keeps it."""
    torch.manual_seed(0)
    x = torch.randn(2, 200, d_model)
    with torch.no_grad():
        out = [UltraMem(d_model, sub_keys=24, table=DENSE)(x).y for _ in range(6)]
    got = torch.stack(out).square().mean().sqrt().item()
    assert got == pytest.approx(0.02 * (2 * 32 / 4) ** 0.5, rel=0.1)


def test_matched_std_is_the_papers_fourth_power_formula():
    inner, layers, lookups, d_model, pre, value = 4, 20, 32, 768, 192, 192
    std = matched_std(0.064 * inner / (2 * layers), lookups=lookups, widths=(d_model, pre, value))
    assert std**4 == pytest.approx(0.2 * inner * d_model / (lookups * pre * value * layers))
    assert 0.07 < std < 0.08


def test_norms_start_as_in_the_paper_at_its_sizes():
    keys = TuckerKeys(
        8, heads=1, top_k=32, sub_keys=360, expansion=1, key_dim=384, scoring=QUERY_PER_RANK
    )
    assert keys.key_norm.weight[0].item() == pytest.approx(192**-0.33, rel=0.05)


@both
def test_active_parameters_leave_out_rows_that_are_not_read(cls):
    few, many = small(cls), small(cls, sub_keys=8)
    keys = [sum(p.numel() for p in layer.keys.parameters()) for layer in (few, many)]
    assert many.active_parameters() - few.active_parameters() == keys[1] - keys[0]
    tables = sum(p.numel() for name, p in few.named_parameters() if "values" in name)
    width = sum(t.weight.shape[1] for n, t in few.named_modules() if n.endswith("values"))
    read = 2 * 6 * width * (2 if cls is UltraMem else 1)  # a row has two slices
    own = sum(p.numel() for p in few.parameters())
    assert few.active_parameters() == own - tables + read


@both
def test_layers_can_share_their_tables(cls):
    shared = TableOptions(update="dense", share="memory")
    layers = torch.nn.ModuleList([small(cls, table=shared), small(cls, table=shared)])
    tables = bind_shared_parts(layers)
    assert len(tables) == (1 if cls is UltraMem else 2)
    x = normal(1, 3, 16)
    sum(layer(x).y.sum() for layer in layers.double()).backward()
    assert all(table.double().weight.grad is not None for table in tables.values())


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion": 3}, "expansion must be a square such as 1, 4 or 9, got 3"),
        ({"expansion": 0}, "expansion must be a square"),
        ({"key_dim": 7}, "key_dim must be even and 2 or more, for two halves; got 7"),
        ({"top_k": 65}, r"top_k \(65\) must be at most (64|16)"),
        (
            {"value_dim": 9, "scoring": TuckerScores(cores=2)},
            r"cores \(2\) must divide value_dim \(9\) into slices",
        ),
        ({"value_dim": 0}, "value_dim"),
    ],
)
def test_impossible_options_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        small(cls, **options)


def test_scoring_options_are_checked():
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        TuckerScores(rank=0)
    with pytest.raises(ValueError, match="balance_loss must be 0 or more"):
        TuckerScores(balance_loss=-1.0)


@both
@pytest.mark.parametrize("cores", [1, 2])
def test_gradients_of_parameters_are_right_where_small_changes_choose_the_same_rows(cls, cores):
    scoring = TuckerScores(cores=cores, query_per_rank=True)
    layer, x = small(cls, top_k=8, value_dim=8, scoring=scoring), normal(1, 4, 16, seed=3)
    with torch.no_grad():
        for norm in (layer.keys.query_norm, layer.keys.key_norm):
            norm.weight += 0.1 * normal(*norm.weight.shape, seed=5)
    assert layer.keys.side <= 8, "all sub-keys survive, and only the sums of pairs choose"
    best = all_scores(layer.keys, x).sum(3).flatten(-2).topk(9).values
    assert (best[..., -2] - best[..., -1]).min() > 1e-3
    assert_parameter_gradients_are_right(layer, x)
