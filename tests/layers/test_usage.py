"""The usage meter against figures worked out by hand."""

import math

import pytest
import torch

from layers import PEER, ProductKeyMemory, TableOptions, Usage, metering


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
    assert figures["usage"] == figures["kl"] == figures["gini"] == 0


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
