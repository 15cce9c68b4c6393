"""Rates at which a bank is read that is on disk only, for the benchmark of banks.

Before each reading the files are taken out of this machine's page cache. What lies further on keeps
what it has: a disk's own memory, or the host of a virtual machine. So no two ways of reading, and
no two rounds, read the same random places, and each round begins with another way. A level that is
small cannot be cold there all the same, as all of its blocks are read again and again.
"""

import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank import StoredBank, Tier, tier_table
from mneme.models.bank.tiers import block_bytes
from mneme.storage.buffers import Buffers
from mneme.storage.fetching import READERS
from mneme.storage.files import StorageError
from mneme.storage.generations import file_name
from mneme.storage.reading import Direct, Pread, Read, Reader, evict
from mneme.storage.record_file import PAGE
from scripts.benchmarks import measure
from scripts.benchmarks.random_bank import DTYPE, BankSizes

BAR = 0.7  # of the rate of large reads
LARGE = 32 * 2**20  # bytes of one large read
LARGE_READS = "large reads"
THREADS = {"1 thread": 1, f"{READERS + 1} threads": READERS + 1}  # a bank's, and the one that waits
CHOSEN: Read = "auto"
Row = dict[str, Any]
Key = tuple[str, str]  # what is read, and how
Rates = Mapping[Key, list[float]]  # bytes per second of each round
Reading = tuple[int, Callable[[], object]]  # bytes, and a call that reads them
Readings = Callable[[random.Random], Iterator[Reading]]  # endless, of places that are drawn


def measure_cold(folder: Path, sizes: BankSizes) -> list[Row]:
    """Rates of reading what is not in the page cache."""
    with ExitStack() as stack:
        banks = _bank_of_each_way(folder, stack)
        rates = _cold_rates(folder, _calls(folder, banks, sizes, stack), sizes)
        chosen = banks[CHOSEN]
        rows = [_cold_row(key, chosen.shape, rates) for key in rates]
        print(f"\ncold; {CHOSEN} reads the levels here by {chosen.ways}:")
        print(measure.table([_cold_text(row) for row in rows]))
        (disk,) = (r["bytes_per_second"] for r in rows if (r["what"], r["way"]) == ("path", CHOSEN))
        print(f"\n{_tier_table(folder, disk)}")
    return rows


def _bank_of_each_way(folder: Path, stack: ExitStack) -> dict[str, StoredBank]:
    """Banks that keep nothing, by each way of reading that the file system allows."""
    banks: dict[str, StoredBank] = {}
    for way in get_args(Read):
        try:
            banks[way] = StoredBank(folder, read=way, cache_bytes=0)
        except StorageError as error:
            print(f"left out: {error}")
        else:
            stack.callback(banks[way].close)
    return banks


def _calls(
    folder: Path, banks: Mapping[str, StoredBank], sizes: BankSizes, stack: ExitStack
) -> list[dict[Key, Readings]]:
    """Readings by what is read and how; one group of them is large reads, and one each way."""
    shape = banks[CHOSEN].shape
    file = folder / file_name(shape.levels[-1], banks[CHOSEN].manifest.generation)
    reader: Reader = Direct(file) if "direct" in banks else Pread(file)
    stack.callback(reader.close)
    groups: list[dict[Key, Readings]] = [{}]
    for name, threads in THREADS.items():
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        large = _LargeReads(reader, file.stat().st_size, sizes.raw, pool, threads)
        groups[0][LARGE_READS, name] = large.readings
    for way, bank in banks.items():
        groups.append({("path", way): partial(_paths, bank)})
        for level in shape.levels:
            groups[-1][f"block of level {level}", way] = partial(_blocks, bank, level)
    return groups


