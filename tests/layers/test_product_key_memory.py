"""Product-key memory and PEER against what they are made of."""

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mneme.layers import MLP, PEER, ProductKeyMemory, TableOptions
from tests.helpers import assert_close, assert_parameter_gradients_are_right, mean_square

ROOT = Path(__file__).parents[2]
DENSE = TableOptions(update="dense")


def pkm(**options) -> ProductKeyMemory:
    torch.manual_seed(0)
    given = {"heads": 2, "top_k": 3, "sub_keys": 5, "table": DENSE} | options
    return ProductKeyMemory(8, **given).double()


def peer(**options) -> PEER:
    torch.manual_seed(0)
    given = {"heads": 2, "top_k": 3, "sub_keys": 5, "table": DENSE} | options
    return PEER(8, **given).double()


def tokens(batch: int = 2, length: int = 6):
    return torch.randn(
        batch, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def test_all_rows_kept_is_attention_over_all_rows():
    memory, x = pkm(top_k=25, gate="none", query_norm="none"), tokens()
    q = memory.keys.query_proj(x).unflatten(-1, (2, 2, -1))
    halves = torch.einsum("bthsk,hsnk->bthsn", q, memory.keys.keys)
    scores = (halves[..., 0, :, None] + halves[..., 1, None, :]).flatten(-2)
    expected = (scores.softmax(-1) @ memory.values.weight).sum(2)
    assert_close(memory(x).y, expected, "attention over all rows")


@pytest.mark.parametrize("half", [0, 1])
def test_permuting_the_sub_keys_of_a_half_and_the_rows_changes_nothing(half):
    memory, x = pkm(), tokens()
    before = memory(x).y
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    grid = memory.values.weight.unflatten(0, (5, 5)).index_select(half, order)
    with torch.no_grad():
        memory.keys.keys[:, half] = memory.keys.keys[:, half][:, order]
        memory.values.weight.copy_(grid.flatten(0, 1))
    assert_close(memory(x).y, before, "permuted", 1e-12)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_swapping_the_halves_and_transposing_the_grid_of_rows_changes_nothing(norm):
    memory, x = pkm(query_norm=norm), tokens()
    _perturb(memory)
    before, rows = memory(x).y, memory.keys(x).rows
    with torch.no_grad():
        for map_to_queries in memory.keys.query_proj.parameters():
            halves = map_to_queries.unflatten(0, (2, 2, -1))
            map_to_queries.copy_(halves.flip(1).flatten(0, 2))
        memory.keys.keys.copy_(memory.keys.keys.flip(1))
        grid = memory.values.weight.unflatten(0, (5, 5))
        memory.values.weight.copy_(grid.transpose(0, 1).flatten(0, 1))
    assert torch.equal(memory.keys(x).rows, rows % 5 * 5 + rows // 5)
    assert_close(memory(x).y, before, "swapped", 1e-12)


@pytest.mark.parametrize("top_k", [1, 3])
def test_which_of_two_tied_rows_wins_does_not_matter_if_their_values_are_equal(top_k):
    memory, x = pkm(top_k=top_k), tokens(length=20)
    outputs, chosen = [], []
    with torch.no_grad():
        grid = memory.values.weight.unflatten(0, (5, 5))
        grid[3] = grid[1]
        for factor in (1, 1 + 1e-9, 1 - 1e-9):  # tied, and the tie broken for either
            memory.keys.keys[:, 0, 3] = factor * memory.keys.keys[:, 0, 1]
            outputs.append(memory(x).y)
            chosen.append(memory.keys(x).rows.sort().values)
    assert (chosen[0].diff() > 0).all(), "a tied row was read twice"
    assert not torch.equal(chosen[1], chosen[2]), "nothing was tied at the k-th place"
    for y in outputs[1:]:
        assert_close(y, outputs[0], "output of another winner", 1e-7)


@pytest.mark.parametrize("make", [partial(pkm, gate="none"), peer], ids=["pkm", "peer"])
def test_heads_called_one_by_one_add_up(make):
    layer, x = make(), tokens()
    _perturb(layer)
    whole, apart = layer.state_dict(), []
    for head in range(2):
        one = make(heads=1)
        own = {
            "keys.query_proj.weight": whole["keys.query_proj.weight"].chunk(2)[head],
            "keys.query_proj.bias": whole["keys.query_proj.bias"].chunk(2)[head],
        }
        if isinstance(layer, ProductKeyMemory):
            own["keys.keys"] = whole["keys.keys"][head : head + 1]
        one.load_state_dict(whole | own)
        apart.append(one(x).y)
    assert_close(layer(x).y, apart[0] + apart[1], "heads", 1e-12)
    assert not torch.allclose(apart[0], apart[1])


@pytest.mark.parametrize(("make", "alike"), [(peer, True), (pkm, False)], ids=["peer", "pkm"])
def test_heads_that_ask_the_same_find_the_same_only_if_they_share_sub_keys(make, alike):
    layer, x = make(), tokens()
    with torch.no_grad():
        layer.keys.query_proj.weight.copy_(layer.keys.query_proj.weight.chunk(2)[0].repeat(2, 1))
        layer.keys.query_proj.bias.copy_(layer.keys.query_proj.bias.chunk(2)[0].repeat(2))
    first, second = layer.keys(x).rows.unbind(2)
    assert torch.equal(first, second) == alike


def test_a_gate_of_one_and_an_identity_map_leave_the_plain_memory():
    gated, plain, x = pkm(), pkm(gate="none"), tokens()
    plain.load_state_dict(gated.state_dict(), strict=False)
    with torch.no_grad():
        gated.gate_proj.weight.zero_()
        gated.gate_proj.bias.fill_(1.2784645427610738)  # silu of it is one
        gated.out_proj.weight.copy_(torch.eye(8))
    assert_close(gated(x).y, plain(x).y, "plain", 1e-9)


def test_a_closed_gate_adds_nothing_and_a_new_one_a_little():
    memory, x = pkm(gate="sigmoid"), tokens()
    ungated = memory.out_proj(memory.values.sum_rows(*_lookups(memory, x)))
    assert_close(memory(x).y, ungated * torch.sigmoid(torch.tensor(-2.0).double()), "new")
    with torch.no_grad():
        memory.gate_proj.bias.fill_(-torch.inf)
    assert not memory(x).y.any()


def _lookups(memory, x):
    scores, rows = memory.keys(x)
    return rows.flatten(2), scores.softmax(-1).flatten(2)


def test_rows_that_no_token_reads_have_no_gradient_and_others_the_weighted_sum():
    memory, x = pkm(gate="none"), tokens()
    scores, rows = memory.keys(x)
    memory(x).y.backward(g := torch.randn_like(x))
    weights = scores.softmax(-1).detach()
    expected = torch.zeros_like(memory.values.weight)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in rows.shape)).tolist():
        b, t, h, j = place
        expected[rows[b, t, h, j]] += weights[b, t, h, j] * g[b, t]
    assert_close(memory.values.weight.grad, expected, "gradient of the values")
    assert (memory.values.weight.grad.abs().sum(1) == 0).any()


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_training_does_not_mix_tokens_without_batch_norm(norm):
    memory, x = pkm(query_norm=norm).train(), tokens()
    changed = x.clone()
    changed[0, 3] += 1
    assert torch.equal(memory(x).y[0, :3], memory(changed).y[0, :3])


