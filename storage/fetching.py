"""Blocks of files, read by several threads: kept, on their way, or read now."""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from mneme.storage.buffers import Buffers
from mneme.storage.caches import RecordCache
from mneme.storage.files import StorageError
from mneme.storage.reading import Reader
from mneme.storage.record_file import RecordFile

READERS = 3  # threads that read blocks of calls, besides those that wait for them
PIECE = 2 * 2**20  # bytes of a block that a thread reads at a time: whole pages
_CLOSED = "the bank is closed; open it again"

Key = tuple[int, int]
"""A level and one of its blocks."""


@dataclass
class BlockReads:
    """What reading has come to so far.

    Attributes:
        fetches: calls.
        hits: distinct blocks of calls that were kept, or on their way already.
        misses: distinct blocks of calls that were read for them.
        file_bytes: that were read from files, also ahead of calls.
        seconds: of calls.
    """

    fetches: int = 0
    hits: int = 0
    misses: int = 0
    file_bytes: int = 0
    seconds: float = 0.0


class Place(NamedTuple):
    """Where a block lies.

    Attributes:
        file: has it.
        record: which of the file's it is.
        reader: of the same file.
    """

    file: RecordFile
    record: int
    reader: Reader


class PendingRead:
    """A block, and how far it has been read, piece by piece, by as many threads as come to it.

    Threads take pieces in order until none is left. Exactly one of them is told that the block is
    over, when no piece is being read any more: it has to set the result.

    Args:
        key: whose block it is.
        size: bytes to read.

    Attributes:
        key, size: likewise.
        block: it, in the end, or why it cannot be read.
        error: why no more of it is to be read.
    """

    def __init__(self, key: Key, size: int) -> None:
        self.key, self.size = key, size
        self.block: Future[Tensor] = Future()
        self.error: BaseException | None = None
        self._data: np.ndarray | None = None
        self._begun, self._reading = 0, set[int]()  # bytes; threads
        self._over, self._lock = False, Lock()

    @property
    def pieces(self) -> int:
        """How many there are in all."""
        return -(-self.size // PIECE)

    def take(self, buffers: Buffers) -> tuple[int, UInt8[np.ndarray, " n"]] | None:
        """Where the next piece begins, and what it is to be read into; None if there is none.

        What was taken has to be given back, also when this fails.
        """
        with self._lock:
            if self._begun >= self.size or self.error is not None:
                return None
            self._reading.add(get_ident())
            if self._data is None:
                self._data = buffers.take(self.size)
            start = self._begun
            self._begun = min(start + PIECE, self.size)
            return start, self._data[start : self._begun]

    def give_back(self, error: BaseException | None) -> bool:
        """Ends this thread's piece, if it has one; whether the block is over.

        Args:
            error: why it could not be read, or why no thread is to begin another piece, if so.
        """
        with self._lock:
            self._reading.discard(get_ident())
            self.error = self.error or error
            left = self._begun < self.size and self.error is None
            if self._over or self._reading or left:
                return False
            self._over = True
            return True

    def data(self) -> UInt8[np.ndarray, " n"]:
        """What was read, for the thread that ends the block; it is here no more."""
        data, self._data = self._data, None
        assert data is not None, "a block that is over without an error was read"
        return data


class Fetcher:
    """Reads blocks in threads of its own, checks them, and keeps those that were used last.

    No block is read twice at a time. Large blocks are read in pieces, in the order in which they
    were asked for, so that the first is there, and can be converted, while others are read. Who
    waits for a block reads pieces of it as well: to wait for other threads alone would cost a small
    block as much time as to read it. What could not be read is tried again when it is next asked
    for.

    Args:
        place: where a block lies.
        decode: makes a block of a level of its bytes.
        caches: where blocks of each level are kept; levels may share one.
        buffers: memory for blocks.
        close: lets go of the files.

    Attributes:
        reads: counters.
    """

    def __init__(
        self,
        place: Callable[[Key], Place],
        decode: Callable[[int, UInt8[np.ndarray, " n"]], Tensor],
        *,
        caches: Mapping[int, RecordCache],
        buffers: Buffers,
        close: Callable[[], None],
    ) -> None:
        self.reads = BlockReads()
        self._place, self._decode, self._caches, self._buffers = place, decode, caches, buffers
        self._let_go = close
        self._lock, self._closed = Lock(), False
        self._under_way: dict[Key, PendingRead] = {}
        self._asked = ThreadPoolExecutor(READERS, "bank")
        self._ahead = ThreadPoolExecutor(1, "bank-ahead")
        self._later: deque[PendingRead] = deque()  # the first of them is with that thread

    def ask(self, key: Key, *, is_next: bool) -> PendingRead:
        """A block that a call needs.

        Args:
            key: of the block.
            is_next: the caller waits for it at once, and so reads one of its pieces itself.

        Raises:
            StorageError: the bank is closed.
        """
        with self._lock:
            self._require_open()
            kept = self._caches[key[0]].get(key)
            pending = self._under_way.get(key)
            self.reads.hits += kept is not None or pending is not None
            self.reads.misses += kept is None and pending is None
            if kept is not None:
                pending = self._pending(key)
                pending.block.set_result(kept)
                return pending
            pending = pending or self._pending(key)
            self._under_way[key] = pending
            for _ in range(min(pending.pieces - is_next, READERS)):
                self._asked.submit(self._read, pending)
            return pending

    def wait(self, pending: PendingRead) -> Tensor:
        """The block that was asked for.

        Raises:
            StorageError: it cannot be read or is damaged, or the bank was closed meanwhile.
        """
        if not pending.block.done():
            self._read(pending)
        return pending.block.result()

    def read_ahead(self, key: Key) -> None:
        """Reads a block in the background, unless it is here or would not be kept.

        Raises:
            StorageError: the bank is closed.
        """
        with self._lock:
            self._require_open()
            cache, pending = self._caches[key[0]], self._pending(key)
            if key not in cache and key not in self._under_way and cache.fits(pending.size):
                self._under_way[key] = pending
                self._later.append(pending)
                if len(self._later) == 1:
                    self._ahead.submit(self._read_later)

    def count_call(self, seconds: float) -> None:
        """Adds to the counters of calls."""
        with self._lock:
            self.reads.fetches += 1
            self.reads.seconds += seconds

    def close(self) -> None:
        """Waits for blocks that are being read, then lets go of files and blocks."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = list(self._under_way.values())
        for pending in left:
            if pending.give_back(StorageError(_CLOSED)):
                self._finish(pending)
        wait([pending.block for pending in left])
        for pool in (self._asked, self._ahead):
            pool.shutdown()
        self._let_go()
        for cache in self._caches.values():
            cache.clear()

    def _pending(self, key: Key) -> PendingRead:
        return PendingRead(key, self._place(key).file.layout.stride)

    def _read_later(self) -> None:
        """Reads the first block that is to be read ahead, and hands on the next.

        No pool takes anything when the process is about to exit, which so waits for one block only.
        """
        self._read(self._later[0])
        with self._lock:
            self._later.popleft()
            if self._later and not self._closed:
                self._ahead.submit(self._read_later)

    def _read(self, pending: PendingRead) -> None:
        """Reads pieces of a block until none is left."""
        file, record, reader = self._place(pending.key)
        while True:
            error: BaseException | None = None
            try:
                piece = pending.take(self._buffers)
                if piece is None:
                    return
                start, into = piece
                reader.read(file.layout.offset(record) + start, into)
            except BaseException as raised:  # also of memory, or by Ctrl-C: no block stays open
                error = raised
            if pending.give_back(error):
                self._finish(pending)

    def _finish(self, pending: PendingRead) -> None:
        """Tells those who wait; at no moment is a block neither kept nor on its way."""
        found: Tensor | BaseException
        try:
            found = pending.error or self._checked(pending)
        except BaseException as error:  # also of memory: others wait for an answer
            found = error
        with self._lock:
            if isinstance(found, Tensor):
                self._caches[pending.key[0]].put(pending.key, found, pending.size)
                self.reads.file_bytes += pending.size
            del self._under_way[pending.key]
        if isinstance(found, Tensor):
            pending.block.set_result(found)
        else:
            pending.block.set_exception(found)

    def _checked(self, pending: PendingRead) -> Tensor:
        file, record, _ = self._place(pending.key)
        data = pending.data()
        file.check(record, data.data)
        return self._decode(pending.key[0], data)

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError(_CLOSED)
