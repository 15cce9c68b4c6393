"""Ways to read blocks of a file into memory, and which of them is the fastest for a file.

Blocks are whole pages, as `Layout` has them. Threads may read at the same time.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from io import FileIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8

from mneme.storage.buffers import Buffers
from mneme.storage.files import StorageError
from mneme.storage.record_file import PAGE, Layout

Read = Literal["auto", "pread", "direct"]

SAMPLE = 4 * 2**20  # bytes that one try reads at most
TRIES = 5  # of each way: 40 MiB of a file at most
SECONDS = 1.0  # after which no other round of tries begins


class Reader:
    """An open file, read by calls.

    Args:
        path: of the file.
        flags: of the system's `open`.

    Attributes:
        name: of the way in which it is read.

    Raises:
        StorageError: it cannot be opened.
    """

    name: str

    def __init__(self, path: Path, flags: int = 0) -> None:
        self._path, self._file = path, _open(path, flags)

    def read(self, offset: int, into: UInt8[np.ndarray, " length"]) -> None:
        """Fills `into` with what is at `offset`: a call of the system may return less.

        Raises:
            StorageError: the file ends before that, or cannot be read.
        """
        view, done, end = memoryview(into.data), 0, offset + len(into)
        while done < len(view):
            try:  # Python repeats a call that a signal ended
                count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            except OSError as error:  # a direct read that would go on within a page, for one
                self._require_length(offset, end)
                what = f"bytes {offset:,} to {end:,} of {self._path}"
                raise StorageError(f"cannot read {what}: {error.strerror}") from error
            if not count:
                self._require_length(offset, end)
            done += count

    def close(self) -> None:
        """Lets go of the file; there is no reading after that."""
        self._file.close()

    def _require_length(self, offset: int, end: int) -> None:
        if (size := os.fstat(self._file.fileno()).st_size) < end:
            raise StorageError(
                f"{self._path} ends at byte {size:,}; bytes {offset:,} to {end:,} were to be read. "
                "Was the file cut while it was open?"
            )


class Pread(Reader):
    """Reads through the system's page cache: what was read lately is read faster again.

    The system is told that reads are at random places. Otherwise it reads on after each block,
    often as much again, for a next read that does not come.
    """

    name = "pread"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


class Direct(Reader):
    """Reads past the page cache: no copy in between, and no memory of the system's is taken.

    Arrays to fill begin at a page and have whole pages, as those of `Buffers` do. The system cuts a
    call into requests that are under way together, so that one call for much is as fast as many.

    Raises:
        StorageError: it cannot be opened, or its file system refuses such reads.
    """

    name = "direct"

    def __init__(self, path: Path) -> None:
        if not hasattr(os, "O_DIRECT"):
            raise StorageError("this system has no O_DIRECT; read with 'pread'")
        super().__init__(path, os.O_DIRECT)
        try:
            self.read(0, Buffers().take(PAGE))  # some systems refuse only now
        except StorageError:
            self.close()
            raise


WAYS: Mapping[str, Callable[[Path], Reader]] = {"pread": Pread, "direct": Direct}


def open_reader(path: Path, layout: Layout, read: str) -> Reader:
    """A file, opened for one way of reading; "auto" for the faster of both.

    Raises:
        StorageError: it cannot be opened, or not for this way of reading.
        ValueError: there is no such way.
    """
    if read not in get_args(Read):
        raise ValueError(
            f"read must be one of {', '.join(map(repr, get_args(Read)))}; got {read!r}"
        )
    return fastest(path, layout) if read == "auto" else WAYS[read](path)


def fastest(path: Path, layout: Layout) -> Reader:
    """The way that reads blocks in less time when they are on disk only.

    Each that the file system allows reads up to five blocks, of each no more than 4 MiB; what
    counts is the median. They are taken out of the page cache first, where the system allows it.
    "direct" then leaves the page cache alone for good: if the whole bank fits into free memory,
    "pread" is faster from the second time on.

    Raises:
        StorageError: the file cannot be opened or read.
    """
    with ExitStack() as opened:
        readers: dict[str, Reader] = {"pread": opened.enter_context(closing(Pread(path)))}
        with suppress(StorageError):  # that the file system refuses it is no fault of the file
            readers["direct"] = opened.enter_context(closing(Direct(path)))
        seconds = _measure(path, layout, readers)
    return WAYS[min(seconds, key=lambda way: statistics.median(seconds[way]))](path)


def _measure(path: Path, layout: Layout, readers: Mapping[str, Reader]) -> dict[str, list[float]]:
    """Seconds of each try of each way, interleaved."""
    size = min(layout.stride, SAMPLE)
    into = Buffers().take(size)
    into[:] = 0  # or the first try would also wait for memory
    tries = TRIES * len(readers)
    offsets = iter([layout.offset(i * layout.count // tries) for i in range(tries)])
    seconds: dict[str, list[float]] = {name: [] for name in readers}
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
        raise StorageError(f"cannot open {path}{how}: {error.strerror}") from error