def test_batch_norm_mixes_tokens_in_training_and_not_in_evaluation():
    memory, x = pkm(query_norm="batch"), tokens()
    changed = x.clone()
    changed[0, 3] += 10
    memory.train()
    assert not torch.equal(memory(x).y[0, :3], memory(changed).y[0, :3])
    memory.eval()
    assert torch.equal(memory(x).y[0, :3], memory(changed).y[0, :3])


def test_selection_under_autocast_is_that_of_fp32():
    memory, x = pkm().float(), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = memory.keys(x)
    assert mixed.scores.dtype == torch.float32
    assert torch.equal(mixed.rows, memory.keys(x).rows)


def test_peer_with_one_expert_a_head_is_an_mlp_of_the_chosen_neurons():
    layer, x = peer(top_k=1), tokens(1, 1)
    rows = layer.keys(x).rows.flatten()
    mlp = MLP(8, expand=2 / 8).double()
    with torch.no_grad():
        mlp.in_proj.weight.copy_(layer.down.weight[rows])
        mlp.out_proj.weight.copy_(layer.up.weight[rows].T)
    assert_close(layer(x).y, mlp(x).y, "an MLP of two neurons")


def test_peer_whose_neurons_are_all_one_is_a_product_key_memory():
    layer, x = peer(activation="identity"), tokens(1, 1)
    with torch.no_grad():
        layer.down.weight.copy_((x[0, 0] / x[0, 0].square().sum()).expand(25, -1))
    scores, rows = layer.keys(x)
    expected = layer.up.sum_rows(rows.flatten(2), scores.softmax(-1).flatten(2))
    assert_close(layer(x).y, expected, "a product-key memory")


