"""The usage meter against figures worked out by hand."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from mneme.layers import (
    PEER,
    ProductKeyMemory,
    TableOptions,
    TuckerScores,
    UltraMem,
    Usage,
    UsageMeter,
    bind_shared_parts,
    metering,
    reads_tables,
    with_shared_tables,
)
from mneme.models import LanguageModel
from tests.helpers import LAYER_EXAMPLES, example_input, example_layer

SHARED = TableOptions(update="dense", share="facts")


def use(mass: list[float]) -> dict[str, float]:
    usage = Usage(torch.tensor([mass, mass, mass], dtype=torch.float64), tokens=1)
    return usage.metrics()


def test_even_use():
    figures = use([2.0] * 8)
    assert figures["usage"] == 100
    assert figures["kl"] == pytest.approx(0, abs=1e-12)
    assert figures["gini"] == pytest.approx(0, abs=1e-12)
    assert [figures[f"rows_{p}"] for p in (50, 90, 99)] == [4, 8, 8]


def test_a_single_row_in_use():
    figures = use([0.0, 0, 5, 0])
    assert figures["usage"] == 25
    assert figures["kl"] == pytest.approx(math.log(4))
    assert figures["gini"] == pytest.approx(3 / 4)
    assert figures["rows_99"] == 1


def test_a_histogram_worked_out_by_hand():
    # shares 1/2, 1/4, 1/4, 0: KL = log 4 - (1/2 log 2 + 1/2 log 4); the mean difference of the
    # 16 ordered pairs of shares is (2 * (1/4 * 2 + 1/2 + 1/4 * 2)) / 16 = 3/16, over twice 1/4
    figures = use([2.0, 1, 1, 0])
    assert figures["kl"] == pytest.approx(math.log(4) - 1.5 * math.log(2))
    assert figures["gini"] == pytest.approx(3 / 8)
    assert [figures[f"rows_{p}"] for p in (50, 90, 99)] == [1, 3, 3]


def test_nothing_read_gives_zeros_and_no_nan():
    figures = use([0.0, 0, 0])
    assert all(math.isfinite(value) for value in figures.values())
    assert not any(figures[name] for name in figures if name != "tokens")


def test_reads_weights_and_best_rows_are_counted_apart():
    usage = Usage.empty(5)
    rows = torch.tensor([[[3, 1]], [[3, 2]]])  # two tokens, one head, two rows
    usage.add(rows, torch.tensor([[[0.75, 0.25]], [[1.0, 0.0]]]))
    assert usage.totals.tolist() == [[0, 0.25, 0, 1.75, 0], [0, 1, 1, 2, 0], [0, 0, 0, 2, 0]]
    assert usage.tokens == 2
    assert usage.metrics()["usage"] == 40  # row 2 was read with no weight
    assert usage.metrics()["usage_top1"] == 20


def test_totals_of_two_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(50, (10, 2, 3), generator=generator)
    weights = torch.rand(10, 2, 3, generator=generator)
    parts, whole = [Usage.empty(50), Usage.empty(50)], Usage.empty(50)
    parts[0].add(rows[:4], weights[:4])
    parts[1].add(rows[4:], weights[4:])
    whole.add(rows, weights)
    torch.testing.assert_close(parts[0].totals + parts[1].totals, whole.totals)


@pytest.mark.parametrize("kind", [ProductKeyMemory, PEER])
def test_metering_changes_no_output_and_is_off_otherwise(kind):
    torch.manual_seed(0)
    layer = kind(8, heads=2, top_k=3, sub_keys=4, table=TableOptions(update="dense"))
    x = torch.randn(2, 5, 8)
    plain = layer(x).y
    with metering() as meter:
        assert torch.equal(layer(x).y, plain)
    layer(x)
    (usage,) = meter.by_layer(layer).values()
    assert usage.tokens == 10
    assert usage.totals[1].sum() == 10 * 2 * 3
    if kind is ProductKeyMemory:
        assert usage.totals[0].sum() == pytest.approx(10 * 2, rel=1e-6)  # softmax per head


@pytest.mark.parametrize(("name", "example"), LAYER_EXAMPLES)
def test_layers_that_have_a_table_report_their_reads_and_no_others(name, example):
    layer = example_layer(name, example)
    if not reads_tables(layer):
        return
    bind_shared_parts(layer)
    with torch.no_grad(), metering() as meter:
        layer(example_input(name))
    assert meter.by_layer(layer)


def test_a_meter_that_does_not_count_still_notes_who_reads():
    layer = ProductKeyMemory(8, heads=2, top_k=3, sub_keys=4)
    meter = UsageMeter()
    meter.counting = False
    with metering(meter):
        layer(torch.randn(2, 5, 8))
    (usage,) = meter.by_layer(layer).values()
    assert usage.totals.shape == (3, 16)
    assert not usage.totals.any()
    assert usage.tokens == 0


def read(model: nn.Module, x: torch.Tensor) -> dict[str, Usage]:
    with torch.no_grad(), metering() as meter:
        model(x)
    return meter.by_layer(model)


def test_a_shared_table_has_an_entry_that_sums_those_of_its_readers():
    torch.manual_seed(0)
    memory = partial(ProductKeyMemory, heads=2, top_k=3, sub_keys=4)
    pattern = [[partial(memory, table=SHARED), partial(memory, table=TableOptions())]]
    model = LanguageModel(8, vocab_size=11, n_layers=2, pattern=pattern)
    layers = read(model, torch.randint(11, (2, 5)))
    assert len(layers) == 4
    every = with_shared_tables(model, layers)
    assert set(every) - set(layers) == {"tables.facts"}
    table, readers = every["tables.facts"], [u for n, u in layers.items() if "parts.0.parts" in n]
    assert table.tokens == 10
    assert torch.equal(table.totals, readers[0].totals + readers[1].totals)
    assert table.totals[1].sum() == 2 * 10 * 2 * 3


def test_a_layer_with_two_shared_tables_has_two_entries():
    layer = PEER(8, heads=2, top_k=3, sub_keys=4, table=SHARED)
    bind_shared_parts(layer)
    usage = with_shared_tables(layer, read(layer, torch.randn(2, 5, 8)))
    assert set(usage) == {"", "tables.facts_down", "tables.facts_up"}
    assert torch.equal(usage["tables.facts_up"].totals, usage[""].totals)


def test_readers_that_cut_a_table_into_values_of_two_sizes_meet_in_its_rows():
    """16 rows of width 4: 16 values of one reader, 4 values of four slices of the other."""
    torch.manual_seed(0)
    options = TableOptions(update="dense", share="facts")
    whole = UltraMem(
        8, top_k=2, sub_keys=4, value_dim=4, table=options, scoring=TuckerScores(cores=1)
    )
    sliced = UltraMem(
        8, top_k=2, sub_keys=2, value_dim=16, table=options, scoring=TuckerScores(cores=4)
    )
    both = nn.Sequential(whole, sliced)
    bind_shared_parts(both)
    with torch.no_grad(), metering() as meter:
        for layer in both:
            layer(torch.randn(1, 3, 8))
    layers = meter.by_layer(both)
    table = with_shared_tables(both, layers)["tables.facts"]
    values = layers["1"].totals[1]
    assert len(values) == 4
    expected = layers["0"].totals[1] + torch.tensor([values[row // 4] for row in range(16)])
    assert torch.equal(table.totals[1], expected)
