"""Ways to read records of a file into memory, and which of them is the fastest for a file.

Records are whole pages, as `LevelLayout` has them. Threads may read at the same time.
"""

import mmap
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from io import FileIO
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from mneme.layers.protocol import require_choice
from mneme.models.bank.buffers import Buffers
from mneme.models.bank.errors import BankError
from mneme.models.bank.layout import PAGE, LevelLayout

Read = Literal["auto", "pread", "mmap", "direct"]

SAMPLE = 4 * 2**20  # bytes that one try reads at most
TRIES = 5  # of each way: 40 MiB of a file at most
SECONDS = 1.0  # after which no other round of tries begins


@runtime_checkable
class Reader(Protocol):
    """An open file.

    Attributes:
        name: of the way in which it is read.
    """

    name: str

    def read(self, offset: int, into: UInt8[np.ndarray, " length"]) -> None:
        """Fills `into` with what is at `offset`.

        Raises:
            BankError: the file ends before that, or cannot be read.
        """

    def close(self) -> None:
        """Lets go of the file; there is no reading after that."""


class _ByCalls:
    """What the two ways have in common that read by calls rather than through a map."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self._path, self._file = path, _open(path, flags)

    def read(self, offset: int, into: UInt8[np.ndarray, " length"]) -> None:
        """See `Reader`."""
        _fill(self._path, self._file, offset, into)

    def close(self) -> None:
        """See `Reader`."""
        self._file.close()


class Pread(_ByCalls):
    """Reads through the system's page cache: what was read lately is read faster again.

    The system is told that reads are at random places. Otherwise it reads on after each record,
    often as much again, for a next read that does not come.

    Args:
        path: of the file.

    Raises:
        BankError: it cannot be opened.
    """

    name = "pread"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


class Direct(_ByCalls):
    """Reads past the page cache: no copy in between, and no memory of the system's is taken.

    Arrays to fill begin at a page and have whole pages, as those of `Buffers` do. The system cuts a
    call into requests that are under way together, so that one call for much is as fast as many.

    Args:
        path: of the file.

    Raises:
        BankError: it cannot be opened, or its file system refuses such reads.
    """

    name = "direct"

    def __init__(self, path: Path) -> None:
        if not hasattr(os, "O_DIRECT"):
            raise BankError("this system has no O_DIRECT; read with 'pread'")
        super().__init__(path, os.O_DIRECT)
        try:
            self.read(0, Buffers().take(PAGE))  # some systems refuse only now
        except BankError:
            self.close()
            raise


class Mapped:
    """Copies out of a map of the file; nothing of the map stays in this process's memory.

    The system is asked for all that will be copied before the copy begins. Without that it would
    read in small steps, as pages are touched, and with MADV_RANDOM page by page, many times slower.
    A page that the disk cannot read ends the process (SIGBUS), where other ways raise an error.

    Args:
        path: of the file.

    Raises:
        BankError: it cannot be opened, or not mapped.
    """

    name = "mmap"

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _open(path)
        try:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # of an empty file the latter
            self._file.close()
            raise BankError(f"cannot map {path}: {error}; read with 'pread'") from error

    def read(self, offset: int, into: UInt8[np.ndarray, " length"]) -> None:
        """See `Reader`."""
        size = len(into)
        # to touch what was cut off would end this process
        _require_length(self._path, self._file, offset, size)
        if hasattr(os, "posix_fadvise"):  # as MADV_WILLNEED does, but other threads can run
            os.posix_fadvise(self._file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
        into[:] = np.frombuffer(self._map, dtype=np.uint8, count=size, offset=offset)
        self._map.madvise(mmap.MADV_DONTNEED, offset, size)

    def close(self) -> None:
        """See `Reader`."""
        self._map.close()
        self._file.close()


WAYS: Mapping[Read, Callable[[Path], Reader]] = {"pread": Pread, "mmap": Mapped, "direct": Direct}


def open_reader(path: Path, layout: LevelLayout, read: Read) -> Reader:
    """A file, opened for one way of reading; "auto" for the faster of "pread" and "direct".

    Raises:
        BankError: it cannot be opened, or not for this way of reading.
        ValueError: there is no such way.
    """
    require_choice(Read, read=read)
    return fastest(path, layout) if read == "auto" else WAYS[read](path)


def fastest(path: Path, layout: LevelLayout) -> Reader:
    """The way, "pread" or "direct", that reads records in less time when they are on disk only.

    Each that the file system allows reads up to five records, of each no more than 4 MiB; what
    counts is the median. They are taken out of the page cache first, where the system allows it.
    "direct" then leaves the page cache alone for good: if the whole bank fits into free memory,
    "pread" is faster from the second time on. "mmap" is not among them: see `Mapped`.

    Raises:
        BankError: the file cannot be opened or read.
    """
    with ExitStack() as opened:
        readers: dict[Read, Reader] = {"pread": opened.enter_context(closing(Pread(path)))}
        with suppress(BankError):  # that the file system refuses it is no fault of the file
            readers["direct"] = opened.enter_context(closing(Direct(path)))
        seconds = _measure(path, layout, readers)
    return WAYS[min(seconds, key=lambda way: statistics.median(seconds[way]))](path)


def _measure(
    path: Path, layout: LevelLayout, readers: Mapping[Read, Reader]
) -> dict[Read, list[float]]:
    """Seconds of each try of each way, interleaved."""
    size = min(layout.stride, SAMPLE)
    into = Buffers().take(size)
    into[:] = 0  # or the first try would also wait for memory
    tries = TRIES * len(readers)
    offsets = iter([layout.offset(i * layout.nodes // tries) for i in range(tries)])
    seconds: dict[Read, list[float]] = {name: [] for name in readers}
    started = time.perf_counter()
    for _ in range(TRIES):
        for name, reader in readers.items():
            offset = next(offsets)
            evict(path, offset, size)
            before = time.perf_counter()
            reader.read(offset, into)
            seconds[name].append(time.perf_counter() - before)
        if time.perf_counter() - started > SECONDS:
            break
    return seconds


def evict(path: Path, offset: int = 0, size: int = 0) -> None:
    """Takes part of a file out of the page cache; size 0 for all that follows.

    Pages that are not on disk yet stay, and so does everything where the system cannot do it.
    """
    if hasattr(os, "posix_fadvise"):
        with _open(path) as file:
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)


def _open(path: Path, flags: int = 0) -> FileIO:
    try:
        return FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags))
    except OSError as error:
        how = " past the page cache (O_DIRECT); read with 'pread'" if flags else ""
        raise BankError(f"cannot open {path}{how}: {error.strerror}") from error


def _fill(path: Path, file: FileIO, offset: int, into: UInt8[np.ndarray, " length"]) -> None:
    """Reads until all is there: a call may return less. Python repeats one that a signal ended."""
    view, done, end = memoryview(into.data), 0, offset + len(into)
    while done < len(view):
        try:
            count = os.preadv(file.fileno(), [view[done:]], offset + done)
        except OSError as error:  # a direct read that would go on within a page, for one
            _require_length(path, file, offset, len(view))
            what = f"bytes {offset:,} to {end:,} of {path}"
            raise BankError(f"cannot read {what}: {error.strerror}") from error
        if not count:
            _require_length(path, file, offset, len(view))
        done += count


def _require_length(path: Path, file: FileIO, offset: int, size: int) -> None:
    end = os.fstat(file.fileno()).st_size
    if end < offset + size:
        raise BankError(
            f"{path} ends at byte {end:,}; bytes {offset:,} to {offset + size:,} were to be read. "
            "Was the file cut while it was open?"
        )
