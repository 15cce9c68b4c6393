"""Tables that are read from files: for serving a model whose tables are larger than memory.

N rows, D width, m rows of a token, T tokens, n distinct rows of a call, s bytes of a stored row.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mneme.layers.protocol import require_at_least
from mneme.layers.sparse.table import SharedTable, Table
from mneme.ops.contract import uncompiled
from mneme.ops.table_read import dot_rows, sum_rows
from mneme.storage.caches import RowCache
from mneme.storage.files import StorageError
from mneme.storage.quantized_rows import TableFile, decode, write_table

CACHE_BYTES = 16 * 2**20
_LARGEST = 2**24  # elements of decoded rows at a time, 64 MiB


@dataclass
class RowReads:
    """What reading has come to so far.

    Attributes:
        rows: distinct rows of calls.
        cached: those of them that were in the cache.
        file_bytes: of records read from the file; the system reads whole pages around them.
        seconds: looking them up, reading and decoding them.
    """

    rows: int = 0
    cached: int = 0
    file_bytes: int = 0
    seconds: float = 0.0


class StoredTable(nn.Module):
    """A table of a file, read as a `Table` is, without a gradient and without being in memory.

    Of a call only its distinct rows are read and decoded. The results are those of a `Table` of the
    decoded rows: sums to the bit, and products where D is a multiple of 16; at other widths the
    library adds up a product in an order that depends on where in memory a row begins.

    Records of rows that were read lately are kept as they are in the file, so that the cache holds
    4 or 8 times as many rows as it would in fp32.

    Args:
        path: what `write_table` wrote.
        shape: N and D that the file must have; None takes what it has.
        cache_bytes: all that the cache may allocate; 0 keeps nothing.

    Attributes:
        reads: counters, which the caller may set back to `RowReads()`.

    Raises:
        StorageError: the file cannot be used, or has another shape.
    """

    def __init__(
        self, path: Path, *, shape: tuple[int, int] | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        super().__init__()
        require_at_least(0, cache_bytes=cache_bytes)
        self.file = TableFile(path)
        rows, dim = self.file.layout.count, self.file.row.dim
        if shape is not None and shape != (rows, dim):
            raise StorageError(
                f"{path} has {rows:,} rows of {dim} values; the layer reads {shape[0]:,} of "
                f"{shape[1]}"
            )
        self.cache = RowCache(rows, self.file.row.record_bytes, cache_bytes)
        self.reads = RowReads()

    @uncompiled
    def sum_rows(
        self, rows: Int[Tensor, "*t m"], weights: Float[Tensor, "*t m"]
    ) -> Float[Tensor, "*t d"]:
        """As `Table.sum_rows`.

        Raises:
            ValueError: a gradient is asked for, or there is no such row.
        """
        _refuse_gradient(weights)
        flat = weights.flatten(0, -2)
        y = weights.new_empty(len(flat), self.file.row.dim)
        for part, places, block in self._parts(rows.flatten(0, -2)):
            y[part] = sum_rows(block, places, flat[part])
        return y.unflatten(0, rows.shape[:-1])

    @uncompiled
    def dot_rows(
        self, rows: Int[Tensor, "*t m"], x: Float[Tensor, "*t d"]
    ) -> Float[Tensor, "*t m"]:
        """As `Table.dot_rows`.

        Raises:
            ValueError: a gradient is asked for, or there is no such row.
        """
        _refuse_gradient(x)
        flat = x.flatten(0, -2)
        y = x.new_empty(len(flat), rows.shape[-1])
        for part, places, block in self._parts(rows.flatten(0, -2)):
            y[part] = dot_rows(block, places, flat[part])
        return y.unflatten(0, rows.shape[:-1])

    def extra_repr(self) -> str:
        """File, sizes and cache, for `print`."""
        row = self.file.row
        return (
            f"{self.file.layout.count:,} x {row.dim} in {row.bits} bits of {self.file.path}, "
            f"cache of {self.cache.nbytes:,} bytes"
        )

    def _parts(self, rows: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Tokens, where each of their lookups is in a block, and the block of decoded rows.

        The whole call at once, unless its rows take too much memory: then half by half.
        """
        tokens = len(rows)
        distinct, places = rows.cpu().unique(return_inverse=True)
        if tokens > 1 and distinct.numel() * self.file.row.dim > _LARGEST:
            yield from self._parts(rows[: tokens // 2], start)
            yield from self._parts(rows[tokens // 2 :], start + tokens // 2)
            return
        block = self._decoded(distinct)
        yield slice(start, start + tokens), places.to(rows.device), block.to(rows.device)

    def _decoded(self, distinct: Tensor) -> Tensor:
        """Rows `[n, D]`, from the cache or the file."""
        last = self.file.layout.count - 1
        if distinct.numel() and (distinct[0] < 0 or distinct[-1] > last):
            raise ValueError(
                f"rows must be from 0 to {last}, but run from {int(distinct[0])} to "
                f"{int(distinct[-1])}"
            )
        started = time.perf_counter()
        rows = distinct.numpy()
        records = torch.empty(len(rows), self.file.row.record_bytes, dtype=torch.uint8)
        cached = self.cache.take(rows, records.numpy())
        missing = self.file.read_rows(rows[~cached])
        records.numpy()[~cached] = missing
        self.cache.put(rows[~cached], missing)
        block = decode(records, self.file.row)
        self.reads.rows += len(rows)
        self.reads.cached += int(cached.sum())
        self.reads.file_bytes += missing.nbytes
        self.reads.seconds += time.perf_counter() - started
        return block


def store_tables(model: nn.Module, folder: Path, *, bits: int) -> dict[str, Path]:
    """Stores every table of a model, a shared one once, under the name of its module.

    Returns:
        The files by name.

    Raises:
        ValueError: there is no table, or one is not finite.
    """
    tables, files = _tables(model), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        files[name] = _file(folder, name)
        try:
            write_table(files[name], table.weight, bits=bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return files


def replace_tables(
    model: nn.Module, folder: Path, *, cache_bytes: int = CACHE_BYTES
) -> dict[str, StoredTable]:
    """Lets a model read its tables from the files of `store_tables`, and frees those in memory.

    The weights may be on the meta device: then the model is never in memory with its tables.

    Args:
        model: read without gradients from now on.
        folder: with a file per table.
        cache_bytes: for all tables together, in equal parts.

    Returns:
        The stored tables by name.

    Raises:
        StorageError: a file is missing, damaged, or of another shape.
        ValueError: there is no table, or a layer reads one that is not the model's.
    """
    tables = _tables(model)
    stored = {
        name: StoredTable(
            _file(folder, name),
            shape=(table.weight.shape[0], table.weight.shape[1]),
            cache_bytes=cache_bytes // len(tables),
        )
        for name, table in tables.items()
    }
    places = {n: m for n, m in model.named_modules() if isinstance(m, SharedTable)}
    for name, place in places.items():
        if place.name not in tables:
            raise ValueError(f"{name} reads {place.name}, which is not this model's")
        stored[name] = stored[place.name]
    for name, table in stored.items():
        model.set_submodule(name, table)
    return {name: stored[name] for name in tables}


def _tables(model: nn.Module) -> dict[str, Table]:
    tables = {name: m for name, m in model.named_modules() if isinstance(m, Table)}
    if not tables:
        raise ValueError("the model has no table")
    return tables


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.table"


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "a stored table has no gradient, neither of its rows nor of what reads them; call the "
            "model under torch.no_grad() or torch.inference_mode()"
        )
