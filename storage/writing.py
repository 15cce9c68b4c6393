"""Writing and editing folders of blocks, and erasing what was superseded.

See `mneme.storage.generations` for the files.
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mneme.storage.files import (
    StorageError,
    naming,
    open_regular,
    remove_leftovers,
    replacing,
    sync_folder,
)
from mneme.storage.generations import (
    MANIFEST,
    Generation,
    Level,
    OpenGeneration,
    Part,
    Superseded,
    file_name,
    lock_name,
    read_generation,
)
from mneme.storage.record_file import Bytes, RecordFile, write_records

_WRITER = ".lock"
_NUMBERED = re.compile(r"level\d+-(\d+)\.bank|generation-(\d+)\.lock")
_ERASED_LATER = (
    "the new generation is in place; what it supersedes is erased by the next edit, or by `python "
    "scripts/bank.py compact`"
)


def write_generation(
    folder: Path,
    sizes: Mapping[int, tuple[int, int]],
    blocks: Callable[[int], Iterable[Bytes]],
    *,
    about: dict[str, Any],
    facts: dict[str, Any],
) -> Generation:
    """Writes all levels anew. The older files stay until then, so there must be room for both.

    Args:
        folder: made if it is not there.
        sizes: blocks of each level, and bytes of each.
        blocks: gives the bytes of all blocks of a level, in their order.
        about: kept in the header of each file; what JSON can hold.
        facts: kept in the manifest; likewise.

    Raises:
        StorageError: another is writing, there is no room, or there are more blocks or less. What
            the folder had is as it was.
        TypeError: JSON cannot hold `about` or `facts`.
    """
    about, facts = json.loads(json.dumps([about, facts]))
    _make(folder)
    with locked(folder):
        return _write(folder, sizes, blocks, about, facts)


def edit_generation(
    folder: Path,
    older: Generation,
    blocks: Mapping[int, Sequence[int]],
    data: Callable[[int, int], Bytes],
) -> Generation:
    """Puts blocks in the place of others. The caller holds the lock.

    Args:
        folder: that has them.
        older: its generation.
        blocks: of each level that changes, which; each once.
        data: gives the new bytes of a block of a level.

    Raises:
        StorageError: there is no room; nothing is changed then. Or what was superseded cannot be
            erased now, which the error says.
    """
    changes = {level: tuple(some) for level, some in blocks.items() if some}
    if not changes:
        return _erase(folder, older)
    number, levels, superseded = _next_number(folder), dict(older.levels), list(older.superseded)
    for n, some in changes.items():
        for generation, records in levels[n].superseded_by(some).items():
            superseded.append(Superseded(n, generation, number, tuple(records)))
        levels[n] = replace(levels[n], parts=(*levels[n].parts, Part(number, some)))
    newer = replace(older, number=number, levels=levels, superseded=tuple(superseded))
    return _publish(folder, newer, lambda n: (data(n, block) for block in changes[n]))


def compact(folder: Path) -> Generation:
    """Writes levels whole if edits have made files beside them, and erases what nobody reads.

    Raises:
        StorageError: there is nothing, a block is damaged, another is writing, or there is no room.
    """
    with locked(folder):
        older = read_generation(folder)
        if all(len(level.parts) == 1 for level in older.levels.values()):
            return _erase(folder, older)
        sizes = {n: (level.count, level.block_bytes) for n, level in older.levels.items()}
        with OpenGeneration(folder, older) as files:
            return _write(
                folder,
                sizes,
                lambda n: (files.read(n, block) for block in range(sizes[n][0])),
                older.about,
                older.facts,
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes this the only writer of a folder; the lock ends with the process, however it ends.

    Raises:
        StorageError: another is writing, the folder is missing, or its lock cannot be opened.
    """
    if not folder.is_dir():
        raise StorageError(f"there is no memory bank in {folder}: no such folder")
    path = folder / _WRITER
    with naming(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with naming(path):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"another process or thread is writing the bank in {folder}; wait until it is "
                    "done"
                ) from error
        yield
    finally:
        os.close(handle)


