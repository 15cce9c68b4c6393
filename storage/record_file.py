"""One format of files of records, for blocks of megabytes and for small rows.

    header    magic, JSON, zeros, XXH3-64 of all that; one page
    checksums XXH3-64 of the rest of this part, XXH3-64 of each group of records; zeros up to a page
    records   one each `stride` bytes

A block has whole pages, so that a read that bypasses the system's cache needs no more than it asks,
and a checksum of its own. Rows follow each other closely, and 4,096 of them share a checksum. The
checksum is that of all bytes of its group, zeros after a block included. All values are
little-endian; lengths and checksums have 8 bytes.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import xxhash
from jaxtyping import UInt64
from torch import Tensor

from mneme.storage.files import StorageError, naming, open_regular, replacing

PAGE = 4096
VERSION = 2
GROUP_ROWS = 4096  # that share a checksum; another value, a new version

Kind = Literal["blocks", "rows"]
Dtype = Literal["float32", "bfloat16", "float16"]
Bytes = bytes | bytearray | memoryview

AGAIN = {
    "blocks": "save the bank again from its run, or train on",
    "rows": "store the table again",
}
_NAMES = {"blocks": "a level of a memory bank", "rows": "a stored table"}
_MAGIC = b"mnemerec"
_OLD = {b"mnemebnk": "blocks", b"mnemetab": "rows"}  # magics of version 1
_WORD = np.dtype("<u8")


@dataclass(frozen=True)
class Layout:
    """What a file of records holds; all sizes and offsets, in bytes, follow from this.

    Attributes:
        kind: "blocks" or "rows".
        count: records.
        record_bytes: of a record.
        about: of the writer, kept in the header; what JSON can hold.
    """

    kind: Kind
    count: int
    record_bytes: int
    about: dict[str, Any]

    def __post_init__(self) -> None:
        """Checks the ranges, as a header may come from anywhere."""
        sizes = (self.count, self.record_bytes)
        found = self.kind in AGAIN and isinstance(self.about, dict)
        if not found or any(type(n) is not int or n < 1 for n in sizes):
            raise ValueError(f"there are no {sizes[0]} {self.kind} of {sizes[1]} bytes")

    @cached_property
    def stride(self) -> int:
        """From one record to the next."""
        return _pages(self.record_bytes) if self.kind == "blocks" else self.record_bytes

    @property
    def group(self) -> int:
        """Records that share a checksum, not bytes."""
        return 1 if self.kind == "blocks" else GROUP_ROWS

    @property
    def groups(self) -> int:
        """How many there are, not bytes."""
        return -(-self.count // self.group)

    def group_bytes(self, group: int) -> int:
        """Of a group, the last of which may be smaller."""
        return min(self.group, self.count - group * self.group) * self.stride

    @cached_property
    def records(self) -> int:
        """Where the first record lies."""
        return PAGE + _pages(_WORD.itemsize * (1 + self.groups))

    def offset(self, record: int) -> int:
        """Where a record lies."""
        return self.records + record * self.stride

    @property
    def file_bytes(self) -> int:
        """Of the whole file."""
        return self.offset(self.count)

    def to_json(self) -> dict[str, Any]:
        """What the header says: the fields, and the sizes for readers that do not derive them."""
        derived = ("stride", "group", "records", "file_bytes")
        sizes = {name: getattr(self, name) for name in derived}
        return {"version": VERSION, **asdict(self), "checksums": PAGE, **sizes}

    def header(self) -> bytes:
        """The first page.

        Raises:
            StorageError: it does not fit.
        """
        fields = _MAGIC + json.dumps(self.to_json()).encode()
        room = PAGE - _WORD.itemsize
        if len(fields) > room:
            raise StorageError(
                f"the header needs {len(fields):,} bytes and may have {room:,}; shorten what it "
                "says about the records, such as hashes"
            )
        return _sealed(fields.ljust(room, b"\0"))


def write_records(path: Path, layout: Layout, groups: Iterable[Bytes]) -> None:
    """Writes a file; one of that name is replaced whole or not at all.

    Args:
        path: of the file.
        layout: of what is in it.
        groups: the bytes of each group of records, in order; zeros are put after a block.

    Raises:
        StorageError: there is no room, the header does not fit, or there are more groups or less.
    """
    header, checksums, written = layout.header(), np.zeros(layout.groups, _WORD), 0
    with naming(path, layout.file_bytes), replacing(path) as file:
        file.seek(layout.records)
        for data in groups:
            written += 1
            if written > layout.groups:
                break
            padding = bytes(layout.group_bytes(written - 1) - memoryview(data).nbytes)
            checksum = xxhash.xxh3_64(data)
            checksum.update(padding)
            checksums[written - 1] = checksum.intdigest()
            file.write(data)
            file.write(padding)
        if written != layout.groups:
            given = "more" if written > layout.groups else f"only {written}"
            raise StorageError(f"{path} needs {layout.groups} {layout.kind}; {given} were given")
        file.seek(0)
        file.write(header)
        table = checksums.tobytes().ljust(layout.records - PAGE - _WORD.itemsize, b"\0")
        file.write(_digest(table) + table)


class RecordFile:
    """An open file of records, its header and checksums read. Its records stay in the file.

    Args:
        path: what `write_records` wrote.
        kind: that is needed.

    Attributes:
        path: of the file.
        layout: of what is in it.
        checksums: of the groups of records, in their order.

    Raises:
        StorageError: there is no such file, it is cut short, of another kind or version, or its
            header or checksums are damaged. Damaged records are found when they are read.
    """

    path: Path
    layout: Layout
    checksums: UInt64[np.ndarray, " groups"]

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path = path
        try:
            self.file = open_regular(path)
        except OSError as error:
            what = f"cannot open {path}, {_NAMES[kind]}: {error.strerror}"
            raise StorageError(f"{what}; {AGAIN[kind]}") from error
        try:
            self.layout = _read_header(path, self.file, kind)
            self.checksums = _read_checksums(path, self.file, self.layout)
        except OSError as error:
            self.file.close()
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        except StorageError:
            self.file.close()
            raise

    def close(self) -> None:
        """Lets go of the file; there is no reading after that."""
        self.file.close()

    def read(self, group: int) -> memoryview:
        """The bytes of a group of records, compared with their checksum.

        Raises:
            StorageError: they cannot be read, or are damaged.
        """
        data = bytearray(self.layout.group_bytes(group))
        try:
            self.file.seek(self.layout.offset(group * self.layout.group))
            found = self.file.readinto(data)  # type: ignore[attr-defined]
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror}") from error
        self.check(group, memoryview(data)[:found])
        return memoryview(data)

    def check(self, group: int, data: Bytes) -> None:
        """Compares the bytes of a group of records with their checksum.

        Raises:
            StorageError: they are not what was written, or not all of it.
        """
        needed, found = self.layout.group_bytes(group), memoryview(data).nbytes
        if found < needed:
            raise StorageError(
                f"{self.path} has {found:,} bytes of {self._named(group)}, which needs {needed:,}; "
                "was the file cut while it was open?"
            )
        if xxhash.xxh3_64_intdigest(data) != self.checksums[group]:
            again = AGAIN[self.layout.kind]
            raise StorageError(f"{self.path} is damaged in {self._named(group)}; {again}")

    def _named(self, group: int) -> str:
        first = group * self.layout.group
        last = min(first + self.layout.group, self.layout.count) - 1
        return f"block {group}" if self.layout.kind == "blocks" else f"rows {first} to {last}"


def require_version(what: object, version: object, kind: Kind) -> None:
    """Raises StorageError for another version of the format, with how to get one of this."""
    if version != VERSION:
        raise StorageError(
            f"{what} has version {version} of the format, and this program reads {VERSION}; "
            f"{AGAIN[kind]}"
        )


def tensor_bytes(tensor: Tensor, dtype: Dtype) -> memoryview:
    """The bytes of a tensor's elements in a dtype, as files have them."""
    stored = getattr(torch, dtype)
    elements = tensor.detach().to("cpu", stored).contiguous().view(-1)
    integer = {2: torch.int16, 4: torch.int32}[stored.itemsize]  # NumPy has no bfloat16
    array = elements.view(integer).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def tensor_of(data: Bytes, dtype: Dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of its bytes; what follows them is ignored.

    It shares memory with `data` where that is writable, and is a copy otherwise.
    """
    stored = getattr(torch, dtype)
    array = np.frombuffer(data, dtype=f"<i{stored.itemsize}", count=prod(shape))
    native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
    return torch.from_numpy(native).view(stored).view(shape)


def _read_header(path: Path, file: BinaryIO, kind: Kind) -> Layout:
    """What a file says of itself; magic, JSON and checksum are where they are in every version."""
    page, found = file.read(PAGE), os.fstat(file.fileno()).st_size
    magic = page[: len(_MAGIC)]
    if magic in _OLD:
        require_version(path, 1, _OLD[magic])  # type: ignore[arg-type]
    if not magic or magic != _MAGIC[: len(magic)]:
        raise StorageError(f"{path} is not {_NAMES[kind]}; {AGAIN[kind]}")
    if len(page) < PAGE:
        raise StorageError(
            f"{path} is cut short: it has {found:,} bytes, its header alone {PAGE:,}; {AGAIN[kind]}"
        )
    body = page[: -_WORD.itemsize]
    if _sealed(body) != page:
        raise StorageError(f"the header of {path} is damaged; {AGAIN[kind]}")
    fields = json.loads(body[len(_MAGIC) :].rstrip(b"\0"))
    require_version(path, fields["version"], kind)
    try:
        layout = Layout(*(fields.get(name) for name in ("kind", "count", "record_bytes", "about")))
    except ValueError as error:
        raise StorageError(f"the header of {path} contradicts itself: {error}") from error
    if layout.to_json() != fields:
        raise StorageError(f"the header of {path} contradicts itself; {AGAIN[kind]}")
    if layout.kind != kind:
        raise StorageError(f"{path} is {_NAMES[layout.kind]}, not {_NAMES[kind]}")
    if found != layout.file_bytes:
        raise StorageError(
            f"{path} has {found:,} bytes where its {layout.count:,} {kind} of {layout.stride:,} "
            f"need {layout.file_bytes:,}; {AGAIN[kind]}"
        )
    return layout


def _read_checksums(path: Path, file: BinaryIO, layout: Layout) -> np.ndarray:
    own, table = file.read(_WORD.itemsize), file.read(layout.records - PAGE - _WORD.itemsize)
    if _digest(table) != own:
        raise StorageError(f"the checksums in {path} are damaged; {AGAIN[layout.kind]}")
    return np.frombuffer(table, _WORD, count=layout.groups).astype(np.uint64, copy=False)


def _digest(data: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(data).to_bytes(_WORD.itemsize, "little")


def _sealed(data: bytes) -> bytes:
    """With its checksum after it."""
    return data + _digest(data)


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
