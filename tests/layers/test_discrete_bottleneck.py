"""What is particular to the discrete key-value bottleneck."""

import pytest
import torch

from mneme.layers import DiscreteKeyValueBottleneck, TableOptions, metering
from mneme.layers.sparse import discrete_bottleneck as module
from tests.helpers import assert_close

D = 12
DENSE = TableOptions(update="dense")


def bottleneck(dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = {"codebooks": 4, "keys": 6, "key_dim": 3, "table": DENSE}
    layer = DiscreteKeyValueBottleneck(D, **{**sizes, **options}).to(dtype)
    torch.nn.init.normal_(layer.values.weight)
    return layer


def inputs(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64).to(dtype)


def buffers(layer):
    return {name: tensor.clone() for name, tensor in layer.named_buffers()}


def codes_one_by_one(layer, x):
    """`[N, H]`, by the distances themselves."""
    projections = layer.projection.unflatten(0, (layer.codebooks, -1))
    return torch.stack(
        [
            torch.cdist(x @ r.T, keys).argmin(-1)
            for r, keys in zip(projections, layer.codebook, strict=True)
        ],
        dim=-1,
    )


@pytest.mark.parametrize("block", [1, 50, 1300, 2**20])
def test_codes_are_the_nearest_keys(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    layer, x = bottleneck(), inputs(100)
    codes = layer.codes(x)
    assert torch.equal(codes, codes_one_by_one(layer, x))
    assert torch.equal(layer.codes(x.view(4, 25, D)), codes.view(4, 25, 4))


def test_what_is_read_is_the_mean_of_the_values_under_them():
    layer, x = bottleneck(), inputs(2, 9)
    codes, table = layer.codes(x), layer.values.weight.view(4, 6, D)
    expected = sum(table[c, codes[..., c]] for c in range(4)) / 4
    assert_close(layer.read(x), expected, "read")
    assert torch.equal(layer(x).y, layer.read(x))


def test_narrow_values_are_projected():
    layer, x = bottleneck(value_dim=5), inputs(2, 9)
    assert layer.read(x).shape == (2, 9, 5)
    assert_close(layer(x).y, layer.out_proj(layer.read(x)), "output")


def test_at_the_start_projections_have_unit_norm_and_nothing_is_read():
    torch.manual_seed(0)
    layer = DiscreteKeyValueBottleneck(D)
    torch.testing.assert_close(layer.projection.norm(dim=-1), torch.ones(64 * 8))
    assert not layer.read(inputs(5).float()).any()


# Two phases.


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_values_moves_nothing_else(training):
    layer, x = bottleneck(value_dim=5).train(training), inputs(20, 3)
    before = buffers(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.3)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).y.square().sum().backward()
        optimizer.step()
    assert set(before) == {"projection", "codebook", "sizes", "sums"}
    for name, tensor in layer.named_buffers():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad
    assert {name for name, _ in layer.named_parameters()} == {"values.weight", "out_proj.weight"}


def test_no_gradient_passes_to_the_input():
    layer, x = bottleneck(), inputs(2, 5).requires_grad_()
    layer(x).y.square().sum().backward()
    assert not x.grad.any()


def test_learning_something_writes_only_the_rows_it_is_nearest_to():
    layer, new = bottleneck(), inputs(1, 3)
    before = layer.values.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.3)
    layer(new).y.sub(1).square().sum().backward()
    optimizer.step()
    hit = torch.zeros(4, 6, dtype=torch.bool)
    for token in layer.codes(new)[0]:
        hit[torch.arange(4), token] = True
    changed = (layer.values.weight != before).any(-1).view(4, 6)
    assert torch.equal(changed, hit)
    old = inputs(200, seed=2)
    apart = ~hit[torch.arange(4), layer.codes(old)].any(-1)
    assert apart.sum() > 5
    read = layer.read(old)
    with torch.no_grad():
        layer.values.weight.copy_(before)
    assert torch.equal(read[apart], layer.read(old)[apart])
    assert not torch.equal(read, layer.read(old))


# Placing keys.


def plane(**options):
    """Two keys on a line, at -1 and 1, each with a history of two queries."""
    layer = bottleneck(codebooks=1, keys=2, key_dim=1, **options)
    layer.projection.copy_(torch.eye(D)[:1])
    layer.codebook.copy_(torch.tensor([[[-1.0], [1.0]]]))
    layer.sizes.copy_(torch.tensor([[2.0, 2.0]]))
    layer.sums.copy_(torch.tensor([[[-2.0], [2.0]]]))
    return layer


def on_the_line(*places):
    x = inputs(len(places))
    x[:, 0] = torch.tensor(places)
    return x


def test_a_step_of_the_averages_by_hand():
    layer = plane()
    layer.update_keys(on_the_line(3.0, 0.5, -2.0), decay=0.9)
    assert layer.sizes[0].tolist() == pytest.approx([1.8 + 0.1, 1.8 + 0.2])
    assert layer.sums[0, :, 0].tolist() == pytest.approx([-1.8 - 0.2, 1.8 + 0.35])
    smooth = 3.9 / (3.9 + 2e-5)
    expected = [-2.0 / ((1.9 + 1e-5) * smooth), 2.15 / ((2.0 + 1e-5) * smooth)]
    assert layer.codebook[0, :, 0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "dead"), [(0.19, True), (0.21, False)])
