"""The benchmark of banks runs in all its parts, and its figures are of what was timed."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from layers.memory_bank import BankShape
from models.bank import BankError, StoredBank, read_manifest
from models.bank.reading import Direct
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
    except BankError:
        return ["pread", "mmap"]
    return ["pread", "mmap", "direct"]


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
    large, *rows = measured["cold"]
    assert (large["what"], large["of_large_reads"], large["bar"]) == ("large reads", 1, None)
    kinds = ["path", *(f"block of level {level}" for level in (1, 2, 3))]
    assert [(row["way"], row["what"]) for row in rows] == list(product(ways, kinds))
    assert all(row["bytes_per_second"] > 0 for row in rows)
    assert {row["bar"] for row in rows} == {None}, "bars are for blocks of 1 MiB or more"


def test_what_is_fetched_is_compared_with_reading_a_prompt(measured):
    prompt, memory, cached = measured["warm"]
    assert (prompt["of_prompt"], prompt["bar"]) == (1, None)
    assert [row["what"] for row in (memory, cached)] == [
        "fetch from memory",
        "fetch from the page cache",
    ]
    assert all(row["bar"] == 0.1 and row["seconds"] > 0 for row in (memory, cached))


def test_decoding_is_compared_with_that_of_the_anchor(measured):
    anchor, ours = measured["decode"]
    assert (anchor["of_anchor"], anchor["bar"], ours["bar"]) == (1, None, 0.85)
    assert ours["tokens_per_second"] > 0


def test_serving_reads_blocks_and_reports_memory(measured):
    (row,) = measured["memory"]
    assert row["routes"] > 0
    assert row["read_gib"] * 2**30 >= PATH
    assert 0 < row["resident_gib"] <= row["peak_gib"]


def test_rates_and_bars():
    shape = BankShape(12, 16, (126, 126, 68), 3 * 768)
    rates = {cold_reads.LARGE_READS: [2e9, 2e9, 4e9], ("block of level 3", "direct"): [1e9] * 3}
    row = cold_reads._cold_row(("block of level 3", "direct"), shape, rates)
    assert (row["bytes_per_second"], row["of_large_reads"], row["bar"]) == (1e9, 0.5, 0.7)
    times = {bank.ANCHOR: [1.0, 1.0, 1.0], "with a bank": [2.0, 2.0, 1.0]}
    row = bank._decode_row("with a bank", 10, times)
    assert (row["tokens_per_second"], row["of_anchor"]) == (5, 0.5)


def test_the_bank_is_as_large_as_asked_and_its_blocks_are_not_small():
    sizes = random_bank.FULL
    shape = BankShape(sizes.layers, sizes.branching, sizes.hidden, 3 * sizes.width)
    assert sizes.hidden == (126, 126, 68)
    assert 16 <= shape.parameters * 2 / 2**30 < 16.3
    assert cold_reads.block_bytes(shape, torch.bfloat16, 3) >= 2**20
    with pytest.raises(ValueError, match=r"no bank of 100 GiB has 320 units in 12 layers"):
        replace(sizes, gib=100).hidden  # noqa: B018


def test_a_bank_is_made_once_and_another_is_not_touched(folder):
    before = read_manifest(folder)
    random_bank.prepare(folder, TINY)
    assert read_manifest(folder) == before
    with pytest.raises(ValueError, match="has other sizes; give another --folder"):
        random_bank.prepare(folder, replace(TINY, width=64))


def test_models_with_and_without_a_bank_share_their_weights(folder):
    with_bank, anchor = random_bank.make_models(TINY, StoredBank(folder))
    mine, other = dict(with_bank.named_parameters()), dict(anchor.named_parameters())
    assert mine.keys() == other.keys()
    assert all(mine[name] is other[name] or mine[name].equal(other[name]) for name in mine)
    assert mine["embedding.weight"].data_ptr() == other["embedding.weight"].data_ptr()
    tokens = torch.arange(4)[None]
    assert not with_bank(tokens).y.equal(anchor(tokens).y), "blocks are not zero"
