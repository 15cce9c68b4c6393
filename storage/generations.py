"""Folders of blocks in generations: each is written whole or edited, and read as it was.

A folder has levels, each of them numbered blocks of one size, and a manifest. Every write and every
edit makes new files, then replaces the manifest, and so begins a new generation. A write makes a
file of each level. An edit makes a file of the new blocks of each level that it changes, beside the
older ones; the manifest says which file has which block. No file that a manifest names is changed,
so that a crash leaves the older generation or the newer one, whole.

Who reads holds a shared lock of its generation, and keeps all of that generation until it is
closed, whatever is edited meanwhile. Blocks that were superseded are overwritten with zeros, and
files removed, as soon as nobody holds a generation that had them: by the edit itself, or by the
next one. Until then the manifest names them. There is one writer at a time.

    manifest.json           of the newest generation, replaced whole
    levelL-G.bank           blocks of level L that generation G wrote
    generation-G.lock       held by readers of generation G
    .lock                   held by the writer
"""

import fcntl
import json
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from mneme.storage.files import StorageError, open_regular, read_regular
from mneme.storage.record_file import AGAIN, VERSION, Layout, RecordFile, require_version

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Part:
    """A file of a level.

    Attributes:
        generation: that wrote it.
        blocks: which it has, in the order of the file; None for all of the level.
    """

    generation: int
    blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class Level:
    """Blocks of one size.

    Attributes:
        count: of blocks.
        block_bytes: of each.
        parts: its files; of a block that several have, the last one's counts.
    """

    count: int
    block_bytes: int
    parts: tuple[Part, ...]

    def place(self, block: int) -> tuple[Part, int]:
        """The part that has a block, and its record there."""
        return self._patched.get(block, (self.parts[0], block))

    def superseded_by(self, blocks: Iterable[int]) -> dict[int, list[int]]:
        """The records of each part, by its generation, that others are to replace."""
        found: dict[int, list[int]] = {}
        for part, record in map(self.place, blocks):
            found.setdefault(part.generation, []).append(record)
        return found

    @cached_property
    def _patched(self) -> dict[int, tuple[Part, int]]:
        return {b: (part, i) for part in self.parts for i, b in enumerate(part.blocks or ())}


@dataclass(frozen=True)
class Superseded:
    """What is to be erased when nobody can read it any more.

    Attributes:
        level: of the file.
        generation: that wrote the file.
        until: the first generation without it.
        records: to be overwritten; None for a file that is to be removed.
    """

    level: int
    generation: int
    until: int
    records: tuple[int, ...] | None


@dataclass(frozen=True)
class Generation:
    """What a manifest says.

    Attributes:
        number: of the generation.
        about: of the writer, also in the header of each file; what JSON can hold.
        facts: of the writer, in the manifest only; likewise.
        levels: by number.
        superseded: in older generations, and not erased yet.
    """

    number: int
    about: dict[str, Any]
    facts: dict[str, Any]
    levels: dict[int, Level]
    superseded: tuple[Superseded, ...]

    def layout(self, level: int, part: Part) -> Layout:
        """Of one of its files."""
        found = self.levels[level]
        count = found.count if part.blocks is None else len(part.blocks)
        about = {"level": level, "generation": part.generation, **self.about}
        return Layout("blocks", count, found.block_bytes, about)

    def names(self) -> set[str]:
        """Of all files that are read or are still to be erased."""
        read = {(n, part.generation) for n, level in self.levels.items() for part in level.parts}
        return {file_name(*at) for at in read | {(s.level, s.generation) for s in self.superseded}}

    def to_bytes(self) -> bytes:
        """The manifest: JSON, with a checksum of all other entries."""
        fields = {"version": VERSION, **asdict(self)}
        fields = json.loads(json.dumps(fields))  # keys of levels become text
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=2).encode()

    @classmethod
    def from_bytes(cls, path: Path, data: bytes) -> "Generation":
        """What a manifest says.

        Raises:
            StorageError: it is damaged, or of another version.
        """
        try:
            fields = json.loads(data)
            require_version(path, fields.pop("version"), "blocks")
            if fields.pop("checksum") != _checksum({"version": VERSION, **fields}):
                raise ValueError("its checksum is not that of its entries")
            levels = {int(n): _level(found) for n, found in fields.pop("levels").items()}
            superseded = tuple(
                Superseded(
                    int(s["level"]), int(s["generation"]), int(s["until"]), _ints(s["records"])
                )
                for s in fields.pop("superseded")
            )
            return cls(**fields, levels=levels, superseded=superseded)
        except StorageError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{path} is damaged or was changed by hand ({error}); {AGAIN['blocks']}"
            ) from error


