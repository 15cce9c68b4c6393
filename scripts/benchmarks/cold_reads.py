"""Rates at which a bank is read that is on disk only, for the benchmark of banks."""

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from layers.memory_bank import BankShape
from models.bank import BankError, StoredBank, Tier, tier_table
from models.bank.buffers import Buffers
from models.bank.layout import PAGE
from models.bank.reading import WAYS, Direct, Pread, Reader, evict
from models.bank.tiers import block_bytes
from scripts.benchmarks import measure
from scripts.benchmarks.random_bank import DTYPE, Sizes

BAR = 0.7  # of the rate of large reads
LARGE = 32 * 2**20  # bytes of one large read
LARGE_READS = ("large reads", "")
Row = dict[str, Any]
Key = tuple[str, str]  # what is read, and how
Reading = tuple[int, Callable[[], object]]  # bytes, and a call that reads them


def measure_cold(folder: Path, sizes: Sizes) -> list[Row]:
    """Rates of reading what is not in the page cache."""
    with ExitStack() as stack:
        banks = _bank_of_each_way(folder, stack)
        calls = _cold_calls(folder, banks, sizes)
        rates: dict[Key, list[float]] = {key: [] for key in calls}
        for index in range(1 + sizes.rounds):
            for key, reads in calls.items():
                rate = _cold_rate(
                    folder, itertools.islice(reads, 1 if key == LARGE_READS else sizes.paths)
                )
                rates[key] += [rate] if index else []  # the first round also waits for memory
        chosen = stack.enter_context(closing(StoredBank(folder)))
        rows = [_cold_row(key, chosen.shape, rates) for key in rates]
        print(f"\ncold; by itself a bank reads its levels here by {chosen.ways}:")
        print(measure.table([_cold_text(row) for row in rows]))
        best = max(row["bytes_per_second"] for row in rows if row["what"] == "path")
        print(f"\n{_tier_table(folder, best, chosen)}")
    return rows


def _bank_of_each_way(folder: Path, stack: ExitStack) -> dict[str, StoredBank]:
    """Banks that keep nothing, by each way of reading that the file system allows."""
    banks: dict[str, StoredBank] = {}
    for way in WAYS:
        try:
            banks[way] = StoredBank(folder, read=way, cache_bytes=0)
        except BankError as error:
            print(f"left out: {error}")
        else:
            stack.callback(banks[way].close)
    return banks


def _cold_calls(
    folder: Path, banks: Mapping[str, StoredBank], sizes: Sizes
) -> dict[Key, Iterator[Reading]]:
    """Endless readings of random places, by what is read and how."""
    some = next(iter(banks.values()))
    layout = some.manifest.layout(some.shape.levels[-1])
    path = folder / layout.file_name
    reader: Reader = Direct(path) if "direct" in banks else Pread(path)
    calls = {LARGE_READS: _large_reads(reader, layout.file_bytes, sizes.raw)}
    for way, bank in banks.items():
        calls["path", way] = _paths(bank)
        for level in bank.shape.levels:
            calls[f"block of level {level}", way] = _blocks(bank, level)
    return calls


def _large_reads(reader: Reader, size: int, most: int) -> Iterator[Reading]:
    """One large read after another, of a file of that size."""
    into = Buffers().take(min(LARGE, size // PAGE * PAGE))
    total = min(size, most) // len(into) * len(into)

    def call(start: int) -> None:
        for offset in range(start, start + total, len(into)):
            reader.read(offset, into)

    draw = random.Random(0)
    while True:
        yield total, partial(call, PAGE * draw.randint(0, (size - total) // PAGE))


def _paths(bank: StoredBank) -> Iterator[Reading]:
    draw = random.Random(1)
    while True:
        route = torch.tensor([draw.randrange(bank.shape.leaves)])
        yield bank.shape.fetched * DTYPE.itemsize, partial(bank.fetch, route)


def _blocks(bank: StoredBank, level: int) -> Iterator[Reading]:
    draw, size = random.Random(2), block_bytes(bank.shape, DTYPE, level)
    while True:
        yield size, partial(bank.record, level, draw.randrange(bank.shape.nodes(level)))


def _cold_rate(folder: Path, readings: Iterator[Reading]) -> float:
    """Bytes per second."""
    total, seconds = 0, 0.0
    for size, call in readings:
        for path in folder.glob("*.bank"):
            evict(path)
        seconds += measure.seconds(call)
        total += size
    return total / seconds


def _cold_row(key: Key, shape: BankShape, rates: Mapping[Key, list[float]]) -> Row:
    (what, way), shares = key, ratios(rates[key], rates[LARGE_READS])
    levels = [int(what.split()[-1])] if what.startswith("block") else shape.levels
    large = min(block_bytes(shape, DTYPE, level) for level in levels) >= 2**20
    return {
        "part": "cold",
        "what": what,
        "way": way,
        "bytes_per_second": statistics.median(rates[key]),
        "spread": measure.spread(rates[key]),
        "of_large_reads": statistics.median(shares),
        "of_large_reads_spread": measure.spread(shares),
        "bar": BAR if way and large else None,
    }


def _cold_text(row: Row) -> dict[str, str]:
    return {
        "what": row["what"],
        "by": row["way"],
        "MB/s": f"{row['bytes_per_second'] / 1e6:,.0f}",
        "spread": f"{row['spread']:.0%}",
        "of large reads": f"{row['of_large_reads']:.0%}",
        "spread of it": f"{row['of_large_reads_spread']:.0%}",
        "bar": "" if row["bar"] is None else f"{row['bar']:.0%}",
    }


def _tier_table(folder: Path, disk: float, bank: StoredBank) -> str:
    """What each level costs by where it is, from the rate of whole paths at each place."""
    size, route = bank.shape.fetched * DTYPE.itemsize, torch.zeros(1, dtype=torch.long)
    with closing(StoredBank(folder, read="pread", cache_bytes=0)) as uncached:
        calls = {
            name: partial(one.fetch, route)
            for name, one in {"memory": bank, "page cache": uncached}.items()
        }
        times = measure.interleaved(calls, 9, warmup=2)
    tiers = [Tier(name, size / statistics.median(times[name])) for name in times]
    return tier_table(bank.shape, DTYPE, [*tiers, Tier("disk", disk)])


def ratios(times: list[float], references: list[float]) -> list[float]:
    """Of what was measured in the same round."""
    return [a / b for a, b in zip(times, references, strict=True)]