@pytest.mark.parametrize(
    "make",
    [pkm, peer, *(partial(pkm, gate=gate, scores="relu") for gate in ("sigmoid", "none"))],
    ids=["pkm", "peer", "one gate, relu", "no gate, relu"],
)
def test_gradients_of_parameters_are_right_where_small_changes_choose_the_same_rows(make):
    layer, x = make(), tokens(1, 4)
    _perturb(layer)
    assert _least_margin(layer.keys, x) > 1e-3
    assert_parameter_gradients_are_right(layer, x)


def _perturb(layer) -> None:
    """Takes biases and norms off the start, at which they do nothing."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def _least_margin(keys, x) -> float:
    """How much worse the best row that is not read is than the worst that is; the closest case."""
    more = copy.deepcopy(keys)
    more.top_k += 1
    scores = more(x).scores
    return (scores[..., -2] - scores[..., -1]).min().item()


@pytest.mark.parametrize("query_norm", ["none", "layer", "batch"])
def test_rows_are_the_same_every_time(query_norm):
    memory, x = pkm(query_norm=query_norm, sub_keys=64, top_k=32), tokens(4, 64)
    first = memory.keys(x)
    for _ in range(9):
        again = memory.keys(x)
        assert torch.equal(again.rows, first.rows)
        assert torch.equal(again.scores, first.scores)


COMPILED = """
import torch
from torch._dynamo.utils import counters
from mneme.layers import ProductKeyMemory

keys = ProductKeyMemory(16, heads=2, top_k=3, sub_keys=4).keys
compiled = torch.compile(keys, backend="eager", dynamic=True, fullgraph=True)
for batch in (2, 3, 5, 9):
    x = torch.randn(batch, 7, 16)
    assert torch.equal(compiled(x).rows, keys(x).rows)
    print(counters["stats"]["unique_graphs"])
"""


def test_selection_is_compiled_once_for_all_batch_sizes():
    # alone, as reads of a table are not compiled; in a process without the checks of shapes
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 26}, r"top_k \(26\) must be at most the rows there are, sub_keys\^2 = 25"),
        ({"key_dim": 5}, "key_dim must be even"),
    ],
)
def test_what_cannot_be_built_says_why(options, message):
    for make in (pkm, peer):
        with pytest.raises(ValueError, match=message):
            make(**options)


SIZES = {"heads": 4, "top_k": 8, "sub_keys": 32}


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (partial(ProductKeyMemory, gate="silu"), 32),  # the bound counts both halves
        (partial(ProductKeyMemory, gate="none"), 16),  # and here one
        (partial(ProductKeyMemory, gate="sigmoid"), 16),
        (PEER, 16),
    ],
    ids=["memory+", "product keys", "one gate", "peer"],
)
def test_keys_and_queries_start_as_in_the_published_code(make, width):
    torch.manual_seed(0)
    keys = make(48, heads=4, top_k=4, sub_keys=100, key_dim=32, table=DENSE).keys
    for parameter, inputs in ((keys.keys, width), (keys.query_proj.bias, 48)):
        bound = inputs**-0.5
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert keys.query_proj.weight.abs().max().item() == pytest.approx((6 / (48 + 128)) ** 0.5, 0.01)


def test_only_the_gated_output_has_biases():
    names = {name for name, _ in pkm().named_parameters()}
    assert {"gate_proj.bias", "out_proj.bias"} <= names
    names = {name for name, _ in pkm(gate="none", value_dim=6).named_parameters()}
    assert "out_proj.weight" in names
    assert "out_proj.bias" not in names


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("cls", [ProductKeyMemory, PEER])
def test_outputs_start_at_the_scale_that_the_init_means(cls, width):
    """Rows are independent, so the squares of their weights add up, over a head and over heads."""
    torch.manual_seed(0)
    if cls is ProductKeyMemory:
        rows = SIZES["heads"] * _sum_of_squared_weights(1 / 6)
        expected = rows / width * mean_square(F.silu)  # of a row's entries, and of the gate
    else:
        rows = SIZES["heads"] * _sum_of_squared_weights(1 / 3)
        expected = rows / (SIZES["heads"] * SIZES["top_k"]) * mean_square(F.gelu)
    x = torch.randn(4, 64, width)
    with torch.no_grad():
        squares = [cls(width, table=DENSE, **SIZES)(x).y.square().mean() for _ in range(6)]
    assert torch.stack(squares).mean().sqrt().item() == pytest.approx(expected**0.5, rel=0.1)


def _sum_of_squared_weights(variance: float) -> float:
    """Of one head, from the variance of a normalized half of a query times a sub-key."""
    first, second = torch.randn(2, 2000, SIZES["sub_keys"]) * variance**0.5
    sums = first[:, :, None] + second[:, None]
    kept = sums.flatten(1).topk(SIZES["top_k"]).values
    return kept.softmax(-1).square().sum(-1).mean().item()
