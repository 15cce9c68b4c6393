"""Files that are replaced whole, so that no reader and no crash ever sees a part of one."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # what `replacing` calls a file until it is whole


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