def _write(
    folder: Path,
    sizes: Mapping[int, tuple[int, int]],
    blocks: Callable[[int], Iterable[Bytes]],
    about: dict[str, Any],
    facts: dict[str, Any],
) -> Generation:
    """A generation of which all files are new; the caller is the only writer."""
    number, superseded = _next_number(folder), tuple[Superseded, ...]()
    with suppress(StorageError):  # nothing that is broken is to be erased: its files are removed
        older = read_generation(folder)
        superseded = older.superseded + tuple(
            Superseded(n, part.generation, number, None)
            for n, level in older.levels.items()
            for part in level.parts
        )
    levels = {n: Level(*size, parts=(Part(number, None),)) for n, size in sizes.items()}
    return _publish(folder, Generation(number, about, facts, levels, superseded), blocks)


def _publish(
    folder: Path, newer: Generation, blocks: Callable[[int], Iterable[Bytes]]
) -> Generation:
    """Writes the files of a generation, then its manifest, then erases what it supersedes."""
    _remove_strays(folder, newer.number)
    try:
        for n, level in newer.levels.items():
            for part in level.parts:
                if part.generation == newer.number:
                    path = folder / file_name(n, newer.number)
                    write_records(path, newer.layout(n, part), blocks(n))
        path = folder / lock_name(newer.number)
        with naming(path), replacing(path):
            pass
        _write_manifest(folder, newer)
    except BaseException:
        _remove_strays(folder, newer.number)  # unless what failed came after the manifest
        raise
    return _erase(folder, newer)


def _erase(folder: Path, now: Generation) -> Generation:
    """Erases what no reader holds any more; the caller is the only writer."""
    older = {
        path: number
        for path, number in _numbered(folder).items()
        if path.suffix == ".lock" and number < now.number
    }
    held = {number for path, number in older.items() if _is_held(path)}
    left = tuple(
        s for s in now.superseded if any(s.generation <= number < s.until for number in held)
    )
    for gone in now.superseded:
        if gone not in left and gone.records is not None:
            _overwrite(folder / file_name(gone.level, gone.generation), gone)
    if left != now.superseded:
        now = replace(now, superseded=left)
        _write_manifest(folder, now)
    with suppress(OSError):  # what cannot be removed now, later
        for path, number in older.items():
            if number not in held:
                path.unlink(missing_ok=True)
    _remove_strays(folder, now.number)
    return now


def _is_held(path: Path) -> bool:
    """Whether somebody reads a generation that is not the newest, so that nobody else will."""
    with naming(path, then=_ERASED_LATER), open_regular(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _overwrite(path: Path, gone: Superseded) -> None:
    """Zeros in the place of records. What is no file of this bank any more is left alone."""
    try:
        file = RecordFile(path, "blocks")
    except StorageError:
        return
    file.close()
    named = (file.layout.about.get("level"), file.layout.about.get("generation"))
    if path.is_symlink() or named != (gone.level, gone.generation):
        return
    with naming(path, then=_ERASED_LATER), path.open("r+b") as out:
        for record in gone.records or ():
            if record < file.layout.count:
                out.seek(file.layout.offset(record))
                out.write(bytes(file.layout.stride))
        out.flush()
        os.fsync(out.fileno())


def _write_manifest(folder: Path, generation: Generation) -> None:
    path, data = folder / MANIFEST, generation.to_bytes()
    with naming(path, len(data)), replacing(path) as file:
        file.write(data)


def _remove_strays(folder: Path, number: int) -> None:
    """Removes files that the manifest does not name, and parts of files: what a crash has left.

    Where the manifest cannot be read, it may yet be repaired, and only files of the generation
    `number` are removed. What cannot be removed now, will be later.
    """
    with suppress(OSError):
        found = _numbered(folder)
        try:
            now = read_generation(folder)
            ours = now.names() | {lock_name(n) for n in found.values() if n <= now.number}
            strays = [path for path in found if path.name not in ours]
        except StorageError:
            exists = os.path.lexists(folder / MANIFEST)
            strays = [path for path, n in found.items() if n == number or not exists]
        for path in strays:
            path.unlink(missing_ok=True)
        remove_leftovers(folder)


def _next_number(folder: Path) -> int:
    """One that no file has."""
    return 1 + max(_numbered(folder).values(), default=0)


def _make(folder: Path) -> None:
    """Makes a folder and those above it, on disk when this returns."""
    if not folder.exists():
        _make(folder.parent)
        with naming(folder):
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)


def _numbered(folder: Path) -> dict[Path, int]:
    """Files of levels and locks of readers, and the generation of each."""
    found = {path: _NUMBERED.fullmatch(path.name) for path in folder.iterdir()}
    return {path: int(match[1] or match[2]) for path, match in found.items() if match}
