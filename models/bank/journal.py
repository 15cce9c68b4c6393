"""One writer at a time, and edits that a crash cannot leave half done.

An edit first goes to a journal: every patch with the place where it belongs, then a checksum of
all. The files are changed only when the journal is on disk, and it is removed when they are on
disk. A crash before leaves no journal, and the edit has not been made. A crash after leaves one,
and the next to open the bank makes the patches, once more or for the first time.

    patches   data of each, one after another
    index     JSON: file, offset and length of each
    trailer   bytes of the index, XXH3-64 of all before, magic; each 8 bytes, little-endian
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from mneme.models.bank.errors import BankError
from mneme.models.bank.layout import WORD
from mneme.models.bank.level_file import read_header
from mneme.storage.atomic_file import replacing, sync_folder
from mneme.storage.regular_file import open_regular

JOURNAL = "edit.journal"
LEVEL_NAME = re.compile(r"level\d+-(\d+)\.bank")
_LOCK = ".lock"
_MAGIC = b"mnemejrn"
_CHUNK = 2**20  # bytes read at a time
_WAIT = 0.01  # seconds between two looks at a lock


class Patch(NamedTuple):
    """Bytes to be written.

    Attributes:
        file: name in the folder.
        offset: of the first byte.
        data: written there.
    """

    file: str
    offset: int
    data: bytes | memoryview


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes this the only writer of a bank; the lock ends with the process, however it ends.

    Raises:
        BankError: another is writing, the folder is missing, or its lock cannot be opened.
    """
    if not folder.is_dir():
        raise BankError(f"there is no memory bank in {folder}: no such folder")
    with _lock(folder) as held:
        if not held:
            raise BankError(
                f"another process or thread is writing the bank in {folder}; wait until it is done"
            )
        yield


def write_journal(folder: Path, patches: Iterable[Patch]) -> None:
    """Puts an edit on disk, whole or not at all. The caller holds the lock.

    Raises:
        BankError: there is no room, or another problem with the file; nothing is changed then.
    """
    path, index, checksum = folder / JOURNAL, [], xxhash.xxh3_64()
    with told(path), replacing(path) as file:
        for patch in patches:
            index.append([patch.file, patch.offset, len(patch.data)])
            checksum.update(patch.data)
            file.write(patch.data)
        text = json.dumps(index).encode()
        length = len(text).to_bytes(WORD, "little")
        checksum.update(text + length)
        digest = checksum.intdigest().to_bytes(WORD, "little")
        file.write(text + length + digest + _MAGIC)


def apply_journal(folder: Path) -> None:
    """Makes an edit that is in the journal, if one is; the caller holds the lock.

    Doing it again does nothing new. A journal that is not whole is removed: its edit was not begun.

    Raises:
        BankError: a file cannot be written, or the journal names other files than levels of a bank
            or other places than theirs; the journal stays.
    """
    path = folder / JOURNAL
    with told(path):
        try:
            journal = open_regular(path)
        except FileNotFoundError:
            return
        with journal:
            _apply(folder, journal)
    remove_journal(folder)


def remove_journal(folder: Path) -> None:
    """Removes a journal, if there is one, on disk when this returns; the caller holds the lock.

    Raises:
        BankError: it cannot be removed.
    """
    path = folder / JOURNAL
    with told(path):
        if path.exists():
            path.unlink()
            sync_folder(folder)


def complete_edit(folder: Path) -> None:
    """Makes an edit that was cut short, before a bank is read.

    In a folder without a whole journal nothing is written, so that banks can be read where they
    cannot be written. Where another process is making its edit, this waits for its end.

    Raises:
        BankError: there is an edit to be made, and it cannot be made here.
    """
    while (folder / JOURNAL).exists():
        try:
            with _lock(folder) as held:
                if held:
                    if _has_whole_journal(folder):
                        apply_journal(folder)
                    return
        except BankError as error:
            if not _has_whole_journal(folder):
                return
            raise BankError(
                f"an edit of the bank in {folder} was cut short and cannot be made now; open the "
                f"bank once where it can be written, or write it again ({error})"
            ) from error
        time.sleep(_WAIT)


@contextmanager
def told(
    path: Path, size: int | None = None, *, then: str = "nothing that was saved is lost"
) -> Iterator[None]:
    """Names the file, and the bytes that it needs, in errors of the system: a full disk and others.

    Args:
        path: of the file.
        size: how many bytes it needs.
        then: what is true after the error.

    Raises:
        BankError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        needs = "" if size is None else f", which needs {size:,} bytes"
        raise BankError(f"cannot write {path}{needs}: {error}; {then}") from error


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this is the only writer meanwhile."""
    path, held = folder / _LOCK, False
    can_wait_only = path.exists() and not os.access(path, os.W_OK)
    with told(path):
        handle = os.open(path, os.O_RDONLY if can_wait_only else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with told(path), suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        os.close(handle)


def _has_whole_journal(folder: Path) -> bool:
    try:
        with open_regular(folder / JOURNAL) as journal:
            return bool(_index(journal))
    except FileNotFoundError:
        return False


def _apply(folder: Path, journal: BinaryIO) -> None:
    """Changes files as a journal says; none of them, if it says what no edit would."""
    patches: dict[str, list[tuple[int, int, int]]] = {}
    start = 0
    for name, offset, length in _index(journal):
        patches.setdefault(name, []).append((start, offset, length))
        start += length
    then = f"the edit is in {JOURNAL}, and will be made when the bank is next opened"
    for name, places in patches.items():
        with told(folder / name, then=then):
            _require_in_level(folder, name, places)
    for name, places in patches.items():
        with told(folder / name, then=then), (folder / name).open("r+b") as file:
            for start, offset, length in places:
                journal.seek(start)
                file.seek(offset)
                file.write(journal.read(length))
            file.flush()
            os.fsync(file.fileno())


def _require_in_level(folder: Path, name: str, places: list[tuple[int, int, int]]) -> None:
    """A journal comes with a bank, perhaps from others: it may change blocks and nothing else."""
    remedy = f"which is no block of this bank; remove {JOURNAL}, or write the bank again"
    if not LEVEL_NAME.fullmatch(name):
        raise BankError(f"{folder / JOURNAL} would change {name!r}, {remedy}")
    with open_regular(folder / name) as file:
        layout = read_header(folder / name, file)
    for _, offset, length in places:
        if not layout.table <= offset <= offset + length <= layout.file_bytes:
            raise BankError(f"{folder / JOURNAL} would change {name} at {offset:,}, {remedy}")


def _index(journal: BinaryIO) -> list[tuple[str, int, int]]:
    """The places of a journal's patches; none where it is not whole."""
    size = journal.seek(0, os.SEEK_END)
    if size < 3 * WORD:
        return []
    journal.seek(size - 3 * WORD)
    length, digest, magic = (journal.read(WORD) for _ in range(3))
    if magic != _MAGIC or _checksum(journal, size - 2 * WORD) != digest:
        return []
    try:
        journal.seek(size - 3 * WORD - int.from_bytes(length, "little"))
        places = json.loads(journal.read()[: -3 * WORD])
        return [(str(name), int(offset), int(count)) for name, offset, count in places]
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise BankError(f"{journal.name} contradicts itself: {error}") from error


def _checksum(journal: BinaryIO, size: int) -> bytes:
    """Of the first bytes of a journal."""
    checksum = xxhash.xxh3_64()
    journal.seek(0)
    while size and (data := journal.read(min(size, _CHUNK))):
        checksum.update(data)
        size -= len(data)
    return checksum.intdigest().to_bytes(WORD, "little")
