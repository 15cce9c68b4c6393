"""What a bank folder says it holds, and what opening it checks."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank.errors import BankError
from mneme.models.bank.journal import JOURNAL, LEVEL_NAME, complete_edit
from mneme.models.bank.layout import PAGE, VERSION, Dtype, LevelLayout, levels_of, shape_from_json
from mneme.models.bank.level_file import LevelFile, require_version
from mneme.storage.regular_file import open_regular, read_regular

MANIFEST = "manifest.json"
_SHOWN = 12  # digits of a hash in a message
_TRIES = 5  # of reading a bank that changes each time

T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """A bank is what its manifest says: files that it does not name are no part of it.

    Attributes:
        generation: which write of the bank this is; names its files.
        shape: sizes.
        dtype: of stored numbers.
        router: hash of the router whose leaves the blocks were trained for; None if not known.
        base_model: hash of the model that was trained with them; None if not known.
        facts: of the caller, such as `{"step": 500}`; what JSON can hold.
    """

    generation: int
    shape: BankShape
    dtype: Dtype
    router: str | None
    base_model: str | None
    facts: dict[str, Any]

    @property
    def levels(self) -> list[int]:
        """The levels that have a file; 0 is the generic block."""
        return levels_of(self.shape)

    def layout(self, level: int) -> LevelLayout:
        """Where the blocks of a level lie in its file."""
        return LevelLayout(
            level, self.shape, self.dtype, self.router, self.base_model, self.generation
        )

    def to_bytes(self) -> bytes:
        """The file: JSON, with the files of all levels and a checksum of all other entries."""
        layouts = [self.layout(level) for level in self.levels]
        files = [{"name": layout.file_name, "bytes": layout.file_bytes} for layout in layouts]
        fields = {"version": VERSION, **asdict(self), "files": files}
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=2).encode()

    @classmethod
    def from_bytes(cls, path: Path, data: bytes) -> "Manifest":
        """What a file says.

        Raises:
            BankError: it is damaged, or of another version.
        """
        try:
            fields = json.loads(data)
            require_version(path, fields)
            if fields.pop("checksum") != _checksum(fields):
                raise ValueError("its checksum is not that of its entries")
            names = ("generation", "dtype", "router", "base_model", "facts")
            given = {name: fields[name] for name in names}
            return cls(shape=shape_from_json(fields["shape"]), **given)
        except BankError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BankError(
                f"{path} is damaged or was changed by hand ({error}); write the bank again"
            ) from error


def read_manifest(
    folder: Path, *, router: str | None = None, base_model: str | None = None
) -> Manifest:
    """What a bank holds. Completes an edit of it that a crash cut short (`mneme.models.bank.edit`).

    Args:
        folder: of the bank.
        router: hash of the router that will choose blocks; None does not compare.
        base_model: hash of the model that will use them; None does not compare.

    Raises:
        BankError: there is no bank, its manifest is damaged or of another version, or it was
            written for another router or base model.
    """
    complete_edit(folder)
    path = folder / MANIFEST
    try:
        data = read_regular(path)
    except FileNotFoundError as error:
        raise BankError(f"there is no memory bank in {folder}: it has no {MANIFEST}") from error
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror}") from error
    manifest = Manifest.from_bytes(path, data)
    _require_hash(folder, "router", manifest.router, router, "route with that router")
    _require_hash(
        folder, "base model", manifest.base_model, base_model, "use the weights of that base model"
    )
    return manifest


def open_level(folder: Path, manifest: Manifest, level: int) -> LevelFile:
    """The file of a level.

    Raises:
        BankError: it is missing, cannot be used, or is not of this bank.
    """
    expected = manifest.layout(level)
    file = LevelFile(folder / expected.file_name)
    for name, value in asdict(expected).items():
        found = asdict(file.layout)[name]
        if found != value:
            raise BankError(
                f"{file.path} is not of this bank: its {name} is {found}, and that of "
                f"{folder / MANIFEST} is {value}"
            )
    return file


def open_levels(
    folder: Path, *, router: str | None = None, base_model: str | None = None
) -> tuple[Manifest, dict[int, LevelFile]]:
    """A bank's manifest and the files of all its levels; as `read_manifest` otherwise.

    A bank that is written or edited at the same moment is opened anew, see `retrying`.

    Raises:
        BankError: as `read_manifest` and `LevelFile`, or a file is missing or of another bank.
    """

    def attempt() -> tuple[Manifest, dict[int, LevelFile]]:
        manifest = read_manifest(folder, router=router, base_model=base_model)
        return manifest, {level: open_level(folder, manifest, level) for level in manifest.levels}

    return retrying(folder, attempt)


def retrying(folder: Path, attempt: Callable[[], T]) -> T:
    """What an attempt to read a bank gives, when no other process changes the bank meanwhile.

    A bank that is written or edited may change between two reads of an attempt, which then takes a
    sound bank for a damaged one. An attempt that fails is made again if the bank has changed since
    it began, up to five times in all.

    Args:
        folder: of the bank.
        attempt: begins with the manifest; lets go of what it has opened where it fails.

    Raises:
        BankError: of the attempt.
    """
    for _ in range(_TRIES - 1):
        before = _state(folder)
        try:
            return attempt()
        except BankError:
            if _state(folder) == before and not (folder / JOURNAL).exists():
                raise
    return attempt()


def verify_bank(folder: Path) -> list[str]:
    """Reads and checks every record of a bank; returns all problems, none of a sound one.

    A bank that is written or edited at the same moment is read anew, see `retrying`.
    """

    def attempt() -> None:
        if problems := _problems(folder):
            raise _Unsound(problems)

    try:
        retrying(folder, attempt)
    except _Unsound as error:
        return error.problems
    return []


class _Unsound(BankError):
    """All problems of a bank."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _problems(folder: Path) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except BankError as error:
        return [str(error)]
    problems = []
    for level in manifest.levels:
        try:
            file = open_level(folder, manifest, level)
        except BankError as error:
            problems.append(str(error))
            continue
        for node in range(file.layout.nodes):
            try:
                file.read(node)
            except BankError as error:
                problems.append(str(error))
    return problems


def _state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Differs after a write or an edit of a bank.

    Files may change twice within a tick of the clock that stamps them. But each write has another
    generation, and each edit another checksum of checksums, which follows the header.
    """
    found = {}
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name == MANIFEST or LEVEL_NAME.fullmatch(path.name):
                with suppress(OSError), open_regular(path) as file:
                    found[path.name] = (path.stat().st_mtime_ns, file.read(2 * PAGE))
    return found


def _checksum(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())


def _require_hash(
    folder: Path, what: str, found: str | None, given: str | None, remedy: str
) -> None:
    if given is None or found == given:
        return
    known = f"for the {what} {found[:_SHOWN]}" if found else f"without naming its {what}"
    raise BankError(
        f"the bank in {folder} was written {known}, and is used with {given[:_SHOWN]}; {remedy}, "
        "or write a bank for this one"
    )
