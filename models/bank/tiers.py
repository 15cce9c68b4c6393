"""What fetching costs by where blocks are: in memory, on a fast disk, on a slow one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from mneme.layers.bank.memory_bank import BankShape


@dataclass(frozen=True)
class Tier:
    """A place where blocks can be.

    Attributes:
        name: for tables.
        bytes_per_second: of one block that is read.
        seconds_per_request: that pass before its first byte.
    """

    name: str
    bytes_per_second: float
    seconds_per_request: float = 0.0

    def seconds(self, size: int) -> float:
        """Of reading one block of that many bytes."""
        return size / self.bytes_per_second + self.seconds_per_request


def fetch_seconds(
    shape: BankShape, dtype: torch.dtype, tiers: Mapping[int, Tier], *, parallel: bool = False
) -> float:
    """Predicted time to fetch the blocks of one route.

        t = sum_l (bytes_l / bandwidth_l + latency_l)

    Args:
        shape: of the bank.
        dtype: of its elements as they are stored.
        tiers: where each level is that has to be read; leave out those that do not change.
        parallel: tiers work at the same time, and the slowest one's sum counts; by default
            they wait for each other, as in the example of arXiv 2510.02375.

    Raises:
        ValueError: a level has no blocks.
    """
    sums: dict[str, float] = {}
    for level, tier in tiers.items():
        if level not in shape.levels:
            raise ValueError(f"level {level} has no blocks; levels with blocks are {shape.levels}")
        seconds = tier.seconds(block_bytes(shape, dtype, level))
        sums[tier.name] = sums.get(tier.name, 0.0) + seconds
    return max(sums.values(), default=0.0) if parallel else sum(sums.values())


def block_bytes(shape: BankShape, dtype: torch.dtype, level: int) -> int:
    """Of one block of a level."""
    return prod(shape.record(level)) * dtype.itemsize


def tier_table(shape: BankShape, dtype: torch.dtype, tiers: Sequence[Tier]) -> str:
    """A Markdown table: sizes of each level, and milliseconds to fetch its block from each tier.

    Args:
        shape: of the bank.
        dtype: of its elements as they are stored.
        tiers: a column each, in this order.
    """
    heads = ["level", "blocks", "MB of level", "MB of fetch", *(f"ms, {t.name}" for t in tiers)]
    rows = [heads, ["---:"] * len(heads)]
    sizes = {level: block_bytes(shape, dtype, level) for level in shape.levels}
    for level, size in sizes.items():
        nodes = shape.nodes(level)
        counts = [str(level), f"{nodes:,}", _mb(nodes * size), _mb(size)]
        rows.append(counts + [f"{1e3 * tier.seconds(size):.2f}" for tier in tiers])
    blocks = sum(map(shape.nodes, sizes))
    total = sum(shape.nodes(level) * size for level, size in sizes.items())
    times = [fetch_seconds(shape, dtype, dict.fromkeys(sizes, tier)) for tier in tiers]
    rows.append(["all", f"{blocks:,}", _mb(total), _mb(sum(sizes.values()))])
    rows[-1] += [f"{1e3 * seconds:.2f}" for seconds in times]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f}"
