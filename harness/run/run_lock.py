"""One process at a time trains in a run directory."""

import fcntl
import json
import os
import platform
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from mneme.harness.run.run_directory import RunError, rank
from mneme.storage.files import remove_leftovers

LOCK = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes this the only process that trains in a run directory.

    The system lets go of the lock when the process ends, however it ends, so a run that was killed
    can be resumed at once. Of several processes that train one run together, the first holds it.
    What a killed process left half written is deleted.

    Args:
        folder: of the run; its checkpoints are in a folder below.

    Raises:
        RunError: another process trains here, which is named, or the lock cannot be opened.
    """
    if rank() != 0:
        yield
        return
    with _open(folder / LOCK) as file:
        _lock(file, folder)
        file.truncate(0)
        file.write(json.dumps(_self()).encode())
        for place in (folder, folder / "checkpoints"):
            remove_leftovers(place)
        yield


def _open(path: Path) -> FileIO:
    """The lock's file, which in a copied directory might be a link or a fifo; neither is opened."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = FileIO(os.open(path, flags, 0o666), "r+")
    except OSError as error:
        raise RunError(f"cannot open {path} for writing: {error.strerror}") from error
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise RunError(f"{path} is not a regular file; remove it")


def _lock(file: FileIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(
            f"{folder} is being trained by {_holder(file)}; a run is trained by one process at a "
            "time: let that one end, or stop it with SIGTERM, upon which it saves itself"
        ) from error
    except OSError as error:  # some network file systems have no locks
        print(
            f"{folder} cannot be locked ({error.strerror}): see to it that no other process "
            "trains there",
            file=sys.stderr,
        )


def _self() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(file: FileIO) -> str:
    try:
        told = json.loads(file.read(4096))
        return f"process {told['pid']} on {told['host']}, since {told['since']}"
    except (ValueError, KeyError, TypeError):  # it has just begun
        return "another process"