class OpenGeneration(AbstractContextManager["OpenGeneration"]):
    """A generation of a folder, for reading until it is closed.

    Args:
        folder: that has it.
        generation: its manifest.
        lock: held meanwhile; the only writer needs none.

    Attributes:
        folder, generation: likewise.
    """

    def __init__(self, folder: Path, generation: Generation, lock: BinaryIO | None = None) -> None:
        self.folder, self.generation, self._lock = folder, generation, lock
        self._files: dict[tuple[int, int], RecordFile] = {}

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the generation and its files."""
        for file in self._files.values():
            file.close()
        if self._lock is not None:
            self._lock.close()

    def open_files(self) -> None:
        """Opens all files.

        Raises:
            StorageError: one is missing, cannot be used, or is not of this generation.
        """
        for number, level in self.generation.levels.items():
            for part in level.parts:
                self.file(number, part)

    def file(self, level: int, part: Part) -> RecordFile:
        """The file of a part, opened once; errors as those of `open_files`."""
        key = level, part.generation
        if key not in self._files:
            expected = self.generation.layout(level, part)
            self._files[key] = _open_file(self.folder / file_name(*key), expected)
        return self._files[key]

    def place(self, level: int, block: int) -> tuple[RecordFile, int]:
        """The file that has a block, and its record there."""
        part, record = self.generation.levels[level].place(block)
        return self.file(level, part), record

    def read(self, level: int, block: int) -> memoryview:
        """The bytes of a block, with zeros after them, checked.

        Raises:
            StorageError: they cannot be read, or are damaged.
        """
        file, record = self.place(level, block)
        return file.read(record)

    def problems(self) -> list[str]:
        """Reads and checks every block; returns all problems, none of a sound folder."""
        found: dict[str, None] = {}  # of a file that cannot be used, every block says the same
        for number, level in self.generation.levels.items():
            for block in range(level.count):
                try:
                    self.read(number, block)
                except StorageError as error:
                    found[str(error)] = None
        return list(found)


def read_generation(folder: Path) -> Generation:
    """What the manifest of a folder says now.

    Raises:
        StorageError: there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        return Generation.from_bytes(path, read_regular(path))
    except FileNotFoundError as error:
        raise StorageError(f"there is no memory bank in {folder}: it has no {MANIFEST}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def hold_generation(folder: Path) -> OpenGeneration:
    """The newest generation, to be read as it is now until it is closed.

    Its lock is taken while it is the newest, so that nothing of it can have been erased.

    Raises:
        StorageError: there is none, or its manifest is damaged or of another version.
    """
    while True:
        found = read_generation(folder)
        path, refused = folder / lock_name(found.number), None
        with ExitStack() as opened:
            try:
                lock = opened.enter_context(open_regular(path))
                fcntl.flock(lock, fcntl.LOCK_SH)
            except OSError as error:  # it is removed when the generation is no longer the newest
                refused = error
            now = read_generation(folder)
            if now.number != found.number:
                continue
            if refused is not None:
                raise StorageError(
                    f"cannot lock {path}, as readers do: {refused.strerror}; if there is none, "
                    "make an empty file of that name"
                ) from refused
            opened.pop_all()
            return OpenGeneration(folder, now, lock)


def _open_file(path: Path, expected: Layout) -> RecordFile:
    file = RecordFile(path, "blocks")
    if file.layout != expected:
        file.close()
        ours, found = ({**asdict(x), **x.about} for x in (expected, file.layout))
        names = [*expected.about, "count", "record_bytes"]
        differs = next((name for name in names if found.get(name) != ours[name]), "about")
        raise StorageError(
            f"{path} is not of this bank: its {differs} is {found.get(differs)}, and that of "
            f"{path.parent / MANIFEST} is {ours[differs]}"
        )
    return file


def file_name(level: int, generation: int) -> str:
    """Of a level's blocks that a generation wrote."""
    return f"level{level}-{generation}.bank"


def lock_name(generation: int) -> str:
    """Of what readers of a generation lock."""
    return f"generation-{generation}.lock"


def _level(found: dict[str, Any]) -> Level:
    """A level, from JSON."""
    count = int(found["count"])
    parts = tuple(Part(int(p["generation"]), _ints(p["blocks"])) for p in found["parts"])
    whole, *patches = parts
    if whole.blocks is not None or any(
        not p.blocks or not 0 <= min(p.blocks) <= max(p.blocks) < count for p in patches
    ):
        raise ValueError("its files do not have the blocks of a level")
    return Level(count, int(found["block_bytes"]), parts)


def _ints(found: list[Any] | None) -> tuple[int, ...] | None:
    return None if found is None else tuple(map(int, found))


def _checksum(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())
