"""The file of one level of a memory bank: what is checked on opening it and on reading."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from jaxtyping import Float, UInt64
from torch import Tensor

from mneme.models.bank.errors import BankError
from mneme.models.bank.layout import PAGE, VERSION, WORD, Bytes, LevelLayout
from mneme.storage.regular_file import open_regular

_MAGIC = b"mnemebnk"
_LONGEST = 2**20  # bytes of JSON in a header, in any version
_WORD = np.dtype("<u8")


class LevelFile:
    """A level's header and checksums. Its records stay in the file.

    Checksums are those of when the file was opened. A record that was edited since then has
    another: open the file again after `mneme.models.bank.edit`.

    Args:
        path: what `write_bank` wrote.

    Attributes:
        path: of the file.
        layout: where its records lie.
        checksums: of the records, in their order.

    Raises:
        BankError: there is no such file, it is cut short, of another kind or version, or its header
            or checksums are damaged. Damaged records are found when they are read.
    """

    path: Path
    layout: LevelLayout
    checksums: UInt64[np.ndarray, " nodes"]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self.layout = read_header(path, file)
                self.checksums = _read_checksums(path, file, self.layout)
        except OSError as error:
            raise BankError(f"cannot open {path}, a level of a bank: {error.strerror}") from error

    def check(self, node: int, data: Bytes) -> None:
        """Compares a record with its checksum.

        Args:
            node: whose record it is.
            data: the record; zeros may follow it.

        Raises:
            BankError: it is not what was written, or not all of it.
        """
        size = self.layout.record_bytes
        found = np.frombuffer(data, dtype=np.uint8)[:size].data
        if found.nbytes < size:
            raise BankError(
                f"record {node} of {self.path} has {size:,} bytes, of which {found.nbytes:,} "
                "were read; was the file cut while it was open?"
            )
        if xxhash.xxh3_64_intdigest(found) != self.checksums[node]:
            raise BankError(
                f"record {node} of {self.path} is damaged: its checksum is not that of its "
                "bytes. Replace the block, or write the bank again; or it was edited after this "
                "file was opened: open the bank again"
            )

    def require_node(self, node: int) -> None:
        """Raises BankError where there is no such block."""
        if not 0 <= node < self.layout.nodes:
            raise BankError(f"{self.path} has blocks 0 to {self.layout.nodes - 1}, and no {node}")

    def read(self, node: int) -> Float[Tensor, "places r w"]:
        """A block, checked.

        Raises:
            BankError: there is no such block, or it is damaged.
        """
        self.require_node(node)
        layout = self.layout
        data = bytearray(layout.record_bytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(layout.offset(node))
                found = _read_into(file, data)
        except OSError as error:
            raise BankError(f"cannot read record {node} of {self.path}: {error}") from error
        self.check(node, memoryview(data)[:found])
        return layout.decode(data)


def require_version(path: Path, fields: Mapping[str, Any]) -> None:
    """Raises BankError for a file of another version of the format."""
    if (version := fields.get("version")) != VERSION:
        raise BankError(f"{path} has version {version} of the format; this program reads {VERSION}")


def read_header(path: Path, file: BinaryIO) -> LevelLayout:
    """What a file says of itself; magic, JSON and checksum are where they are in every version.

    Raises:
        BankError: it is not a level of a bank, damaged, of another version, or of another length.
    """
    found = os.fstat(file.fileno()).st_size
    magic, length = file.read(len(_MAGIC)), file.read(WORD)
    if not magic or magic != _MAGIC[: len(magic)]:
        raise BankError(f"{path} is not a level of a memory bank")
    size = int.from_bytes(length, "little")
    if found < PAGE:
        raise BankError(f"{path} is cut short: it has {found:,} bytes, its header alone {PAGE:,}")
    text = file.read(size) if size <= _LONGEST else b""
    if _checksum(magic + length + text) != file.read(WORD):
        raise BankError(f"the header of {path} is damaged; write the bank again")
    fields = json.loads(text)
    require_version(path, fields)
    try:
        layout = LevelLayout.from_json(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise BankError(f"the header of {path} contradicts itself: {error}") from error
    if found != layout.file_bytes:
        raise BankError(
            f"{path} has {found:,} bytes where its {layout.nodes:,} records of {layout.stride:,} "
            f"need {layout.file_bytes:,}; write the bank again"
        )
    return layout


def header(layout: LevelLayout) -> bytes:
    """The header page of a level.

    Raises:
        BankError: it does not fit.
    """
    text = json.dumps(layout.to_json()).encode()
    fields = _MAGIC + len(text).to_bytes(WORD, "little") + text
    if len(fields) + WORD > PAGE:
        raise BankError(
            f"the header of {layout.file_name} needs {len(fields) + WORD:,} bytes and may have "
            f"{PAGE:,}; give shorter hashes of router and base model"
        )
    return (fields + _checksum(fields)).ljust(PAGE, b"\0")


def checksum_table(checksums: UInt64[np.ndarray, " nodes"]) -> bytes:
    """The checksums of records, and their own before them."""
    table = words(checksums)
    return _checksum(table) + table


def words(checksums: UInt64[np.ndarray, " n"]) -> bytes:
    """Checksums as they are stored."""
    return checksums.astype(_WORD, copy=False).tobytes()


def _checksum(data: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(data).to_bytes(WORD, "little")


def _read_into(file: BinaryIO, data: bytearray) -> int:
    """Fills `data`, or less where the file ends; one call may give less than it could."""
    view, found = memoryview(data), 0
    while count := file.readinto(view[found:]):  # type: ignore[attr-defined]
        found += count
    return found


def _read_checksums(path: Path, file: BinaryIO, layout: LevelLayout) -> np.ndarray:
    file.seek(layout.table)
    own, table = file.read(WORD), file.read(WORD * layout.nodes)
    if _checksum(table) != own:
        raise BankError(f"the checksums of records in {path} are damaged; write the bank again")
    return np.frombuffer(table, dtype=_WORD).astype(np.uint64, copy=False)
