"""Reading files that others may have made."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Opens a file of bytes for reading, and nothing but a file.

    A directory that was copied from elsewhere may have a fifo or a device in the place of a file:
    reading the one would wait for ever, and the other never end.

    Raises:
        OSError: there is no such file, it cannot be read, or it is none.
    """
    handle = _open(path)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise _no_file(path)


def read_regular(path: Path) -> bytes:
    """All that is in a file; errors as those of `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            raise _no_file(path) from error
        raise


def _no_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))
