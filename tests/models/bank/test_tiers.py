"""What fetching blocks costs by where they are."""

import pytest
import torch

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank import Tier, fetch_seconds, tier_table

PAPER = BankShape(places=24, branching=16, hidden=(512, 128, 32, 0), width=3 * 1024)
DISK, FLASH, MEMORY = Tier("disk", 0.5e9), Tier("flash", 1e9), Tier("memory", 8e9)


@pytest.mark.parametrize(
    ("tiers", "milliseconds"),
    [
        ({1: DISK, 2: DISK, 3: DISK}, 198),
        ({1: MEMORY, 2: FLASH, 3: DISK}, 37.8),
        ({2: DISK, 3: DISK}, 47.2),
    ],
    ids=["flat", "tiered", "deeper levels only"],
)
def test_the_example_of_the_paper(tiers, milliseconds):
    seconds = fetch_seconds(PAPER, torch.bfloat16, tiers)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=2e-3)


def test_tiers_that_work_at_the_same_time_take_as_long_as_the_slowest():
    tiers = {1: MEMORY, 2: FLASH, 3: FLASH}
    both = FLASH.seconds(18_874_368) + FLASH.seconds(4_718_592)
    assert fetch_seconds(PAPER, torch.bfloat16, tiers, parallel=True) == pytest.approx(both)


def test_each_request_waits_once():
    slow = Tier("far", 1e9, seconds_per_request=0.5)
    at_once = fetch_seconds(PAPER, torch.bfloat16, {1: FLASH, 3: FLASH})
    found = fetch_seconds(PAPER, torch.bfloat16, {1: slow, 3: slow})
    assert found == pytest.approx(at_once + 1)


def test_levels_without_blocks_cannot_be_fetched():
    with pytest.raises(ValueError, match=r"level 4 has no blocks; .* are \[1, 2, 3\]"):
        fetch_seconds(PAPER, torch.bfloat16, {4: DISK})


def test_the_table_of_tiers():
    lines = tier_table(PAPER, torch.bfloat16, [DISK, MEMORY]).splitlines()
    assert lines[0] == "| level | blocks | MB of level | MB of fetch | ms, disk | ms, memory |"
    assert lines[2] == "| 1 | 16 | 1,207.96 | 75.50 | 150.99 | 9.44 |"
    assert lines[4] == "| 3 | 4,096 | 19,327.35 | 4.72 | 9.44 | 0.59 |"
    assert lines[5] == "| all | 4,368 | 25,367.15 | 99.09 | 198.18 | 12.39 |"