class _LargeReads:
    """One large read after another of a file, by threads that each take the next in turn.

    Args:
        reader: of the file.
        size: bytes of it.
        most: bytes that are read, at most.
        pool: of the threads.
        threads: how many there are.
    """

    def __init__(
        self, reader: Reader, size: int, most: int, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        self.size, self.pool, self.reader = size, pool, reader
        self.step = min(LARGE, size, most) // PAGE * PAGE
        self.total = min(size, most) // self.step * self.step
        self.into = [Buffers().take(self.step) for _ in range(threads)]

    def readings(self, draw: random.Random) -> Iterator[Reading]:
        """From places that are drawn."""
        while True:
            start = PAGE * draw.randint(0, (self.size - self.total) // PAGE)
            yield self.total, partial(self.read, start)

    def read(self, start: int) -> None:
        """All that is to be read from there."""
        list(self.pool.map(partial(self._part, start), range(len(self.into))))

    def _part(self, start: int, thread: int) -> None:
        every = self.step * len(self.into)
        for offset in range(start + thread * self.step, start + self.total, every):
            self.reader.read(offset, self.into[thread])


def _paths(bank: StoredBank, draw: random.Random) -> Iterator[Reading]:
    while True:
        route = torch.tensor([draw.randrange(bank.shape.leaves)])
        yield bank.shape.fetched * DTYPE.itemsize, partial(bank.fetch, route)


def _blocks(bank: StoredBank, level: int, draw: random.Random) -> Iterator[Reading]:
    size = block_bytes(bank.shape, DTYPE, level)
    while True:
        yield size, partial(bank.record, level, draw.randrange(bank.shape.nodes(level)))


def _cold_rates(folder: Path, groups: list[dict[Key, Readings]], sizes: BankSizes) -> Rates:
    """Of each round but the first, which also waits for memory."""
    rates: dict[Key, list[float]] = {key: [] for group in groups for key in group}
    order = deque(groups)
    for index in range(1 + sizes.rounds):
        for key, readings in ((key, group[key]) for group in order for key in group):
            count = 1 if key[0] == LARGE_READS else sizes.paths
            places = random.Random(f"{key} {index}")
            rate = _cold_rate(folder, islice(readings(places), count))
            rates[key] += [rate] if index else []
        order.rotate(-1)
    return rates


def _cold_rate(folder: Path, readings: Iterable[Reading]) -> float:
    """Bytes per second."""
    total, seconds = 0, 0.0
    for size, call in readings:
        for path in folder.glob("*.bank"):
            evict(path)
        seconds += measure.seconds(call)
        total += size
    return total / seconds


def _cold_row(key: Key, shape: BankShape, rates: Rates) -> Row:
    """Rates of one key, and their share of those of large reads by the better count of threads."""
    what, way = key
    shares = ratios(rates[key], max(_raw(rates), key=statistics.median))
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
        "bar": BAR if what != LARGE_READS and large else None,
    }


def _raw(rates: Rates) -> list[list[float]]:
    return [values for (what, _), values in rates.items() if what == LARGE_READS]


def _cold_text(row: Row) -> dict[str, str]:
    rate = f"{row['bytes_per_second'] / 1e6:,.0f}"
    return text(row, {"by": row["way"], "MB/s": rate}, "of large reads")


def text(row: Row, own: Mapping[str, str], share: str) -> dict[str, str]:
    """A line of a table: what was measured, columns of its own, and its share of a reference."""
    key = share.replace(" ", "_")
    return {
        "what": row["what"],
        **own,
        "spread": f"{row['spread']:.0%}",
        share: f"{row[key]:.1%}",
        "spread of it": f"{row[f'{key}_spread']:.0%}",
        "bar": "" if row["bar"] is None else f"{row['bar']:.0%}",
    }


def _tier_table(folder: Path, disk: float) -> str:
    """What each level costs by where it is, from the rate of whole paths at each place."""
    route = torch.zeros(1, dtype=torch.long)
    with (
        closing(StoredBank(folder, read="pread")) as bank,
        closing(StoredBank(folder, read="pread", cache_bytes=0)) as uncached,
    ):
        calls = {
            name: partial(one.fetch, route)
            for name, one in {"memory": bank, "page cache": uncached}.items()
        }
        times = measure.interleaved(calls, 9, warmup=2)
        size = bank.shape.fetched * DTYPE.itemsize
        tiers = [Tier(name, size / statistics.median(times[name])) for name in times]
        return tier_table(bank.shape, DTYPE, [*tiers, Tier("disk", disk)])


def ratios(times: list[float], references: list[float]) -> list[float]:
    """Of what was measured in the same round."""
    return [a / b for a, b in zip(times, references, strict=True)]
