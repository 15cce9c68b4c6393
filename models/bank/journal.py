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
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from layers.atomic_file import replacing
from models.bank.errors import BankError
from models.bank.layout import WORD

JOURNAL = "edit.journal"
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
        BankError: another is writing, or the folder is missing or not writable.
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
        BankError: a file cannot be written; the journal stays.
    """
    path = folder / JOURNAL
    with told(path):
        try:
            journal = path.open("rb")
        except FileNotFoundError:
            return
        with journal, ExitStack() as stack:
            index = _index(journal)
            names = {name for name, _, _ in index}
            files = {n: stack.enter_context((folder / n).open("r+b")) for n in names}
            journal.seek(0)
            for name, offset, length in index:
                files[name].seek(offset)
                files[name].write(journal.read(length))
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        path.unlink()
        sync_folder(folder)


def complete_edit(folder: Path) -> None:
    """Makes an edit that was cut short, before a bank is read.

    In a folder without a whole journal nothing is written, so that banks can be read where they
    cannot be written. Where another process is making its edit, this waits for its end.

    Raises:
        BankError: there is an edit to be made, and the folder is not writable.
    """
    while _has_whole_journal(folder):
        try:
            with _lock(folder) as held:
                if held:
                    apply_journal(folder)
                    return
        except BankError as error:
            raise BankError(
                f"an edit of the bank in {folder} was cut short; open it once where it can be "
                f"written ({error})"
            ) from error
        time.sleep(_WAIT)


def sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def told(path: Path, size: int | None = None) -> Iterator[None]:
    """Names the file, and the bytes that it needs, in errors of the system: a full disk and others.

    Raises:
        BankError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        needs = "" if size is None else f", which needs {size:,} bytes"
        raise BankError(
            f"cannot write {path}{needs}: {error}; nothing that was saved is lost"
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this is the only writer meanwhile."""
    path, held = folder / _LOCK, False
    with told(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with told(path), suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        os.close(handle)


def _has_whole_journal(folder: Path) -> bool:
    try:
        with (folder / JOURNAL).open("rb") as journal:
            return bool(_index(journal))
    except FileNotFoundError:
        return False


def _index(journal: BinaryIO) -> list[tuple[str, int, int]]:
    """The places of a journal's patches; none where it is not whole."""
    size = journal.seek(0, os.SEEK_END)
    if size < 3 * WORD:
        return []
    journal.seek(size - 3 * WORD)
    length, digest, magic = (journal.read(WORD) for _ in range(3))
    if magic != _MAGIC or _checksum(journal, size - 2 * WORD) != digest:
        return []
    journal.seek(size - 3 * WORD - int.from_bytes(length, "little"))
    return [tuple(place) for place in json.loads(journal.read()[: -3 * WORD])]


def _checksum(journal: BinaryIO, size: int) -> bytes:
    """Of the first bytes of a journal."""
    checksum = xxhash.xxh3_64()
    journal.seek(0)
    while size and (data := journal.read(min(size, _CHUNK))):
        checksum.update(data)
        size -= len(data)
    return checksum.intdigest().to_bytes(WORD, "little")
