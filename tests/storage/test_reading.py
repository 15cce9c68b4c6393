"""Ways of reading files, memory for blocks, and what is kept of those that were read."""

import os
from concurrent.futures import ThreadPoolExecutor
from errno import EIO
from pathlib import Path

import numpy as np
import pytest
import torch

from mneme.storage.buffers import Buffers
from mneme.storage.caches import RecordCache
from mneme.storage.files import StorageError
from mneme.storage.reading import WAYS, Pread, evict
from mneme.storage.record_file import PAGE

EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def opened(way: str, path: Path):
    try:
        return WAYS[way](path)
    except StorageError as error:
        pytest.skip(str(error))


# Ways of reading


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(np.random.default_rng(0).bytes(40 * PAGE))
        os.fsync(file.fileno())  # or nothing could be taken out of the page cache
    return path


@EVERY_WAY
def test_every_way_reads_the_bytes_of_the_file(file, way):
    reader, content = opened(way, file), file.read_bytes()
    for page, pages in [(0, 1), (3, 5), (3, 5), (39, 1), (0, 40)]:
        into = Buffers().take(pages * PAGE)
        if (page, pages) != (3, 5):  # the others are not in the page cache
            evict(file)
        reader.read(page * PAGE, into)
        assert into.tobytes() == content[page * PAGE : (page + pages) * PAGE]
    reader.close()


@EVERY_WAY
@pytest.mark.parametrize("cut", [10 * PAGE, 10 * PAGE + 100])
def test_a_file_that_is_cut_while_it_is_open_is_named(file, way, cut):
    reader = opened(way, file)
    os.truncate(file, cut)
    with pytest.raises(StorageError, match=rf"{file} ends at byte {cut:,}; bytes 32,768 to 49,152"):
        reader.read(8 * PAGE, Buffers().take(4 * PAGE))
    reader.read(4 * PAGE, Buffers().take(4 * PAGE))


def test_a_read_that_returns_less_is_continued(file, monkeypatch):
    whole = os.preadv

    def some(handle, buffers, offset):
        return whole(handle, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", some)
    into = Buffers().take(3 * PAGE)
    Pread(file).read(PAGE, into)
    assert into.tobytes() == file.read_bytes()[PAGE : 4 * PAGE]


def test_an_error_of_the_disk_names_file_and_bytes(file, monkeypatch):
    def fail(*_):
        raise OSError(EIO, "Input/output error")

    reader = Pread(file)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        StorageError, match=rf"cannot read bytes 4,096 to 8,192 of {file}: Input/out"
    ):
        reader.read(PAGE, Buffers().take(PAGE))


@EVERY_WAY
def test_a_missing_file_is_named(tmp_path, way):
    with pytest.raises(StorageError, match=rf"cannot open {tmp_path}/absent.*: No such file"):
        WAYS[way](tmp_path / "absent")


# Memory


def test_memory_is_used_again_when_no_view_of_it_is_left():
    buffers = Buffers()
    array = buffers.take(5 * PAGE)
    address, view = array.ctypes.data, torch.from_numpy(array)[PAGE:].view(torch.float32)
    assert address % PAGE == 0
    del array
    assert buffers.take(5 * PAGE).ctypes.data != address, "a view is left"
    del view
    assert buffers.take(4 * PAGE).ctypes.data != address, "another size"
    assert buffers.take(5 * PAGE).ctypes.data == address


def test_no_more_memory_is_kept_than_the_limit():
    buffers = Buffers(limit=10 * PAGE)
    arrays = [buffers.take(4 * PAGE) for _ in range(5)]
    assert not buffers._free
    arrays.clear()
    assert [len(memory) for memory in buffers._free] == [4 * PAGE] * 2
    buffers.take(11 * PAGE)
    assert len(buffers._free) == 2, "what is too large by itself pushes nothing out"


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, 17 * 2**20])
def test_any_size_can_be_taken(size):
    array = Buffers().take(size)
    array[:] = 1
    assert array.nbytes == size


# Cache


def test_the_block_that_was_used_longest_ago_makes_place():
    cache, blocks = RecordCache(30), {key: torch.tensor(key) for key in range(6)}
    for key in (0, 1, 2):
        cache.put(key, blocks[key], 10)
    assert cache.get(0) is blocks[0]
    cache.put(3, blocks[3], 10)
    assert [key in cache for key in range(4)] == [True, False, True, True]
    cache.put(4, blocks[4], 20)
    assert [key in cache for key in range(5)] == [False, False, False, True, True]


def test_a_block_larger_than_the_budget_is_not_kept_and_pushes_nothing_out():
    cache = RecordCache(30)
    cache.put("small", torch.tensor(0), 30)
    cache.put("large", torch.tensor(0), 31)
    assert ("small" in cache, "large" in cache) == (True, False)


def test_a_block_that_is_put_again_counts_once():
    cache = RecordCache(30)
    cache.put("b", torch.tensor(0), 10)
    for value in range(3):
        cache.put("a", torch.tensor(value), 12)
    assert (cache.get("a"), cache.get("b")) == (2, 0)
    assert cache.get("c") is None


def test_threads_may_share_a_cache():
    cache = RecordCache(100)

    def work(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(30, size=400).tolist():
            found = cache.get(key)
            assert found is None or found == key
            cache.put(key, torch.tensor(key), 1 + key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    sizes = sum(1 + key for key in range(30) if key in cache)
    assert 100 - 30 < sizes <= 100
    cache.put("rest", torch.tensor(0), 100 - sizes)
    assert sizes == sum(1 + key for key in range(30) if key in cache), "there was room for it"
