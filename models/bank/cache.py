"""Blocks that were read lately, kept in memory within a budget."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

from torch import Tensor


class RecordCache:
    """The blocks that were used last, in the numbers of their file; threads may share it.

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
