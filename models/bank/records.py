"""Blocks of a bank's files by level and node: kept, on their way, or read now."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from mneme.models.bank.buffers import Buffers
from mneme.models.bank.cache import RecordCache
from mneme.models.bank.errors import BankError
from mneme.models.bank.level_file import LevelFile
from mneme.models.bank.reading import Read, Reader, open_reader
from mneme.models.bank.task import Task

READERS = 3  # threads that read blocks of calls, besides those that wait for them
_CLOSED = "the bank is closed; open it again"


@dataclass
class Reads:
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


class Records:
    """Reads blocks in threads of its own, checks them, and keeps those that were used last.

    No block is read twice at a time. Large blocks are read in pieces, in the order in which they
    were asked for, so that the first is there, and can be converted, while others are read. Who
    waits for a block reads pieces of it as well: to wait for other threads alone would cost a small
    block as much time as to read it. What could not be read is tried again when it is next asked
    for.

    Args:
        files: of each level.
        read: how; "auto" takes for each file what is fastest there.
        caches: where blocks of each level are kept; levels may share one.
        buffers: memory for blocks.

    Attributes:
        reads: counters.
        ways: how the file of each level is read.

    Raises:
        BankError: a file cannot be opened.
    """

    def __init__(
        self,
        files: Mapping[int, LevelFile],
        *,
        read: Read,
        caches: Mapping[int, RecordCache],
        buffers: Buffers,
    ) -> None:
        self.reads = Reads()
        self._files, self._caches, self._buffers = files, caches, buffers
        self._readers: dict[int, Reader] = {}
        with ExitStack() as opened:
            for level, file in files.items():
                self._readers[level] = open_reader(file.path, file.layout, read)
                opened.callback(self._readers[level].close)
            self._opened = opened.pop_all()  # or, if one could not be opened, all were closed
        self.ways = {level: reader.name for level, reader in self._readers.items()}
        self._lock, self._closed = Lock(), False
        self._under_way: dict[tuple[int, int], Task] = {}
        self._asked = ThreadPoolExecutor(READERS, "bank")
        self._ahead = ThreadPoolExecutor(1, "bank-ahead")
        self._later: deque[Task] = deque()  # the first of them is with that thread

    def ask(self, level: int, node: int, *, is_next: bool) -> Task:
        """A block that a call needs.

        Args:
            level: whose block it is.
            node: likewise.
            is_next: the caller waits for it at once, and so reads one of its pieces itself.

        Raises:
            BankError: the bank is closed.
        """
        with self._lock:
            self._require_open()
            kept = self._caches[level].get((level, node))
            task = self._under_way.get((level, node))
            self.reads.hits += kept is not None or task is not None
            self.reads.misses += kept is None and task is None
            if kept is not None:
                task = self._task(level, node)
                task.block.set_result(kept)
                return task
            task = task or self._task(level, node)
            self._under_way[level, node] = task
            for _ in range(min(task.pieces - is_next, READERS)):
                self._asked.submit(self._read, task)
            return task

    def wait(self, task: Task) -> Tensor:
        """The block of a task.

        Raises:
            BankError: it cannot be read or is damaged, or the bank was closed meanwhile.
        """
        if not task.block.done():
            self._read(task)
        return task.block.result()

    def read_ahead(self, level: int, node: int) -> None:
        """Reads a block in the background, unless it is here or would not be kept.

        Raises:
            BankError: the bank is closed.
        """
        with self._lock:
            self._require_open()
            cache, stride = self._caches[level], self._files[level].layout.stride
            is_here = (level, node) in cache or (level, node) in self._under_way
            if not is_here and cache.fits(stride):
                task = self._under_way[level, node] = self._task(level, node)
                self._later.append(task)
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
        for task in left:
            if task.stop(BankError(_CLOSED)):
                self._finish(task)
        wait([task.block for task in left])
        for pool in (self._asked, self._ahead):
            pool.shutdown()
        self._opened.close()
        for cache in self._caches.values():
            cache.clear()

    def _task(self, level: int, node: int) -> Task:
        return Task(level, node, self._files[level].layout.stride)

    def _read_later(self) -> None:
        """Reads the first block that is to be read ahead, and hands on the next.

        No pool takes anything when the process is about to exit, which so waits for one block only.
        """
        self._read(self._later[0])
        with self._lock:
            self._later.popleft()
            if self._later and not self._closed:
                self._ahead.submit(self._read_later)

    def _read(self, task: Task) -> None:
        """Reads pieces of a block until none is left."""
        offset = self._files[task.level].layout.offset(task.node)
        while True:
            error: BaseException | None = None
            try:
                piece = task.take(self._buffers)
                if piece is None:
                    return
                start, into = piece
                self._readers[task.level].read(offset + start, into)
            except BaseException as raised:  # also of memory, or by Ctrl-C: no block stays open
                error = raised
            if task.give_back(error):
                self._finish(task)

    def _finish(self, task: Task) -> None:
        """Tells those who wait; at no moment is a block neither kept nor on its way."""
        found: Tensor | BaseException
        try:
            found = task.error or self._checked(task)
        except BaseException as error:  # also of memory: others wait for an answer
            found = error
        with self._lock:
            if isinstance(found, Tensor):
                self._caches[task.level].put((task.level, task.node), found, task.size)
                self.reads.file_bytes += task.size
            del self._under_way[task.level, task.node]
        if isinstance(found, Tensor):
            task.block.set_result(found)
        else:
            task.block.set_exception(found)

    def _checked(self, task: Task) -> Tensor:
        file, data = self._files[task.level], task.data()
        file.check(task.node, data)
        return file.layout.decode(data)

    def _require_open(self) -> None:
        if self._closed:
            raise BankError(_CLOSED)