def test_only_keys_below_the_threshold_are_replaced(size, dead):
    layer, x = plane(), on_the_line(0.9, 0.8, 1.1, 1.2)
    layer.sizes[0, 0], layer.sums[0, 0] = size / 0.95, -size / 0.95
    layer.update_keys(x)  # the threshold is 0.1 * 4 / 2
    key = layer.codebook[0, 0].item()
    if dead:
        assert key in x[:, 0].tolist()
        assert layer.sizes[0, 0].item() == pytest.approx(0.2)
        assert layer.sums[0, 0].item() == pytest.approx(0.2 * key)
    else:
        assert key == pytest.approx(-1, abs=1e-3)
    assert layer.codebook[0, 1].item() == pytest.approx((1.9 + 0.2) / (1.9 + 0.2), abs=1e-3)


def test_a_key_that_never_had_a_query_can_stay():
    layer = bottleneck(keys=50)
    before = layer.codebook.clone()
    x = inputs(10)
    hit = torch.zeros(4, 50, dtype=torch.bool).scatter(1, layer.codes(x).T, True)
    layer.update_keys(x, reseed_below=0)
    assert torch.equal((layer.codebook != before).any(-1), hit)


def test_replacements_follow_the_generator():
    x = inputs(100)
    placed = []
    for seed in (0, 0, 1):
        layer = bottleneck()
        torch.manual_seed(len(placed))  # the global one has no part in it
        layer.update_keys(x, generator=torch.Generator().manual_seed(seed))
        placed.append(layer.codebook)
    assert torch.equal(placed[0], placed[1])
    assert not torch.equal(placed[0], placed[2])


def test_updates_find_clusters_and_use_all_keys():
    generator = torch.Generator().manual_seed(0)
    centers = inputs(6, seed=3) + 5  # far from where keys start
    layer = bottleneck(keys=16)
    for _ in range(150):
        pick = torch.randint(6, (64,), generator=generator)
        noise = torch.randn(64, D, generator=generator, dtype=torch.float64)
        x = centers[pick] + 0.1 * noise
        layer.update_keys(x, generator=generator)
    codes = layer.codes(x)
    q = (x @ layer.projection.T).unflatten(-1, (4, 3))
    nearest = layer.codebook[torch.arange(4), codes]
    assert (q - nearest).square().sum(-1).mean() < 2 * 0.1**2 * 3
    used = torch.zeros(4, 16, dtype=torch.bool).scatter(1, codes.T, True)
    assert used.double().mean() > 0.8


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_an_empty_batch_moves_nothing(shape):
    layer = bottleneck()
    layer.update_keys(inputs(50))
    before = buffers(layer)
    layer.update_keys(inputs(*shape))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())


def test_a_bf16_layer_computes_its_keys_in_fp32():
    half, wide = (bottleneck(torch.float32).bfloat16() for _ in range(2))
    wide, x = wide.float(), inputs(1000, dtype=torch.bfloat16)
    for layer, batch in ((half, x), (wide, x.float())):
        layer.update_keys(batch, generator=torch.Generator().manual_seed(0))
    for name, tensor in buffers(wide).items():
        assert torch.equal(getattr(half, name), tensor.bfloat16()), name


def test_keys_and_their_averages_are_saved():
    layer = bottleneck()
    layer.update_keys(inputs(50))
    other = bottleneck()
    other.load_state_dict(layer.state_dict())
    x = inputs(30, seed=4)
    assert torch.equal(other.read(x), layer.read(x))
    for one in (layer, other):
        one.update_keys(x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.codebook, layer.codebook)


# Precision, costs, errors.


def test_codes_are_found_in_full_precision():
    layer, x = bottleneck(torch.float32, keys=200), inputs(500, dtype=torch.float32)
    exact = layer.codes(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.codes(x), exact)
    half = bottleneck(torch.float32, keys=200).bfloat16()
    wide = bottleneck(torch.float32, keys=200).bfloat16().float()
    assert torch.equal(half.codes(x.bfloat16()), wide.codes(x.bfloat16().float()))


def test_what_is_not_finite_is_seen():
    layer, x = bottleneck(), inputs(2, 3)
    x[0, 1, 4] = float("nan")
    y = layer(x).y
    assert y[0, 1].isnan().any()
    assert y[0, [0, 2]].isfinite().all()
    assert y[1].isfinite().all()


def test_reads_are_metered():
    layer, x = bottleneck(), inputs(2, 40)
    with metering() as meter:
        layer(x)
    usage = meter.by_layer(layer)[""]
    rows = layer.codes(x) + 6 * torch.arange(4)
    counts = torch.bincount(rows.flatten(), minlength=24).double()
    assert torch.equal(usage.totals[1], counts)
    assert usage.tokens == 80


def test_active_parameters_are_a_row_of_each_codebook():
    assert bottleneck().active_parameters() == 4 * D
    assert bottleneck(value_dim=5).active_parameters() == 4 * 5 + 5 * D


@pytest.mark.parametrize("option", ["codebooks", "keys", "key_dim", "value_dim"])
def test_errors_say_what_is_wrong(option):
    with pytest.raises(ValueError, match=f"{option} must be 1 or more, got 0"):
        bottleneck(**{option: 0})
