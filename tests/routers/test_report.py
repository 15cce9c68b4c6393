"""Shares, effective numbers and agreement, by hand."""

import numpy as np
import pytest

from mneme.routers import markdown, report

DOCUMENTS = np.array([0, 0, 1, 3])
QUESTIONS = np.array([0, 1, 2, 3])


def test_occupancy_and_agreement_by_hand():
    found = report(DOCUMENTS, branching=2, depth=2, others=QUESTIONS)
    first, second = found.levels
    assert first.shares.tolist() == [0.75, 0.25]
    assert second.shares.tolist() == [0.5, 0.25, 0, 0.25]
    assert (second.used, second.largest, second.smallest) == (3, 0.5, 0)
    assert second.effective == pytest.approx(2**1.5)  # an entropy of 1.5 bits
    assert found.agreement == (0.75, 0.5)


def test_equal_shares_count_all_nodes_and_one_share_counts_one():
    assert report(np.arange(8), branching=2, depth=3).levels[2].effective == pytest.approx(8)
    alone = report(np.zeros(5, np.int64), branching=2, depth=3)
    assert [level.effective for level in alone.levels] == [1, 1, 1]
    assert alone.agreement is None


def test_the_table_has_a_row_per_level():
    text = markdown(report(DOCUMENTS, branching=2, depth=2, others=QUESTIONS))
    assert text.splitlines() == [
        "| level | nodes | used | largest share | smallest share | effective nodes | agreement |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 2 | 2 | 75.00% | 25.00% | 1.8 | 75.0% |",
        "| 2 | 4 | 3 | 50.00% | 0.00% | 2.8 | 50.0% |",
    ]
    assert "agreement" not in markdown(report(DOCUMENTS, branching=2, depth=2))


def test_what_are_no_routes_is_refused():
    with pytest.raises(ValueError, match="at least one route"):
        report(DOCUMENTS[:0], branching=2, depth=2)
    with pytest.raises(ValueError, match=r"leaf ids in 0..1, got 0..3"):
        report(DOCUMENTS, branching=2, depth=1)
    with pytest.raises(ValueError, match=r"leaf ids in 0..3, got -1..3"):
        report(DOCUMENTS, branching=2, depth=2, others=np.array([0, -1, 2, 3]))
    with pytest.raises(ValueError, match="4 routes have 3 others"):
        report(DOCUMENTS, branching=2, depth=2, others=QUESTIONS[:3])
