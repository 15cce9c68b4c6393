"""Rows of a table in 8 or 4 bits, and the file that holds them.

N rows, D values of a row, n rows of a call, s bytes of a row in the file.

A file of rows (`mneme.storage.record_file`) has for each its scale in fp32, its codes, and zeros up
to four bytes.
"""

import mmap
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from jaxtyping import Float, UInt8
from torch import Tensor

from mneme.storage.files import StorageError
from mneme.storage.record_file import AGAIN, GROUP_ROWS, Layout, RecordFile, write_records

_SCALE = 4  # bytes
_LARGEST_CODE = {8: 127, 4: 7}
_NIBBLE_ZERO = 8  # added to 4-bit codes, so that none is negative


@dataclass(frozen=True)
class RowFormat:
    """How a row is stored.

    Attributes:
        dim: D.
        bits: of a value, 8 or 4.

    Raises:
        ValueError: they are out of range.
    """

    dim: int
    bits: int

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if type(self.dim) is not int or self.dim < 1:
            raise ValueError(f"dim must be 1 or more, got {self.dim}")
        if self.bits not in _LARGEST_CODE:
            raise ValueError(f"bits must be 8 or 4, got {self.bits}")

    @property
    def codes(self) -> int:
        """Bytes of the codes of a row."""
        return self.dim if self.bits == 8 else -(-self.dim // 2)

    @property
    def record_bytes(self) -> int:
        """Bytes of a row: its scale, its codes, and zeros, so that every scale is aligned."""
        return -(-(_SCALE + self.codes) // _SCALE) * _SCALE


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
    row = RowFormat(rows.shape[1], bits)
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
    records = torch.zeros(len(rows), row.record_bytes, dtype=torch.uint8)
    little = scale.numpy().astype("<f4", copy=False)
    records[:, :_SCALE] = torch.from_numpy(little.view(np.uint8))
    packed = codes.to(torch.int8).view(torch.uint8) if bits == 8 else _pair_up(codes)
    records[:, _SCALE : _SCALE + row.codes] = packed
    return records


def decode(records: UInt8[Tensor, "n s"], row: RowFormat) -> Float[Tensor, "n d"]:
    """The rows, `scale * code`, in fp32."""
    little = records.numpy().view("<f4")[:, :1]
    scale = torch.from_numpy(little.astype(np.float32, copy=False))
    packed = records[:, _SCALE : _SCALE + row.codes]
    if row.bits == 8:
        return packed.view(torch.int8).to(torch.float32).mul_(scale)
    rows = torch.empty(len(records), row.dim)
    half = row.codes
    rows[:, :half] = packed & 15
    rows[:, half:] = (packed >> 4)[:, : row.dim - half]
    return rows.sub_(_NIBBLE_ZERO).mul_(scale)


def _pair_up(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte; an odd width's last byte has a zero in its upper half."""
    unsigned = (codes + _NIBBLE_ZERO).to(torch.uint8)
    half = -(-codes.shape[1] // 2)
    packed = unsigned[:, :half].clone()
    packed[:, : codes.shape[1] - half] |= unsigned[:, half:] << 4
    return packed


def write_table(path: Path, table: Float[Tensor, "n d"], *, bits: int) -> None:
    """Stores a table, a group of rows at a time; a file of that name is replaced whole or not.

    Raises:
        ValueError: a row is not finite, or `bits` is neither 8 nor 4.
        StorageError: there is no room, or another problem with the file.
    """
    row = RowFormat(table.shape[1], bits)
    layout = Layout("rows", len(table), row.record_bytes, asdict(row))
    groups = (
        encode(table[first : first + GROUP_ROWS], bits, first=first).numpy().data.cast("B")
        for first in range(0, len(table), GROUP_ROWS)
    )
    write_records(path, layout, groups)


class TableFile(RecordFile):
    """A stored table, mapped into memory for reading: what is read of it is the system's to drop.

    A call reads thousands of small rows, which is one step through a map and a call of the system
    for each otherwise. The map is read-only. A private writable one, which torch would make, counts
    as memory that may be needed in full, and the system may refuse that to a table larger than
    memory.

    Attributes:
        path: of the file.
        row: how a row is stored.

    Raises:
        StorageError: there is no such file, it is cut short, of another kind or version, or its
            head is damaged. Damaged rows are found by `verify` only.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rows")
        try:
            self.row = RowFormat(**self.layout.about)
            if self.row.record_bytes != self.layout.record_bytes:
                raise ValueError(f"its rows have {self.layout.record_bytes} bytes")
        except (TypeError, ValueError) as error:
            again = AGAIN["rows"]
            raise StorageError(
                f"the header of {path} contradicts itself: {error}; {again}"
            ) from error
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self.file.close()  # the map stays
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_RANDOM)  # neighbors of a row are not wanted with it
        records = np.frombuffer(mapped, dtype=np.uint8, offset=self.layout.records)
        self._records = records.reshape(self.layout.count, self.layout.record_bytes)

    @property
    def checksum(self) -> int:
        """Of the checksums of all rows: tells two tables of one shape apart."""
        return xxhash.xxh3_64_intdigest(self.checksums.data)

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Records `[n, s]` of rows."""
        return np.take(self._records, rows, axis=0)

    def verify(self) -> None:
        """Reads the whole file once.

        Raises:
            StorageError: rows are not what was written.
        """
        for group in range(self.layout.groups):
            first = group * self.layout.group
            self.check(group, self._records[first : first + self.layout.group].data)
