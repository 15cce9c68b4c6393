"""Memory banks that stay on disk: for serving a model whose bank is larger than memory.

B sequences; L places, R units of a path, W elements of a unit, as in
`mneme.layers.bank.memory_bank`.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.layers.bank.memory_bank import GENERIC, Bank, BankShape, require_routes
from mneme.layers.protocol import require_at_least
from mneme.models.bank.manifest import BankFiles
from mneme.ops.contract import uncompiled
from mneme.storage.buffers import Buffers
from mneme.storage.caches import RecordCache
from mneme.storage.fetching import BlockReads, Fetcher, Key, PendingRead, Place
from mneme.storage.reading import Read, Reader, open_reader

CACHE_BYTES = 256 * 2**20
_WINDOW = 8  # blocks of a call that are asked for before the first of them is copied


class StoredBank(Bank):
    """A bank in a folder, read as a `MemoryBank` is, without gradients and without being in memory.

    Of a call each distinct block is read once, those of all levels at the same time, and each is
    checked. Blocks that were used last are kept as they are in the file. In files of float32 the
    result is that of the bank that was written, to the bit.

    `to` moves and converts the results, as it does the generic block, which is always in memory.

    A bank that is open is read as it was then, whatever is edited or written meanwhile
    (`mneme.models.bank.edit`). Open it again to see it as it is; close it, or what was deleted
    stays in the files.

    Args:
        folder: what `write_bank` wrote.
        router: hash of the router that gives the routes; None does not compare.
        base_model: hash of the model that uses the blocks; None does not compare.
        cache_bytes: what is kept of all levels together, or of each level by its number; levels
            that are not named keep nothing. Default 256 MiB together.
        read: how files are read, see `mneme.storage.reading`; "auto" measures for each file
            whether "pread" or "direct" is faster.
        dtype: of results.

    Attributes:
        reads: counters.
        ways: how the file of each level is read.

    Raises:
        StorageError: the folder holds no bank, it was written for another router or base model, a
            file is damaged, or the way of reading is not possible.
        ValueError: a cache is below zero or for a level without blocks, or `read` is no way.
    """

    def __init__(
        self,
        folder: Path,
        *,
        router: str | None = None,
        base_model: str | None = None,
        cache_bytes: int | Mapping[int, int] = CACHE_BYTES,
        read: Read = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        with ExitStack() as opened:
            files = opened.enter_context(BankFiles(folder, router=router, base_model=base_model))
            manifest = files.manifest
            caches = _caches(manifest.shape.levels, cache_bytes)
            readers = _readers(files, read, opened)
            generic = files.read(0, 0).to(dtype)
            close = opened.pop_all().close  # or, if one could not be opened, all were closed
        super().__init__(manifest.shape)
        self.manifest, self.folder = manifest, folder
        self.ways = {
            level: readers[level, parts.parts[0].generation].name
            for level, parts in files.held.generation.levels.items()
            if level
        }
        self.register_buffer("generic", generic, persistent=False)
        self._units, self._memory = _spans(manifest.shape), Buffers()

        def place(key: Key) -> Place:
            file, record = files.held.place(*key)
            return Place(file, record, readers[key[0], file.layout.about["generation"]])

        self._fetcher = Fetcher(
            place, manifest.decode, caches=caches, buffers=self._memory, close=close
        )

    @property
    def reads(self) -> BlockReads:
        """Counters of all calls so far."""
        return self._fetcher.reads

    @uncompiled
    @torch.no_grad()
    def fetch(self, route: Int[Tensor, " b"]) -> Float[Tensor, "b places r w"]:
        """The blocks of each sequence, as `MemoryBank.fetch` has them in evaluation.

        Args:
            route: `[B]`, a leaf of each sequence, or `GENERIC`.

        Raises:
            ValueError: there is no such leaf.
            StorageError: a block cannot be read or is damaged, or the bank is closed.
        """
        require_routes(route, self.shape)
        started = time.perf_counter()
        leaves = route.tolist()
        found = self._empty(len(leaves))
        for row, leaf in enumerate(leaves):
            if leaf == GENERIC:
                found[row] = self.generic
        for level, rows, block in self._blocks(leaves):
            for row in rows:  # read once, but in memory for each sequence, as its layers need it
                found[row, :, self._units[level]] = block
        self._fetcher.count_call(time.perf_counter() - started)
        return found.to(self.generic.device)

    def record(self, level: int, node: int) -> Float[Tensor, "places r w"]:
        """One block, in the dtype of its file; level 0 is the generic block, as it is in memory.

        A call of this is no fetch, but its block counts as one of a call. Do not write to it: later
        fetches may see the same memory.

        Raises:
            ValueError: there is no such block.
            StorageError: it cannot be read or is damaged, or the bank is closed.
        """
        if level not in (0, *self.shape.levels) or not 0 <= node < self.shape.nodes(level):
            raise ValueError(f"there is no block {node} at level {level} of {self.shape}")
        if not level:
            return self.generic
        return self._fetcher.wait(self._fetcher.ask((level, node), is_next=True))

    def prefetch(self, route: Int[Tensor, " b"]) -> None:
        """Begins to read blocks of routes that may be fetched next, and returns at once.

        They are read in the background, one after another, and are kept as those of `fetch` are:
        ask for no more than the cache holds. A fetch goes before the blocks that it does not need,
        and waits for one that is being read rather than reading it again. A block that cannot be
        read is no error here; the fetch that needs it tries again and says why.

        Args:
            route: as in `fetch`; of siblings, say, or of sequences that wait.

        Raises:
            ValueError: there is no such leaf.
            StorageError: the bank is closed.
        """
        require_routes(route, self.shape)
        for key in self._nodes(route.tolist()):
            self._fetcher.read_ahead(key)

    def close(self) -> None:
        """Waits for blocks that are being read, then lets go of files and blocks."""
        self._fetcher.close()

    def extra_repr(self) -> str:
        """Folder, sizes and ways of reading, for `print`."""
        shape = self.shape
        return (
            f"{shape.parameters:,} elements in {self.manifest.dtype} of {self.folder}, "
            f"{shape.fetched:,} a route, read by {self.ways}"
        )

    def _blocks(self, leaves: Sequence[int]) -> Iterator[tuple[int, list[int], Tensor]]:
        """Level, rows and elements of each distinct block, while the next ones are being read."""
        under_way: deque[tuple[list[int], PendingRead]] = deque()
        nodes = deque(self._nodes(leaves).items())
        while nodes or under_way:
            while nodes and len(under_way) < _WINDOW:
                key, rows = nodes.popleft()
                under_way.append((rows, self._fetcher.ask(key, is_next=not under_way)))
            rows, pending = under_way.popleft()
            yield pending.key[0], rows, self._fetcher.wait(pending)

    def _nodes(self, leaves: Sequence[int]) -> dict[Key, list[int]]:
        """Which rows need each node, path by path in tree order.

        So files are read from front to back, and those of all levels at the same time.
        """
        rows: dict[Key, list[int]] = {}
        for row in sorted(range(len(leaves)), key=leaves.__getitem__):
            for level in self.shape.levels if leaves[row] != GENERIC else ():
                rows.setdefault((level, self.shape.node(leaves[row], level)), []).append(row)
        return rows

    def _empty(self, batch: int) -> Tensor:
        """Memory for a result."""
        size, dtype = batch * self.shape.fetched, self.generic.dtype
        memory = torch.from_numpy(self._memory.take(size * dtype.itemsize))
        return memory.view(dtype).view(batch, *self.shape.record(0))


def _caches(levels: Sequence[int], cache_bytes: int | Mapping[int, int]) -> dict[int, RecordCache]:
    """The cache of each level: one for all, or one for each."""
    if isinstance(cache_bytes, int):
        require_at_least(0, cache_bytes=cache_bytes)
        return dict.fromkeys(levels, RecordCache(cache_bytes))
    for level, size in cache_bytes.items():
        if level not in levels:
            raise ValueError(f"cache_bytes names level {level}; levels with blocks are {levels}")
        require_at_least(0, **{f"cache_bytes of level {level}": size})
    return {level: RecordCache(cache_bytes.get(level, 0)) for level in levels}


def _readers(files: BankFiles, read: Read, opened: ExitStack) -> dict[tuple[int, int], Reader]:
    """Of each file, by its level and generation; what was edited is read as the level is."""
    readers: dict[tuple[int, int], Reader] = {}
    for level, found in files.held.generation.levels.items():
        way: str = read
        for part in found.parts if level else ():  # the generic block is read once
            file = files.held.file(level, part)
            reader = readers[level, part.generation] = open_reader(file.path, file.layout, way)
            opened.callback(reader.close)
            way = reader.name
    return readers


def _spans(shape: BankShape) -> dict[int, slice]:
    """Where the units of each level are among all."""
    ends = dict(zip(shape.levels, accumulate(map(shape.units_of, shape.levels)), strict=True))
    return {level: slice(end - shape.units_of(level), end) for level, end in ends.items()}
