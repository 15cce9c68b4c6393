"""Product-key memory and PEER against what they are made of."""

import pytest
import torch
from torch.nn import functional as F

from layers import MLP, PEER, ProductKeyMemory, TableOptions
from tests.helpers import assert_close

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


def test_heads_add_up():
    memory, x = pkm(gate="none", value_dim=8), tokens()
    scores, rows = memory.keys(x)
    weights = scores.softmax(-1)
    apart = sum(memory.values.sum_rows(rows[:, :, h], weights[:, :, h]) for h in range(2))
    assert_close(memory(x).y, apart, "heads")


def test_a_gate_of_one_and_an_identity_map_leave_the_plain_memory():
    gated, plain, x = pkm(), pkm(gate="none"), tokens()
    plain.load_state_dict(gated.state_dict(), strict=False)
    with torch.no_grad():
        gated.gate_proj = torch.nn.Linear(8, 8).double()
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


def test_heads_of_peer_search_the_same_sub_keys():
    assert peer().keys.keys.shape[0] == 1
    assert pkm().keys.keys.shape[0] == 2


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


@pytest.mark.parametrize("width", [16, 64, 256])
def test_outputs_start_at_the_scale_that_the_init_means(width):
    torch.manual_seed(0)
    x = torch.randn(4, 64, width)
    y = PEER(width, heads=4, top_k=8, sub_keys=32, table=DENSE)(x).y
    gelu = F.gelu(torch.randn(100_000)).square().mean().sqrt()
    # softmax over eight scores: between all on one row and evenly over eight
    low, high = (gelu * (4 * share / 32) ** 0.5 for share in (1 / 8, 1))
    assert low * 0.9 < y.std() < high * 1.1
