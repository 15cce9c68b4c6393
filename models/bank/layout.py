"""Where the blocks of one level lie in its file.

L places, k children of a node, r_l units of a block of level l, W numbers of a unit.

A file is a header of one page, checksums in whole pages, then one record per node. Nodes are in
tree order: the blocks below a node are neighbors in each file. A record is a block `[L, r_l, W]`
and zeros up to a page, so that a read that bypasses the system's cache needs no more than it asks.

    header    magic, bytes of the JSON, JSON, XXH3-64 of all that; zeros up to a page
    checksums XXH3-64 of those that follow, XXH3-64 of each record; zeros up to a page
    records   numbers of each block; zeros up to a page

All numbers are little-endian, lengths and checksums have 8 bytes. The checksum of a record is that
of its numbers, without the zeros after them, which nothing uses.

Numbers of a place lie unit by unit, so that blocks of several levels join along one axis for every
kind of block. Of the kind "ffn", a unit is its row of M1, its row of M2 and its column of M3, next
to each other. arXiv 2510.02375 leaves the order open.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mneme.layers.bank.memory_bank import BankShape
from mneme.layers.protocol import require_choice

PAGE = 4096
VERSION = 1
WORD = 8  # bytes of a length and of a checksum

Dtype = Literal["float32", "bfloat16", "float16"]
Bytes = bytes | bytearray | memoryview | np.ndarray


@dataclass(frozen=True)
class LevelLayout:
    """A level and its place in a bank; all sizes and offsets, in bytes, follow from these.

    Attributes:
        level: from 1, or 0 for the generic block.
        shape: of the bank.
        dtype: of stored numbers.
        router: hash of the router whose leaves these blocks were trained for, if known.
        base_model: hash of the model that was trained with them, if known.
        generation: which write of the bank this is.

    Raises:
        ValueError: there are no blocks at this level, or the dtype is another.
    """

    level: int
    shape: BankShape
    dtype: Dtype
    router: str | None
    base_model: str | None
    generation: int

    def __post_init__(self) -> None:
        """Checks the ranges."""
        require_choice(Dtype, dtype=self.dtype)
        if self.level not in levels_of(self.shape):
            raise ValueError(
                f"level {self.level} has no blocks; levels with blocks are {levels_of(self.shape)}"
            )

    @property
    def file_name(self) -> str:
        """In the folder of the bank."""
        return f"level{self.level}-{self.generation}.bank"

    @cached_property
    def nodes(self) -> int:
        """Blocks of this level, not bytes."""
        return self.shape.nodes(self.level)

    @cached_property
    def record_shape(self) -> tuple[int, int, int]:
        """`[L, r_l, W]`."""
        return self.shape.record(self.level)

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """Of stored numbers."""
        return getattr(torch, self.dtype)

    @cached_property
    def record_bytes(self) -> int:
        """Of the numbers of a block: what a checksum covers."""
        return prod(self.record_shape) * self.torch_dtype.itemsize

    @cached_property
    def stride(self) -> int:
        """From one record to the next: whole pages."""
        return _pages(self.record_bytes)

    @property
    def table(self) -> int:
        """Where the checksum of checksums lies, and those of records after it."""
        return PAGE

    def entry(self, node: int) -> int:
        """Where the checksum of a record lies."""
        return self.table + WORD * (1 + node)

    @cached_property
    def records(self) -> int:
        """Where the first record lies."""
        return self.table + _pages(WORD * (1 + self.nodes))

    def offset(self, node: int) -> int:
        """Where a record lies."""
        return self.records + node * self.stride

    @cached_property
    def file_bytes(self) -> int:
        """Of the whole file."""
        return self.offset(self.nodes)

    def encode(self, record: Float[Tensor, "places r w"]) -> memoryview:
        """The bytes of a block, `record_bytes` of them."""
        numbers = record.detach().to("cpu", self.torch_dtype).contiguous().view(-1)
        stored = numbers.view(self._integer).numpy().astype(self._stored, copy=False)
        return stored.view(np.uint8).data

    def decode(self, data: Bytes) -> Float[Tensor, "places r w"]:
        """A block of its bytes; what follows them is ignored.

        The block shares memory with `data` where that is writable, and is a copy otherwise.
        """
        count = prod(self.record_shape)
        stored = np.frombuffer(data, dtype=self._stored, count=count)
        numbers = stored.astype(self._stored.newbyteorder("="), copy=not stored.flags.writeable)
        return torch.from_numpy(numbers).view(self.torch_dtype).view(self.record_shape)

    @property
    def _integer(self) -> torch.dtype:
        """Of as many bytes as a number: NumPy has no bfloat16."""
        return {2: torch.int16, 4: torch.int32}[self.torch_dtype.itemsize]

    @property
    def _stored(self) -> np.dtype:
        return np.dtype(f"<i{self.torch_dtype.itemsize}")

    def to_json(self) -> dict[str, Any]:
        """What the header says: the fields, and the sizes for readers that do not derive them."""
        return {
            "version": VERSION,
            **asdict(self),
            "nodes": self.nodes,
            "record_bytes": self.record_bytes,
            "stride": self.stride,
            "checksums": self.table,
            "records": self.records,
            "file_bytes": self.file_bytes,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "LevelLayout":
        """Of what a header says.

        Raises:
            ValueError: sizes do not follow from the fields.
            KeyError, TypeError: fields are missing, or of another kind.
        """
        names = ("level", "dtype", "router", "base_model", "generation")
        fields = {name: found[name] for name in names}
        layout = cls(shape=shape_from_json(found["shape"]), **fields)
        for name, value in layout.to_json().items():
            if name != "shape" and found[name] != value:
                raise ValueError(f"{name} is {found[name]} and should be {value}")
        return layout


def levels_of(shape: BankShape) -> list[int]:
    """The levels that have a file: the generic block's, and each that has units."""
    return [0, *shape.levels]


def shape_from_json(found: dict[str, Any]) -> BankShape:
    """The sizes of a bank, from what `dataclasses.asdict` made of them."""
    return BankShape(**{**found, "hidden": tuple(found["hidden"])})


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
