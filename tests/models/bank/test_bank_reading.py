"""Banks that stay on disk: how they are read, what is kept, what is read ahead."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import EINVAL
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from mneme.layers import HierarchicalFFN, SoftmaxAttention
from mneme.layers.bank.memory_bank import GENERIC, BankOptions, BankShape, MemoryBank
from mneme.models import LanguageModel
from mneme.models.bank import (
    StoredBank,
    replace_blocks,
    write_bank,
)
from mneme.storage import reading as reading_module
from mneme.storage.files import StorageError
from mneme.storage.reading import WAYS, Pread, fastest
from mneme.storage.record_file import PAGE, Layout, RecordFile
from tests.storage.test_reading import EVERY_WAY, opened

SHAPE = BankShape(places=2, branching=3, hidden=(3, 0, 2), width=6 * 170)  # records end in a page
STRIDES = {1: 6 * PAGE, 3: 4 * PAGE}  # 24,480 and 16,320 bytes in float32


@pytest.fixture(scope="module")
def trained():
    """A bank in memory with numbers that all differ."""
    torch.manual_seed(0)
    bank = MemoryBank(SHAPE, 340, BankOptions(branching=3, hidden=(3, 0, 2))).eval()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


@pytest.fixture
def folder(tmp_path, trained):
    return write(tmp_path / "bank", trained)


def write(folder: Path, bank: MemoryBank, dtype: str = "float32") -> Path:
    def records(level: int):
        return (bank.record(level, node) for node in range(SHAPE.nodes(level)))

    write_bank(folder, SHAPE, records, dtype=dtype, router="r" * 16)
    return folder


def fetched(bank, *leaves: int) -> torch.Tensor:
    with torch.no_grad():
        return bank.fetch(torch.tensor(leaves, dtype=torch.long))


class Gate:
    """Lets reads of `Pread` wait until it is opened, all or only the first, and notes them."""

    def __init__(self, monkeypatch) -> None:
        self.begun, self.open, self.reads = threading.Semaphore(0), threading.Event(), []
        self.only_first = False
        plain = Pread.read

        def read(reader, offset, into):
            self.reads.append((reader._path, offset))
            self.begun.release()
            if not self.only_first or len(self.reads) == 1:
                assert self.open.wait(10), "nobody opened the gate"
            plain(reader, offset, into)

        monkeypatch.setattr(Pread, "read", read)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


# Ways of reading


@pytest.fixture
def refusing(monkeypatch):
    """A file system without direct reads."""
    system = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(EINVAL, "Invalid argument")
        return system(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)


def test_a_file_system_that_refuses_direct_reads_is_told_of(refusing, folder, trained):
    with pytest.raises(StorageError, match=r"past the page cache \(O_DIRECT\); read with 'pread'"):
        StoredBank(folder, read="direct")
    bank = StoredBank(folder)
    assert bank.ways == {1: "pread", 3: "pread"}
    assert torch.equal(fetched(bank, 5), fetched(trained, 5))


def layout_of(folder: Path, level: int) -> Layout:
    return RecordFile(folder / f"level{level}-1.bank", "blocks").layout


@pytest.mark.parametrize("way", ["pread", "direct"])
def test_the_fastest_way_is_taken(folder, monkeypatch, way):
    opened(way, folder / "level3-1.bank").close()
    layout = layout_of(folder, 3)
    tried = []
    for name, kind in WAYS.items():
        pause = 0.0 if name == way else 0.01

        def read(reader, offset, into, plain=kind.read, pause=pause):
            time.sleep(pause)
            tried.append((offset, len(into)))
            plain(reader, offset, into)

        monkeypatch.setattr(kind, "read", read)
    monkeypatch.setattr(reading_module, "SAMPLE", 2 * PAGE)
    reader = fastest(folder / "level3-1.bank", layout)
    assert reader.name == way
    blocks = [(offset, size) for offset, size in tried if offset]  # direct tries the header
    offsets = {offset for offset, _ in blocks}
    ways = 2 if (0, PAGE) in tried else 1
    assert len(offsets) == len(blocks) == 5 * ways, "never twice the same block"
    assert {size for _, size in blocks} == {2 * PAGE}
    assert {(offset - layout.records) % layout.stride for offset in offsets} == {0}


def test_choosing_a_way_ends_in_time(folder, monkeypatch):
    path = folder / "level1-1.bank"
    monkeypatch.setattr(reading_module, "SECONDS", 0.0)
    seconds = reading_module._measure(path, layout_of(folder, 1), {"pread": Pread(path)})
    assert len(seconds["pread"]) == 1


def test_a_file_that_cannot_be_read_is_not_left_open(folder, monkeypatch):
    layout, before = layout_of(folder, 1), open_files()

    def fail(*_):
        raise StorageError("a bad page")

    monkeypatch.setattr(Pread, "read", fail)
    with pytest.raises(StorageError, match="a bad page"):
        fastest(folder / "level1-1.bank", layout)
    assert open_files() == before


@pytest.mark.parametrize("name", ["level3-1.bank", "level0-1.bank"])
def test_no_file_is_left_open_when_one_cannot_be_opened(folder, monkeypatch, name):
    before, plain = open_files(), Pread.__init__

    def fail(reader, path):
        if path.name == name:
            raise StorageError("no more files")
        plain(reader, path)

    monkeypatch.setattr(Pread, "__init__", fail)
    if name.startswith("level0"):  # which is not read that way
        (folder / name).unlink()
    with pytest.raises(StorageError, match=r"no more files|cannot open .*level0-1"):
        StoredBank(folder, read="pread")
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Stored banks


@pytest.fixture
def pieces(monkeypatch):
    """Blocks are read in pieces of a page."""
    monkeypatch.setattr("mneme.storage.fetching.PIECE", PAGE)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [*((way, "float32") for way in WAYS), ("pread", "bfloat16"), ("pread", "float16")],
)
def test_a_fetch_gives_the_blocks_that_were_written(tmp_path, trained, way, dtype, pieces):
    folder = write(tmp_path / "bank", trained, dtype)
    opened(way, folder / "level3-1.bank").close()
    bank = StoredBank(folder, read=way, cache_bytes=20 * STRIDES[1])
    assert bank.ways == {1: way, 3: way}
    for route in [(4,), (0, 26, 4, GENERIC, 4), (), (GENERIC, GENERIC), tuple(range(27))]:
        expected = fetched(trained, *route).to(getattr(torch, dtype)).float()
        assert torch.equal(fetched(bank, *route), expected)


def test_a_block_can_be_asked_for_by_itself(tmp_path, trained):
    bank = StoredBank(write(tmp_path / "bank", trained, "bfloat16"))
    for level, node in [(1, 2), (3, 26)]:
        assert torch.equal(bank.record(level, node), trained.record(level, node).bfloat16())
    assert torch.equal(bank.record(0, 0), trained.generic.bfloat16().float())
    for level, node in [(2, 0), (3, 27), (1, -1), (4, 0), (0, 1)]:
        with pytest.raises(ValueError, match=f"there is no block {node} at level {level} of Bank"):
            bank.record(level, node)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_are_in_the_dtype_that_is_asked_for(folder, trained, dtype):
    expected = fetched(trained, 3, GENERIC).to(dtype)
    for bank in (StoredBank(folder, dtype=dtype), StoredBank(folder).to(dtype)):
        found = fetched(bank, 3, GENERIC)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["ffn", "lora", "kv"])
def test_a_model_with_a_stored_bank_gives_the_same_logits(tmp_path, kind):
    options = BankOptions(branching=2, hidden=(3, 2), kind=kind)
    pattern = [[SoftmaxAttention, partial(HierarchicalFFN, bank=options)]]
    model = LanguageModel(16, vocab_size=11, n_layers=2, pattern=pattern).eval()
    nn.init.normal_(model.bank.level2)
    trained = model.bank

    def records(level: int):
        return (trained.record(level, node) for node in range(trained.shape.nodes(level)))

    write_bank(tmp_path, trained.shape, records, dtype="float32")
    tokens, route = torch.arange(10).view(2, 5), torch.tensor([3, GENERIC])
    with torch.inference_mode():
        expected = model(tokens, model.init_state(2, route)).y
        generic = model(tokens).y
        model.use_part("bank", StoredBank(tmp_path))
        assert torch.equal(model(tokens, model.init_state(2, route)).y, expected)
        assert torch.equal(model(tokens).y, generic)
    assert not torch.equal(expected[0], generic[0])


def test_a_result_is_not_written_over_while_it_is_in_use(folder, trained):
    bank = StoredBank(folder, cache_bytes=0)
    kept = [(leaf, fetched(bank, leaf)[:, 1]) for leaf in range(27)]
    blocks = [bank.record(3, node) for node in range(27)]
    fetched(bank, *range(27))
    for leaf, found in kept:
        assert torch.equal(found, fetched(trained, leaf)[:, 1])
        assert torch.equal(blocks[leaf], trained.record(3, leaf))


def test_a_stored_bank_has_nothing_to_train_or_to_save(folder):
    bank = StoredBank(folder)
    assert not list(bank.parameters())
    assert not bank.state_dict()
    assert not bank.fetch(torch.tensor([3, GENERIC])).requires_grad
    assert fetched(bank.train(), *[3] * 50).equal(fetched(bank.eval(), *[3] * 50)), "never generic"


@pytest.mark.parametrize("call", ["fetch", "prefetch"])
@pytest.mark.parametrize("leaf", [27, -2])
def test_routes_to_no_leaf_are_refused(folder, leaf, call):
    bank = StoredBank(folder)
    with pytest.raises(ValueError, match=f"routes must be from 0 to 26, .* got {min(3, leaf)} to"):
        getattr(bank, call)(torch.tensor([3, leaf]))


def test_a_bank_for_another_router_is_refused(folder):
    StoredBank(folder, router="r" * 16).close()
    with pytest.raises(StorageError, match=r"written for the router rrrr.* and is used with ssss"):
        StoredBank(folder, router="s" * 16)


@EVERY_WAY
def test_a_bank_that_was_edited_is_read_from_all_its_files(folder, trained, way):
    opened(way, folder / "level3-1.bank").close()
    older = StoredBank(folder, read=way, cache_bytes=0)
    new = {(1, 0): torch.ones(SHAPE.record(1)), (3, 0): torch.ones(SHAPE.record(3))}
    replace_blocks(folder, new)
    replace_blocks(folder, {(3, 0): -new[3, 0], (3, 26): new[3, 0], (0, 0): trained.generic + 1})
    bank = StoredBank(folder, read=way, cache_bytes=0)
    assert bank.ways == {1: way, 3: way}
    found, expected = fetched(bank, 0, 26, 13, GENERIC), fetched(trained, 0, 26, 13, GENERIC)
    assert torch.equal(fetched(older, 0, 26, 13, GENERIC), expected)
    expected[0, :, :3], expected[0, :, 3:], expected[1, :, 3:] = 1, -1, 1
    assert torch.equal(found[:3], expected[:3])
    assert torch.equal(found[3], trained.generic + 1)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_block_that_could_not_be_begun_is_read_when_it_is_asked_for_again(
    folder, trained, monkeypatch, error
):
    bank = StoredBank(folder, read="pread")

    def fail(size):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bank._memory, "take", fail)
        with pytest.raises(error):
            bank.record(1, 2)
    idle(bank)
    assert torch.equal(bank.record(1, 2), trained.record(1, 2))
    bank.close()


def test_each_distinct_block_of_a_call_is_read_once(folder):
    bank = StoredBank(folder, cache_bytes=0)
    fetched(bank, 0, 1, 1, 9, 0, GENERIC)  # leaves 0 and 1 are below one node of level 1
    reads = bank.reads
    assert (reads.fetches, reads.hits, reads.misses) == (1, 0, 5)
    assert reads.file_bytes == 2 * STRIDES[1] + 3 * STRIDES[3]
    assert reads.seconds > 0


def test_blocks_that_were_read_come_from_the_cache(folder):
    bank = StoredBank(folder, cache_bytes=STRIDES[1] + 2 * STRIDES[3])
    for leaf, hits in [(0, 0), (1, 1), (0, 2), (2, 1), (1, 1), (0, 1)]:  # 1 gave way to 2
        before = bank.reads.hits
        fetched(bank, leaf)
        assert bank.reads.hits - before == hits, leaf
    assert bank.reads.hits + bank.reads.misses == 12


def test_levels_may_have_caches_of_their_own(folder):
    bank = StoredBank(folder, cache_bytes={1: 3 * STRIDES[1]})
    for leaf in (0, 9, 18, 1, 10, 19, 0):
        fetched(bank, leaf)
    assert (bank.reads.hits, bank.reads.misses) == (4, 10)


@pytest.mark.parametrize(
    ("cache_bytes", "says"),
    [
        (-1, "cache_bytes must be 0 or more, got -1"),
        ({1: -5}, "cache_bytes of level 1 must be 0 or more, got -5"),
        ({2: 5}, r"cache_bytes names level 2; levels with blocks are \[1, 3\]"),
    ],
)
def test_caches_that_cannot_be_are_refused(folder, cache_bytes, says):
    with pytest.raises(ValueError, match=says):
        StoredBank(folder, cache_bytes=cache_bytes)


def damage(folder: Path, level: int, node: int) -> None:
    """Flips a bit of a block; again, and it is as it was."""
    at = PAGE + PAGE + node * STRIDES[level] + 100
    with (folder / f"level{level}-1.bank").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@EVERY_WAY
def test_a_damaged_block_is_refused_and_no_other(folder, trained, way):
    opened(way, folder / "level3-1.bank").close()
    damage(folder, 3, 7)
    bank = StoredBank(folder, read=way)
    with pytest.raises(StorageError, match=rf"{folder}/level3-1.bank is damaged in block 7"):
        fetched(bank, 6, 7, 8)
    assert torch.equal(fetched(bank, 6, 8), fetched(trained, 6, 8))
    damage(folder, 3, 7)
    assert torch.equal(fetched(bank, 7), fetched(trained, 7)), "a failure is not remembered"


def test_a_bank_that_is_cut_while_it_is_open_is_named(folder, trained):
    bank = StoredBank(folder)
    os.truncate(folder / "level3-1.bank", 6 * STRIDES[3])
    with pytest.raises(StorageError, match=r"level3-1\.bank ends at byte .* cut while it was open"):
        fetched(bank, 26)
    assert torch.equal(fetched(bank, 0), fetched(trained, 0))


@pytest.mark.parametrize("page", [0, 2, 3])
def test_a_block_of_which_one_piece_cannot_be_read_is_refused(
    folder, trained, monkeypatch, pieces, page
):
    bank, plain = StoredBank(folder, read="pread"), Pread.read
    bad = layout_of(folder, 3).offset(26) + page * PAGE

    def read(reader, offset, into):
        if offset == bad:
            raise StorageError("a bad page")
        plain(reader, offset, into)

    monkeypatch.setattr(Pread, "read", read)
    for _ in range(2):
        with pytest.raises(StorageError, match="a bad page"):
            fetched(bank, 25, 26)
    assert torch.equal(fetched(bank, 25), fetched(trained, 25))


def test_a_block_is_read_by_many_threads_at_a_time(folder, trained, pieces, gate):
    bank = StoredBank(folder, read="pread")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(bank.record, 1, 2)
        for _ in range(4):
            assert gate.begun.acquire(timeout=10), "three threads and the one that waits"
        gate.open.set()
        assert torch.equal(found.result(timeout=10), trained.record(1, 2))
    assert len(gate.reads) == len(set(gate.reads)) == 6


# Reading ahead


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def idle(bank: StoredBank) -> None:
    until(lambda: not bank._fetcher._under_way)


def test_blocks_that_were_read_ahead_are_not_read_again(folder, trained):
    bank = StoredBank(folder)
    bank.prefetch(torch.tensor([4, 5, 4, GENERIC]))
    idle(bank)
    assert torch.equal(fetched(bank, 4, 5), fetched(trained, 4, 5))
    bank.prefetch(torch.tensor([4, 5]))
    idle(bank)
    assert (bank.reads.fetches, bank.reads.hits, bank.reads.misses) == (1, 3, 0)
    assert bank.reads.file_bytes == STRIDES[1] + 2 * STRIDES[3]


def test_a_fetch_waits_for_a_block_that_is_being_read_ahead(folder, trained, gate):
    bank = StoredBank(folder, read="pread")
    bank.prefetch(torch.tensor([4]))
    assert gate.begun.acquire(timeout=10), "the block of level 1 is being read"
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(fetched, bank, 4)
        assert gate.begun.acquire(timeout=10), "that of level 3, by the fetch"
        gate.open.set()
        assert torch.equal(found.result(timeout=10), fetched(trained, 4))
    idle(bank)
    assert len(gate.reads) == 2, "each block once"
    assert (bank.reads.hits, bank.reads.misses) == (2, 0)


def test_a_fetch_does_not_wait_for_what_others_read_ahead(folder, trained, gate):
    bank = StoredBank(folder, read="pread")
    gate.only_first = True
    bank.prefetch(torch.arange(27))
    assert gate.begun.acquire(timeout=10)
    assert torch.equal(fetched(bank, 26), fetched(trained, 26))
    assert not gate.open.is_set(), "the first block that is read ahead still waits"
    gate.open.set()
    idle(bank)
    assert len(gate.reads) == len(set(gate.reads)) == 30, "each block once"


def test_what_is_still_to_be_read_ahead_does_not_hold_up_the_exit(folder, trained, gate):
    """The interpreter then ends its pools as `shutdown` does: what they were given is done."""
    bank = StoredBank(folder, read="pread")
    bank.prefetch(torch.arange(27))
    assert gate.begun.acquire(timeout=10)
    bank._fetcher._ahead.shutdown(wait=False)
    gate.open.set()
    bank._fetcher._ahead.shutdown()
    assert len(gate.reads) == 1
    assert torch.equal(fetched(bank, 26), fetched(trained, 26))


def test_nothing_is_read_ahead_that_would_not_be_kept(folder):
    bank = StoredBank(folder, cache_bytes={1: STRIDES[1]})
    bank.prefetch(torch.tensor([4]))
    idle(bank)
    assert bank.reads.file_bytes == STRIDES[1]


def test_what_could_not_be_read_ahead_fails_the_fetch_that_needs_it(folder, trained):
    damage(folder, 3, 7)
    bank = StoredBank(folder)
    bank.prefetch(torch.tensor([6, 7, 8]))
    idle(bank)
    with pytest.raises(StorageError, match=r"level3-1\.bank is damaged in block 7"):
        fetched(bank, 7)
    assert torch.equal(fetched(bank, 6, 8), fetched(trained, 6, 8))


def test_a_fetch_that_waits_for_a_block_read_ahead_learns_why_it_fails(folder, gate):
    damage(folder, 1, 1)
    bank = StoredBank(folder, read="pread")
    bank.prefetch(torch.tensor([9]))
    assert gate.begun.acquire(timeout=10)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(fetched, bank, 9)
        assert gate.begun.acquire(timeout=10)
        gate.open.set()
        with pytest.raises(StorageError, match=r"level1-1\.bank is damaged in block 1"):
            found.result(timeout=10)


@EVERY_WAY
def test_threads_may_fetch_and_read_ahead_at_once(folder, trained, way):
    opened(way, folder / "level3-1.bank").close()
    bank = StoredBank(folder, read=way, cache_bytes=9 * STRIDES[3])
    routes = torch.randint(-1, 27, (4, 12, 3), generator=torch.Generator().manual_seed(0))

    def serve(mine: torch.Tensor) -> None:
        for now, later in zip(mine, mine.roll(-1, 0), strict=True):
            bank.prefetch(later)
            assert torch.equal(fetched(bank, *now.tolist()), fetched(trained, *now.tolist()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, routes))
    idle(bank)
    assert bank.reads.fetches == 48
    distinct = [
        {(1, i // 9) for i in r if i >= 0} | {(3, i) for i in r if i >= 0}
        for r in routes.flatten(0, 1).tolist()
    ]
    assert bank.reads.hits + bank.reads.misses == sum(map(len, distinct))


# Closing


def test_a_closed_bank_is_closed(folder):
    before = open_files()
    bank = StoredBank(folder)
    fetched(bank, 3)
    bank.close()
    bank.close()
    assert open_files() == before
    for call in (bank.fetch, bank.prefetch):
        with pytest.raises(StorageError, match="the bank is closed; open it again"):
            call(torch.tensor([3]))


def test_a_block_of_which_pieces_are_left_is_given_up_when_the_bank_is_closed(folder, gate, pieces):
    bank = StoredBank(folder, read="pread")
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(bank.record, 1, 2)
        for _ in range(4):
            assert gate.begun.acquire(timeout=10)
        (pending,) = bank._fetcher._under_way.values()
        closing = pool.submit(bank.close)
        until(lambda: pending.error is not None)
        assert not closing.done(), "it waits for what is being read"
        gate.open.set()
        with pytest.raises(StorageError, match="the bank is closed; open it again"):
            found.result(timeout=10)
        closing.result(timeout=10)


def test_a_fetch_during_which_the_bank_is_closed_says_so(folder, gate):
    bank = StoredBank(folder, read="pread")
    with ThreadPoolExecutor(2) as pool:
        found = pool.submit(fetched, bank, 0, 1, 2, 3, 4, 5)
        until(lambda: len(bank._fetcher._under_way) == 7)  # of which four are being read
        pending = list(bank._fetcher._under_way.values())
        closing = pool.submit(bank.close)
        until(lambda: all(read.error for read in pending))
        gate.open.set()
        with pytest.raises(StorageError, match="the bank is closed; open it again"):
            found.result(timeout=10)
        closing.result(timeout=10)
