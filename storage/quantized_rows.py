"""Rows of a table in 8 or 4 bits, and the file that holds them.

N rows, D values of a row, n rows of a call, s bytes of a row in the file.

A file is a head, zeros up to a page, then one record per row: its scale in fp32, its codes, and
zeros up to four bytes. The head has the sizes, a checksum of itself, and one of every block of
records.
"""

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mneme.storage.atomic_file import replacing
from mneme.storage.regular_file import open_regular

BLOCK_ROWS = 4096  # that are written at a time and share a checksum; another number, a new version

_MAGIC = b"mnemetab"
_VERSION = 1
_ORDER = 0x0102  # reads 0x0201 on a machine of the other byte order
_FIELDS = struct.Struct("=8sHHIQQI")  # magic, order, version, bits, N, D, checksum of checksums
_CHECKSUM = struct.Struct("=I")  # of the fields after them, then one per block
_SCALE = 4  # bytes
_PAGE = 4096
_LARGEST_CODE = {8: 127, 4: 7}
_NIBBLE_ZERO = 8  # added to 4-bit codes, so that none is negative


class TableFileError(ValueError):
    """A stored table that cannot be read as asked."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a stored table, in bytes where not said otherwise.

    Attributes:
        rows: N.
        dim: D.
        bits: of a value, 8 or 4.
    """

    rows: int
    dim: int
    bits: int

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if min(self.rows, self.dim) < 1:
            raise ValueError(f"rows and dim must be 1 or more, got {self.rows} and {self.dim}")
        if self.bits not in _LARGEST_CODE:
            raise ValueError(f"bits must be 8 or 4, got {self.bits}")

    @property
    def codes(self) -> int:
        """Of the codes of a row."""
        return self.dim if self.bits == 8 else -(-self.dim // 2)

    @property
    def record(self) -> int:
        """Of a row: its scale, its codes, and zeros, so that every scale is aligned."""
        return -(-(_SCALE + self.codes) // _SCALE) * _SCALE

    @property
    def blocks(self) -> int:
        """How many blocks have a checksum, not bytes."""
        return -(-self.rows // BLOCK_ROWS)

    @property
    def head(self) -> int:
        """Before the first record, whole pages."""
        fields = _FIELDS.size + _CHECKSUM.size * (1 + self.blocks)
        return -(-fields // _PAGE) * _PAGE

    @property
    def file(self) -> int:
        """Of the whole file."""
        return self.head + self.rows * self.record


def encode(rows: Float[Tensor, "n d"], bits: int, *, first: int = 0) -> UInt8[Tensor, "n s"]:
    """Records of rows: `scale = max |x| / L` and `code = round(x / scale)`, L = 127 or 7.

    No value is off by more than half the scale of its row. 4-bit codes go two to a byte, those of
    the second half of a row above those of the first. Scales are fp32: fp16 would be as accurate in
    its range, and saves two bytes a row, but turns small rows into zeros and large ones into inf.

    Args:
        rows: to be stored, finite.
        bits: 8 or 4.
        first: number of the first of them, for the message.

    Raises:
        ValueError: a row is not finite in fp32.
    """
    layout = Layout(len(rows), rows.shape[1], bits)
    rows = rows.detach().cpu().float()
    finite = rows.isfinite().all(1)
    if not finite.all():
        bad = first + int(finite.logical_not().nonzero()[0])
        raise ValueError(f"row {bad} of the table is not finite; only finite rows can be stored")
    scale = rows.abs().amax(1, keepdim=True) / _LARGEST_CODE[bits]
    codes = (
        (rows / torch.where(scale > 0, scale, 1))
        .round_()
        .clamp_(-_LARGEST_CODE[bits], _LARGEST_CODE[bits])
    )
    records = torch.zeros(layout.rows, layout.record, dtype=torch.uint8)
    records[:, :_SCALE] = scale.view(torch.uint8)
    packed = codes.to(torch.int8).view(torch.uint8) if bits == 8 else _pair_up(codes)
    records[:, _SCALE : _SCALE + layout.codes] = packed
    return records


def decode(records: UInt8[Tensor, "n s"], layout: Layout) -> Float[Tensor, "n d"]:
    """The rows, `scale * code`, in fp32."""
    scale = records.view(torch.float32)[:, :1]
    packed = records[:, _SCALE : _SCALE + layout.codes]
    if layout.bits == 8:
        return packed.view(torch.int8).to(torch.float32).mul_(scale)
    rows = torch.empty(len(records), layout.dim)
    half = layout.codes
    rows[:, :half] = packed & 15
    rows[:, half:] = (packed >> 4)[:, : layout.dim - half]
    return rows.sub_(_NIBBLE_ZERO).mul_(scale)


def _pair_up(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte; an odd width's last byte has a zero in its upper half."""
    unsigned = (codes + _NIBBLE_ZERO).to(torch.uint8)
    half = -(-codes.shape[1] // 2)
    packed = unsigned[:, :half].clone()
    packed[:, : codes.shape[1] - half] |= unsigned[:, half:] << 4
    return packed


def write_table(path: Path, table: Float[Tensor, "n d"], *, bits: int) -> None:
    """Stores a table, a block of rows at a time; a file of that name is replaced whole or not.

    Raises:
        ValueError: a row is not finite, or `bits` is neither 8 nor 4.
    """
    layout = Layout(len(table), table.shape[1], bits)
    checksums = []
    with replacing(path) as file:
        file.seek(layout.head)
        for start in range(0, layout.rows, BLOCK_ROWS):
            block = encode(table[start : start + BLOCK_ROWS], bits, first=start).numpy().data
            checksums.append(zlib.crc32(block))
            file.write(block)
        file.seek(0)
        file.write(_head(layout, np.array(checksums, dtype=np.uint32).tobytes()))


def _head(layout: Layout, checksums: bytes) -> bytes:
    fields = _FIELDS.pack(
        _MAGIC,
        _ORDER,
        _VERSION,
        layout.bits,
        layout.rows,
        layout.dim,
        zlib.crc32(checksums),
    )
    return fields + _CHECKSUM.pack(zlib.crc32(fields)) + checksums


class TableFile:
    """A stored table, mapped into memory for reading: what is read of it is the system's to drop.

    The map is read-only. A private writable one, which torch would make, counts as memory that may
    be needed in full, and the system may refuse that to a table larger than memory.

    Attributes:
        path: of the file.
        layout: of what is in it.

    Raises:
        TableFileError: there is no such file, it is cut short, of another kind, version or byte
            order, or its head is damaged. Damaged rows are found by `verify` only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self.layout, self._checksums = self._read_head(file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise TableFileError(f"there is no stored table at {path}") from error
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_RANDOM)  # neighbors of a row are not wanted with it
        records = np.frombuffer(self._map, dtype=np.uint8, offset=self.layout.head)
        self._records = records.reshape(self.layout.rows, self.layout.record)

    @property
    def checksum(self) -> int:
        """Of the checksums of all blocks: tells two tables of one shape apart."""
        return zlib.crc32(self._checksums.tobytes())

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Records `[n, s]` of rows."""
        return np.take(self._records, rows, axis=0)

    def verify(self) -> None:
        """Reads the whole file once.

        Raises:
            TableFileError: rows are not what was written.
        """
        for block, checksum in enumerate(self._checksums):
            first, end = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.layout.rows)
            if zlib.crc32(self._records[first:end].data) != checksum:
                raise TableFileError(
                    f"{self.path} is damaged in rows {first} to {end - 1}; store it again"
                )

    def _read_head(self, file: BinaryIO) -> tuple[Layout, np.ndarray]:
        """Sizes, and a checksum per block."""
        fields, own = file.read(_FIELDS.size), file.read(_CHECKSUM.size)
        if fields[: len(_MAGIC)] != _MAGIC[: len(fields)] or not fields:
            raise TableFileError(f"{self.path} is not a stored table")
        if len(own) < _CHECKSUM.size:
            raise TableFileError(f"{self.path} is cut short within its head; store it again")
        _, order, version, bits, rows, dim, of_checksums = _FIELDS.unpack(fields)
        if order != _ORDER:
            raise TableFileError(f"{self.path} was written on a machine of another byte order")
        if version != _VERSION:
            raise TableFileError(
                f"{self.path} has version {version} of the format; this one reads {_VERSION}"
            )
        if _CHECKSUM.pack(zlib.crc32(fields)) != own:
            raise TableFileError(f"the head of {self.path} is damaged; store the table again")
        layout = Layout(rows, dim, bits)
        found = os.fstat(file.fileno()).st_size
        if found != layout.file:
            raise TableFileError(
                f"{self.path} has {found:,} bytes where its {rows:,} rows of {dim} values in "
                f"{bits} bits need {layout.file:,}; store it again"
            )
        checksums = file.read(_CHECKSUM.size * layout.blocks)
        if zlib.crc32(checksums) != of_checksums:
            raise TableFileError(f"the head of {self.path} is damaged; store the table again")
        return layout, np.frombuffer(checksums, dtype=np.uint32)
