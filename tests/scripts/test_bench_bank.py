"""The benchmark of banks runs in all its parts, and its figures are of what was timed."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank import StoredBank, read_manifest
from mneme.storage.files import StorageError
from mneme.storage.reading import Direct, Pread
from mneme.storage.record_file import PAGE
from scripts.benchmarks import bank, cold_reads, random_bank

TINY = replace(
    random_bank.QUICK, width=32, units=9, gib=1e-5, prompt=8, tokens=3, seconds=0.05, rounds=2
)
PATH = TINY.layers * TINY.units * 3 * TINY.width * 2  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank")
    random_bank.prepare(path, TINY)
    return path


@pytest.fixture(scope="module")
def ways(folder):
    try:
        Direct(folder / "level3-1.bank").close()
    except StorageError:
        return ["pread"]
    return ["pread", "direct"]


@pytest.fixture(scope="module")
def measured(folder):
    """The rows of each part; what a process of its own would do is done in this one."""
    path = folder / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "QUICK", TINY)
        patch.setattr(bank, "serve_elsewhere", bank.serve)
        bank.run(["--quick", "--folder", str(folder), "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    return {part: [row for row in rows if row["part"] == part] for part in bank.PARTS}


def test_blocks_and_paths_are_read_in_every_way(measured, ways):
    one, many, *rows = measured["cold"]
    assert [(row["what"], row["way"]) for row in (one, many)] == [
        ("large reads", "1 thread"),
        ("large reads", "4 threads"),
    ]
    faster = max(one, many, key=lambda row: row["bytes_per_second"])
    assert faster["of_large_reads"] == 1
    kinds = ["path", *(f"block of level {level}" for level in (1, 2, 3))]
    assert [(row["way"], row["what"]) for row in rows] == list(product(["auto", *ways], kinds))
    assert {row["bar"] for row in rows} == {None}, "bars are for blocks of 1 MiB or more"


def test_files_leave_the_page_cache_before_each_reading(folder, monkeypatch):
    steps = []
    monkeypatch.setattr(cold_reads, "evict", lambda path: steps.append(path.name))
    cold_reads._cold_rate(folder, [(10, lambda: steps.append("read"))] * 2)
    files = {f"level{level}-1.bank" for level in range(4)}
    assert steps[4::5] == ["read", "read"]
    assert set(steps[:4]) == set(steps[5:9]) == files


def test_no_places_are_read_again_and_ways_take_turns(monkeypatch):
    read = []

    def readings(way, draw):
        while True:
            yield 1, partial(read.append, (way, draw.random()))

    monkeypatch.setattr(cold_reads, "evict", lambda _: None)
    groups = [{("path", way): partial(readings, way)} for way in "abc"]
    rates = cold_reads._cold_rates(Path("nowhere"), groups, replace(TINY, paths=2, rounds=3))
    assert [way for way, _ in read[::2]] == list("abcbcacababc")
    assert len({place for _, place in read}) == len(read) == 24
    assert {len(of_rounds) for of_rounds in rates.values()} == {3}


@pytest.mark.parametrize("threads", [1, 3])
def test_large_reads_read_all_from_a_place_once(tmp_path, threads):
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * PAGE))
    offsets = []

    class Noted(Pread):
        def read(self, offset, into):
            offsets.append((offset, len(into)))
            super().read(offset, into)

    with ThreadPoolExecutor(threads) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_reads, "LARGE", 2 * PAGE)
        large = cold_reads._LargeReads(Noted(path), 20 * PAGE, 11 * PAGE, pool, threads)
        size, call = next(large.readings(random.Random(0)))
        call()
    first = min(offset for offset, _ in offsets)
    assert size == 10 * PAGE
    assert sorted(offsets) == [(first + i * PAGE, 2 * PAGE) for i in range(0, 10, 2)]


def test_what_is_fetched_is_compared_with_reading_a_prompt(measured):
    prompt, memory, cached = measured["warm"]
    assert (prompt["of_prompt"], prompt["bar"]) == (1, None)
    assert [row["what"] for row in (memory, cached)] == [
        "fetch from memory",
        "fetch from the page cache",
    ]
    assert (memory["bar"], cached["bar"]) == (0.1, 0.1)


def test_decoding_is_compared_with_that_of_the_base_model(measured):
    base_model, ours = measured["decode"]
    assert (base_model["of_base_model"], base_model["bar"], ours["bar"]) == (1, None, 0.85)


def test_serving_reads_blocks_and_reports_memory(measured):
    (row,) = measured["memory"]
    assert row["routes"] > 0
    assert row["read_gib"] * 2**30 >= PATH
    assert 0 < row["resident_gib"] <= row["peak_gib"]


def test_rates_and_bars():
    shape = BankShape(12, 16, (126, 126, 68), 3 * 768)
    large = {
        ("large reads", "1 thread"): [1e9, 1e9, 9e9],
        ("large reads", "4 threads"): [2e9, 2e9, 4e9],
    }
    rates = large | {("block of level 3", "direct"): [1e9] * 3}
    row = cold_reads._cold_row(("block of level 3", "direct"), shape, rates)
    assert (row["bytes_per_second"], row["of_large_reads"], row["bar"]) == (1e9, 0.5, 0.7)
    assert cold_reads._cold_row(("large reads", "1 thread"), shape, rates)["bar"] is None
    times = {bank.BASE_MODEL: [1.0, 1.0, 1.0], "with a bank": [2.0, 2.0, 1.0]}
    row = bank._decode_row("with a bank", 10, times)
    assert (row["tokens_per_second"], row["of_base_model"]) == (5, 0.5)


def test_the_bank_is_as_large_as_asked_and_its_blocks_are_not_small():
    sizes = random_bank.FULL
    shape = BankShape(sizes.layers, sizes.branching, sizes.hidden, 3 * sizes.width)
    assert sizes.hidden == (126, 126, 68)
    assert 16 <= shape.parameters * 2 / 2**30 < 16.3
    assert cold_reads.block_bytes(shape, torch.bfloat16, 3) >= 2**20
    with pytest.raises(ValueError, match=r"no bank of 100 GiB has 320 units in 12 layers"):
        replace(sizes, gib=100).hidden  # noqa: B018


def test_a_bank_is_made_once_and_another_is_not_touched(folder, monkeypatch):
    before = read_manifest(folder)
    random_bank.prepare(folder, TINY)
    assert read_manifest(folder) == before
    with pytest.raises(ValueError, match=r"has other sizes or .*; give another --folder"):
        random_bank.prepare(folder, replace(TINY, width=64))
    monkeypatch.setattr(random_bank, "STORED", "float16")
    with pytest.raises(ValueError, match="or is not in float16; give another --folder"):
        random_bank.prepare(folder, TINY)


def test_models_with_and_without_a_bank_share_their_weights(folder):
    with_bank, base_model = random_bank.make_models(TINY, StoredBank(folder))
    mine, other = dict(with_bank.named_parameters()), dict(base_model.named_parameters())
    assert mine.keys() == other.keys()
    assert all(mine[name] is other[name] or mine[name].equal(other[name]) for name in mine)
    assert mine["embedding.weight"].data_ptr() == other["embedding.weight"].data_ptr()
    tokens = torch.arange(4)[None]
    assert not with_bank(tokens).y.equal(base_model(tokens).y), "blocks are not zero"


def test_places_are_as_fast_as_whole_paths_were_read(folder, monkeypatch):
    places = []
    monkeypatch.setattr(
        cold_reads.measure,
        "interleaved",
        lambda calls, *_, **__: dict(zip(calls, ([4.0, 2.0, 1.0], [8.0, 8.0, 8.0]), strict=True)),
    )
    monkeypatch.setattr(cold_reads, "tier_table", lambda shape, dtype, tiers: places.extend(tiers))
    cold_reads._tier_table(folder, 7.0)
    with closing(StoredBank(folder, read="pread")) as stored:
        size = stored.shape.fetched * cold_reads.DTYPE.itemsize
    rates = {place.name: place.bytes_per_second for place in places}
    assert rates == {"memory": size / 2, "page cache": size / 8, "disk": 7}
