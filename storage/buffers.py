"""Memory for blocks: used again as soon as nobody looks at it."""

import mmap
import weakref
from collections import deque
from contextlib import suppress
from threading import Lock

import numpy as np
from jaxtyping import UInt8

from mneme.storage.record_file import PAGE

KEPT = 128 * 2**20  # bytes of memory that waits for its next use
_HUGE = 2 * 2**20  # a large page


class Buffers:
    """Arrays of bytes that begin at a page, whose memory is used again.

    To touch new memory for the first time can take longer than to read a block into it from a fast
    disk: the system clears and maps it page by page. So the memory of an array is kept, up to a
    limit, when the array and all tensors and views of it are gone, and is given to the next array
    of its size. Large arrays are in large pages where the system has them.

    Args:
        limit: bytes that are kept; what was kept longest makes place.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._lock = Lock()
        self._free: deque[mmap.mmap] = deque()
        self._returned: deque[mmap.mmap] = deque()

    def take(self, size: int) -> UInt8[np.ndarray, " size"]:
        """An array of `size` bytes, of any content."""
        mapping = self._reuse(_rounded(size))
        if mapping is None:
            mapping = _new(_rounded(size))
        array = np.frombuffer(mapping, dtype=np.uint8)
        weakref.finalize(array, self._give_back, mapping).atexit = False
        return array[:size]

    def _reuse(self, size: int) -> mmap.mmap | None:
        """The memory of that size that was used last, which may still be in a processor's cache."""
        with self._lock:
            self._sort_in()
            for mapping in reversed(self._free):
                if len(mapping) == size:
                    self._free.remove(mapping)
                    return mapping
        return None

    def _give_back(self, mapping: mmap.mmap) -> None:
        """Runs wherever the last reference is dropped, even inside of this object with the lock."""
        self._returned.append(mapping)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        """Takes what came back, and lets go of what is too much."""
        while self._returned:
            mapping = self._returned.popleft()
            if len(mapping) <= self._limit:  # or all others would have to go
                self._free.append(mapping)
        total = sum(map(len, self._free))
        while total > self._limit:
            total -= len(self._free.popleft())


def _rounded(size: int) -> int:
    """Whole pages, large ones where they waste little."""
    page = _HUGE if size >= 8 * _HUGE else PAGE
    return -(-max(size, 1) // page) * page


def _new(size: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
