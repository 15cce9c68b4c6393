"""Memory banks that stay on disk: for serving a model whose bank is larger than memory.

B sequences; L places, R units of a path, W numbers of a unit, as in
`mneme.layers.bank.memory_bank`.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mneme.layers.bank.memory_bank import GENERIC, Bank, BankShape, require_routes
from mneme.layers.protocol import require_at_least
from mneme.models.bank.buffers import Buffers
from mneme.models.bank.cache import RecordCache
from mneme.models.bank.manifest import Manifest, open_levels, retrying
from mneme.models.bank.reading import Read
from mneme.models.bank.records import Reads, Records
from mneme.models.bank.task import Task
from mneme.ops.contract import uncompiled

CACHE_BYTES = 256 * 2**20
_WINDOW = 8  # blocks of a call that are asked for before the first of them is copied


class StoredBank(Bank):
    """A bank in a folder, read as a `MemoryBank` is, without gradients and without being in memory.

    Of a call each distinct block is read once, those of all levels at the same time, and each is
    checked. Blocks that were used last are kept as they are in the file. In files of float32 the
    result is that of the bank that was written, to the bit.

    `to` moves and converts the results, as it does the generic block, which is always in memory.

    An edit of the files (`mneme.models.bank.edit`) is not seen by a bank that is open: blocks that
    it keeps are those from before, and others that were changed count as damaged. Open it again
    then.

    Args:
        folder: what `write_bank` wrote.
        router: hash of the router that gives the routes; None does not compare.
        base_model: hash of the model that uses the blocks; None does not compare.
        cache_bytes: what is kept of all levels together, or of each level by its number; levels
            that are not named keep nothing. Default 256 MiB together.
        read: how files are read, see `mneme.models.bank.reading`; "auto" measures for each file
            whether "pread" or "direct" is faster.
        dtype: of results.

    Attributes:
        reads: counters.
        ways: how the file of each level is read.

    Raises:
        BankError: the folder holds no bank, it was written for another router or base model, a file
            is damaged, or the way of reading is not possible.
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
        memory = Buffers()

        def attempt() -> tuple[Manifest, Tensor, Records]:
            manifest, files = open_levels(folder, router=router, base_model=base_model)
            generic = files.pop(0).read(0).to(dtype)
            caches = _caches(manifest.shape.levels, cache_bytes)
            return manifest, generic, Records(files, read=read, caches=caches, buffers=memory)

        manifest, generic, records = retrying(folder, attempt)
        super().__init__(manifest.shape)
        self.manifest, self.folder = manifest, folder
        self.register_buffer("generic", generic, persistent=False)
        self._units = _spans(manifest.shape)
        self._memory, self._records = memory, records

    @property
    def reads(self) -> Reads:
        """Counters of all calls so far."""
        return self._records.reads

    @property
    def ways(self) -> Mapping[int, str]:
        """How the file of each level is read: "pread", "mmap" or "direct"."""
        return self._records.ways

    @uncompiled
    @torch.no_grad()
    def fetch(self, route: Int[Tensor, " b"]) -> Float[Tensor, "b places r w"]:
        """The blocks of each sequence, as `MemoryBank.fetch` has them in evaluation.

        Args:
            route: `[B]`, a leaf of each sequence, or `GENERIC`.

        Raises:
            ValueError: there is no such leaf.
            BankError: a block cannot be read or is damaged, or the bank is closed.
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
        self._records.count_call(time.perf_counter() - started)
        return found.to(self.generic.device)

    def record(self, level: int, node: int) -> Float[Tensor, "places r w"]:
        """One block, in the numbers of its file; level 0 is the generic block, as it is in memory.

        A call of this is no fetch, but its block counts as one of a call. Do not write to it: later
        fetches may see the same memory.

        Raises:
            ValueError: there is no such block.
            BankError: it cannot be read or is damaged, or the bank is closed.
        """
        if level not in (0, *self.shape.levels) or not 0 <= node < self.shape.nodes(level):
            raise ValueError(f"there is no block {node} at level {level} of {self.shape}")
        if not level:
            return self.generic
        return self._records.wait(self._records.ask(level, node, is_next=True))

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
            BankError: the bank is closed.
        """
        require_routes(route, self.shape)
        for level, node in self._nodes(route.tolist()):
            self._records.read_ahead(level, node)

    def close(self) -> None:
        """Waits for blocks that are being read, then lets go of files and blocks."""
        self._records.close()

    def extra_repr(self) -> str:
        """Folder, sizes and ways of reading, for `print`."""
        shape = self.shape
        return (
            f"{shape.parameters:,} numbers in {self.manifest.dtype} of {self.folder}, "
            f"{shape.fetched:,} a route, read by {self.ways}"
        )

    def _blocks(self, leaves: Sequence[int]) -> Iterator[tuple[int, list[int], Tensor]]:
        """Level, rows and numbers of each distinct block, while the next ones are being read."""
        under_way: deque[tuple[list[int], Task]] = deque()
        nodes = deque(self._nodes(leaves).items())
        while nodes or under_way:
            while nodes and len(under_way) < _WINDOW:
                (level, node), rows = nodes.popleft()
                task = self._records.ask(level, node, is_next=not under_way)
                under_way.append((rows, task))
            rows, task = under_way.popleft()
            yield task.level, rows, self._records.wait(task)

    def _nodes(self, leaves: Sequence[int]) -> dict[tuple[int, int], list[int]]:
        """Which rows need each node, path by path in tree order.

        So files are read from front to back, and those of all levels at the same time.
        """
        rows: dict[tuple[int, int], list[int]] = {}
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


def _spans(shape: BankShape) -> dict[int, slice]:
    """Where the units of each level are among all."""
    ends = dict(zip(shape.levels, accumulate(map(shape.units_of, shape.levels)), strict=True))
    return {level: slice(end - shape.units_of(level), end) for level, end in ends.items()}
