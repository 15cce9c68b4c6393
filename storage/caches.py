"""What was read lately, kept in memory within a budget of bytes.

Two caches, of blocks that come one by one and of rows that come by thousands, as neither does the
other's work at its speed (docs/decisions.md). N rows, n rows of a call, s bytes of a record.
"""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

import numpy as np
from torch import Tensor

_WAYS = 8  # slots in which a row may be kept
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: multiplying scatters rows


class RecordCache:
    """The blocks that were used last, in the dtype of their file; threads may share it.

    A block that is larger than the budget is not kept, and pushes nothing out.

    Args:
        budget: bytes of all blocks together.

    Attributes:
        budget: likewise.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._lock = Lock()
        self._kept: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()
        self._nbytes = 0

    def get(self, key: Hashable) -> Tensor | None:
        """A block, which counts as used now; None if it is not here."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, record: Tensor, size: int) -> None:
        """Keeps a block, which counts as used now, in the place of those used longest ago.

        Args:
            key: whose block it is.
            record: the block.
            size: bytes that it takes, with what lies after it.
        """
        with self._lock:
            self._drop(key)
            if not self.fits(size):
                return
            while self._nbytes + size > self.budget:
                self._drop(next(iter(self._kept)))
            self._kept[key] = record, size
            self._nbytes += size

    def fits(self, size: int) -> bool:
        """Whether a block of that size would be kept."""
        return size <= self.budget

    def clear(self) -> None:
        """Forgets all blocks."""
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def __contains__(self, key: Hashable) -> bool:
        """Whether a block is here; it does not count as used."""
        return key in self._kept

    def _drop(self, key: Hashable) -> None:
        if key in self._kept:
            self._nbytes -= self._kept.pop(key)[1]


class RowCache:
    """Records of the rows that were read last, within a budget; all steps are a few array calls.

    A row may be in any of the 8 slots of one set, which its number determines, and takes the place
    of the one there that was read longest ago. So a lookup compares 8 numbers, and there is no map
    of all rows, which for a large table would be larger than the cache.

    Args:
        rows: N, for the smallest type of number that holds one.
        record: s.
        budget: bytes of everything that is allocated: records, whose they are, when last read.
    """

    def __init__(self, rows: int, record: int, budget: int) -> None:
        self._none = rows  # no row has this number
        row_type = np.min_scalar_type(rows)
        slots = budget // (record + row_type.itemsize + np.dtype(np.int64).itemsize)
        self._ways = min(_WAYS, slots)
        sets = slots // self._ways if slots else 0
        self._owners = np.full((sets, self._ways), self._none, dtype=row_type)
        self._stamps = np.zeros((sets, self._ways), dtype=np.int64)
        self._records = np.empty((sets * self._ways, record), dtype=np.uint8)
        self._now = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return self._owners.nbytes + self._stamps.nbytes + self._records.nbytes

    def __len__(self) -> int:
        """Rows that are kept now."""
        return int((self._owners != self._none).sum())

    def take(self, rows: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Fills in the records `[n, s]` of rows that are here; returns which those are, `[n]`."""
        self._now += 1
        if not self._owners.size:
            return np.zeros(len(rows), dtype=bool)
        sets = self._sets(rows)
        matches = self._owners[sets] == rows[:, None].astype(self._owners.dtype)
        found = matches.any(1)
        slots = (sets * self._ways + matches.argmax(1))[found]
        records[found] = self._records[slots]
        self._stamps.reshape(-1)[slots] = self._now
        return found

    def put(self, rows: np.ndarray, records: np.ndarray) -> None:
        """Keeps rows that are not here, of those of one set no more than it has slots."""
        if not self._owners.size or not len(rows):
            return
        sets = self._sets(rows)
        order = sets.argsort(kind="stable")
        ordered = sets[order]
        rank = np.arange(len(rows)) - np.searchsorted(ordered, ordered)  # among those of its set
        order, rank = order[rank < self._ways], rank[rank < self._ways]
        sets = sets[order]
        oldest_first = self._stamps[sets].argsort(1, kind="stable")
        way = oldest_first[np.arange(len(sets)), rank]
        self._owners[sets, way] = rows[order]
        self._stamps[sets, way] = self._now
        self._records[sets * self._ways + way] = records[order]

    def _sets(self, rows: np.ndarray) -> np.ndarray:
        """The set of each row; neighbors, and rows a fixed step apart, are spread evenly."""
        scattered = (rows.astype(np.uint64) * _SPREAD) >> np.uint64(32)
        return (scattered % np.uint64(len(self._owners))).astype(np.int64)
