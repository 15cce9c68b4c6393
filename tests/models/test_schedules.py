"""Schedules are functions of the step alone."""

import pytest

from mneme.models import WSD, Constant, Cosine


@pytest.mark.parametrize("schedule", [Constant(0.1), Cosine(0.1), WSD(0.1)], ids=repr)
def test_warm_up_rises_to_the_peak(schedule):
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == pytest.approx(1.0)
    assert all(0 <= rate <= 1 for rate in rates)


def test_cosine_ends_at_its_floor_and_is_half_way_in_the_middle():
    schedule = Cosine(warmup=0.0, floor=0.2)
    assert schedule(0, 100) == pytest.approx(1.0)
    assert schedule(50, 100) == pytest.approx(0.6)
    assert schedule(100, 100) == pytest.approx(0.2)
    assert schedule(500, 100) == pytest.approx(0.2)


def test_wsd_is_flat_then_falls():
    schedule = WSD(warmup=0.0, decay=0.25, floor=0.1)
    assert {schedule(step, 100) for step in range(76)} == {1.0}
    assert schedule(100, 100) == pytest.approx(0.1)
    assert schedule(99, 100) < schedule(80, 100) < 1


def test_constant_stays():
    assert {Constant(warmup=0.0)(step, 10) for step in range(20)} == {1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup=2), "warmup is a share of the run"),
        (lambda: WSD(decay=0.0), "decay is a share of the run"),
    ],
)
def test_shares_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
