"""Files that are replaced whole, and files that others may have made."""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # what `replacing` calls a file until it is whole


class StorageError(ValueError):
    """Stored tensors that cannot be read or written as asked."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of another when all is on disk, and never in part.

    Its permissions are those of any new file. Two processes may write the same path at once: each
    has a file of its own, and the last to finish wins; readers that have the old one open keep it.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # or a power cut could undo the renaming


def remove_leftovers(folder: Path) -> None:
    """Deletes what `replacing` left in a folder when its process was killed.

    Only for whoever knows that nobody else writes there now.
    """
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file of bytes for reading, and nothing but a file.

    A directory that was copied from elsewhere may have a fifo or a device in the place of a file:
    reading the one would wait for ever, and the other never end.

    Raises:
        OSError: there is no such file, it cannot be read, or it is none.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            raise _no_file(path) from error
        raise
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise _no_file(path)


def read_regular(path: Path) -> bytes:
    """All that is in a file; errors as those of `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def _no_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


@contextmanager
def naming(
    path: Path, size: int | None = None, *, then: str = "nothing that was saved is lost"
) -> Iterator[None]:
    """Names the file, and the bytes that it needs, in errors of the system: a full disk and others.

    Args:
        path: of the file that is written.
        size: how many bytes it needs.
        then: what is true after the error.

    Raises:
        StorageError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        needs = "" if size is None else f", which needs {size:,} bytes"
        raise StorageError(f"cannot write {path}{needs}: {error}; {then}") from error
