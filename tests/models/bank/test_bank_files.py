"""Files of memory banks: what they hold, how they are replaced, and which are refused."""

import json
import os
import resource
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash

from mneme.layers.bank.memory_bank import BankShape
from mneme.models.bank import (
    BankFiles,
    read_manifest,
    verify_bank,
    write_bank,
)
from mneme.storage import record_file
from mneme.storage.files import StorageError
from mneme.storage.record_file import RecordFile
from mneme.storage.writing import locked
from scripts import bank as bank_program
from tests.models.bank.banks import NODES, SHAPE, block, contents, damage, finish, fork, save

HASH, OTHER = "a1" * 32, "b2" * 32


def first_file(folder, level=3):
    (path,) = folder.glob(f"level{level}-*.bank")
    return path


# What files hold


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_are_read_as_they_were_written(tmp_path, dtype):
    written = save(tmp_path, dtype=dtype, router=HASH, base_model=OTHER, facts={"step": 7})
    bank = BankFiles(tmp_path, router=HASH, base_model=OTHER)
    found = bank.manifest
    assert found == written
    assert (found.generation, found.shape, found.facts) == (1, SHAPE, {"step": 7})
    for level, node in NODES:
        expected = block(level, node).to(getattr(torch, dtype))
        assert torch.equal(bank.read(level, node), expected)
    assert verify_bank(tmp_path) == []


def test_a_bank_may_be_stored_in_another_dtype_than_its_blocks(tmp_path):
    def records(level):
        return (block(level, n).double() for n in range(SHAPE.nodes(level)))

    write_bank(tmp_path, SHAPE, records, dtype="float16")
    assert torch.equal(BankFiles(tmp_path).read(3, 2), block(3, 2).half())


def test_a_file_is_as_its_format_says(tmp_path):
    save(tmp_path, dtype="float16", router=HASH)
    data = (tmp_path / "level3-1.bank").read_bytes()
    head = json.loads(data[8:4088].rstrip(b"\0"))
    assert data[:8] == b"mnemerec"
    assert data[4088:4096] == xxhash.xxh3_64_digest(data[:4088])[::-1]
    assert (head["version"], head["kind"], head["count"], head["group"]) == (2, "blocks", 8, 1)
    about = {"level": 3, "generation": 1, "dtype": "float16", "router": HASH, "base_model": None}
    assert head["about"] == {**about, "shape": {**vars(SHAPE), "hidden": [3, 0, 2]}}
    assert (head["record_bytes"], head["stride"]) == (2 * 2 * 5 * 2, 4096)
    assert (head["checksums"], head["records"], len(data)) == (4096, 8192, head["file_bytes"])
    assert data[4096:4104] == xxhash.xxh3_64_digest(data[4104:8192])[::-1]
    for node in range(8):
        record = data[8192 + 4096 * node :][:4096]
        assert np.array_equal(
            np.frombuffer(record[:40], "<f2").reshape(2, 2, 5), block(3, node).half().numpy()
        )
        assert data[4104 + 8 * node :][:8] == xxhash.xxh3_64_digest(record)[::-1]
        assert not any(record[40:])


def test_records_of_any_size_begin_at_pages(tmp_path):
    shape = BankShape(places=3, branching=3, hidden=(1, 7, 1), width=90)
    save(tmp_path, shape=shape)
    files = [RecordFile(first_file(tmp_path, level), "blocks") for level in (0, 1, 2, 3)]
    assert [file.layout.stride for file in files] == [12288, 4096, 8192, 4096]
    assert files[2].layout.records % 4096 == 0
    assert torch.equal(BankFiles(tmp_path).read(2, 8), block(2, 8, shape=shape))


def test_a_table_of_checksums_may_need_several_pages(tmp_path):
    shape = BankShape(places=1, branching=23, hidden=(0, 1), width=1)
    save(tmp_path, shape=shape)
    assert RecordFile(first_file(tmp_path, level=2), "blocks").layout.records == 3 * 4096
    assert torch.equal(BankFiles(tmp_path).read(2, 528), block(2, 528, shape=shape))


def test_one_record_at_a_time_is_in_memory(tmp_path):
    alive = weakref.WeakSet()

    def records(level):
        for node in range(SHAPE.nodes(level)):
            record = block(level, node)
            alive.add(record)
            yield record
            del record
            assert len(alive) <= 1

    write_bank(tmp_path, SHAPE, records, dtype="float32")
    assert not alive


# Writing again


def test_a_newer_bank_takes_the_place_of_an_older(tmp_path):
    save(tmp_path, seed=0)
    newer = replace(SHAPE, hidden=(0, 1, 1))
    assert save(tmp_path, seed=1, shape=newer).generation == 2
    names = {"manifest.json", "level0-2.bank", "level2-2.bank", "level3-2.bank"}
    assert set(contents(tmp_path)) == names
    assert torch.equal(BankFiles(tmp_path).read(3, 5), block(3, 5, seed=1, shape=newer))


def test_files_of_a_failed_write_go_with_the_next_write_and_not_before(tmp_path):
    save(tmp_path)
    strays = ["level3-2.bank", "generation-2.lock"]
    strays += [f".{name}.{16 * 'a'}" for name in ("level1-2.bank", "manifest.json")]
    for name in [*strays, "notes.txt"]:
        (tmp_path / name).write_bytes(b"part")
    read_manifest(tmp_path)
    assert set(os.listdir(tmp_path)) >= set(strays)
    assert save(tmp_path).generation == 3
    assert set(os.listdir(tmp_path)).isdisjoint(strays)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("older", [False, True])
def test_a_write_that_fails_half_way_changes_nothing(tmp_path, older):
    if older:
        save(tmp_path)
    before = contents(tmp_path)

    def records(level):
        yield from (block(level, n) for n in range(SHAPE.nodes(level) - (level == 3)))
        if level == 3:
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="own"):
        write_bank(tmp_path, SHAPE, records, dtype="float32")
    assert contents(tmp_path) == before


def test_a_bank_whose_manifest_is_lost_can_be_written_again(tmp_path):
    save(tmp_path)
    damage(tmp_path / "manifest.json", 40)
    before = contents(tmp_path)
    with pytest.raises(StorageError, match=r"level0-2\.bank needs 1 blocks; only 0 were given"):
        write_bank(tmp_path, SHAPE, lambda level: [], dtype="float32")
    assert contents(tmp_path) == before, "it may yet be repaired"
    assert save(tmp_path).generation == 2
    assert verify_bank(tmp_path) == []
    assert len(contents(tmp_path)) == 4


def test_one_bank_has_one_writer_at_a_time(tmp_path):
    save(tmp_path)
    before = contents(tmp_path)
    with (
        locked(tmp_path),
        pytest.raises(StorageError, match="another process or thread is writing"),
    ):
        save(tmp_path)
    assert contents(tmp_path) == before
    save(tmp_path)


def test_files_may_be_read_by_those_who_may_read_new_files(tmp_path):
    older = os.umask(0o027)
    try:
        save(tmp_path)
    finally:
        os.umask(older)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_full_disk_is_one_error_and_leaves_the_older_bank(tmp_path):
    """A limit on the size of files stands for it: EFBIG comes from the same calls as ENOSPC."""
    save(tmp_path)
    before = contents(tmp_path)

    def write(report):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # enough for levels 0 and 1
        try:
            save(tmp_path, seed=1)
        except StorageError as error:
            report(error)

    (message,), _ = finish(*fork(write))
    assert "level3-2.bank, which needs 40,960 bytes: [Errno 27] File too large" in message
    assert contents(tmp_path) == before
    save(tmp_path, seed=1)


# Records that cannot be stored


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            torch.zeros(2, 3, 5),
            r"block 6 of level 3 must have the shape \(2, 2, 5\), got \(2, 3, 5",
        ),
        (torch.full((2, 2, 5), float("nan")), "block 6 of level 3 is not finite in float16"),
        (torch.full((2, 2, 5), 1e5), "block 6 of level 3 is not finite in float16"),
    ],
)
def test_blocks_that_cannot_be_stored_are_named(tmp_path, wrong, says):
    def records(level):
        blocks = [block(level, n) for n in range(SHAPE.nodes(level))]
        return blocks if level < 3 else [*blocks[:6], wrong, blocks[7]]

    with pytest.raises(StorageError, match=says):
        write_bank(tmp_path, SHAPE, records, dtype="float16")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("count", "says"), [(7, "only 7"), (9, "more"), (0, "only 0")])
def test_too_few_and_too_many_blocks_are_refused(tmp_path, count, says):
    def records(level):
        return [block(level, n) for n in range(count if level == 3 else SHAPE.nodes(level))]

    with pytest.raises(StorageError, match=rf"level3-1\.bank needs 8 blocks; {says} were given"):
        write_bank(tmp_path, SHAPE, records, dtype="float32")


def test_facts_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path / "bank", facts={"seen": {1, 2}})
    assert not (tmp_path / "bank").exists()


def test_hashes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(
        StorageError, match="shorten what it says about the records, such as hashes"
    ):
        save(tmp_path, router="a" * 4000)


# Files that cannot be used


@pytest.fixture
def bank(tmp_path):
    save(tmp_path, router=HASH, base_model=OTHER)
    return tmp_path


def test_a_missing_bank_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            StorageError, match=f"no memory bank in {folder}: it has no manifest.json"
        ):
            read_manifest(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"version": 2}', b'{"version": 2, "checksum": "0"}'],
)
def test_a_manifest_that_is_none_is_named(bank, content):
    (bank / "manifest.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"manifest\.json is damaged or was changed by hand"):
        read_manifest(bank)


def test_a_flipped_bit_of_a_manifest_is_found_wherever_it_is(bank):
    path = bank / "manifest.json"
    original = path.read_bytes()
    for at in range(0, len(original), 61):
        damage(path, at)
        with pytest.raises(StorageError):
            read_manifest(bank)
        path.write_bytes(original)
    read_manifest(bank)


def test_other_versions_are_refused_by_name(bank, monkeypatch):
    path = bank / "manifest.json"
    original = path.read_text()
    for version in (1, 3):
        path.write_text(original.replace('"version": 2', f'"version": {version}'))
        says = (
            rf"json has version {version} of the format, and .* reads 2; save the bank again from"
        )
        with pytest.raises(StorageError, match=says):
            read_manifest(bank)
        assert "has version" in verify_bank(bank)[0]
    path.write_text(original)
    monkeypatch.setattr(record_file, "VERSION", 3)
    with pytest.raises(
        StorageError, match=r"level3-1\.bank has version 2 of the format, .* reads 3"
    ):
        RecordFile(first_file(bank), "blocks")
    monkeypatch.undo()
    first_file(bank).write_bytes(b"mnemebnk" + bytes(5000))  # the first format
    with pytest.raises(
        StorageError, match=r"level3-1\.bank has version 1 of the format, .* reads 2"
    ):
        BankFiles(bank)


def test_a_bank_of_version_1_can_be_written_over(tmp_path):
    save(tmp_path)
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace('"version": 2', '"version": 1'))
    save(tmp_path, seed=1)
    assert verify_bank(tmp_path) == []
    assert set(contents(tmp_path)) == {"manifest.json", *(f"level{n}-2.bank" for n in (0, 1, 3))}


@pytest.mark.parametrize("what", ["router", "base_model"])
def test_another_router_and_another_base_model_are_refused(bank, what):
    found = {"router": HASH, "base_model": OTHER}[what]
    word = what.replace("_", " ")
    says = rf"for the {word} {found[:12]}, and is used with cccccccccccc; .* that {word}"
    with pytest.raises(StorageError, match=says):
        read_manifest(bank, **{what: "c" * 64})
    read_manifest(bank, **{what: found})


def test_a_bank_of_no_known_router_is_refused_to_a_router(tmp_path):
    save(tmp_path)
    with pytest.raises(
        StorageError, match="written without naming its router, and is used with a1a1"
    ):
        BankFiles(tmp_path, router=HASH)


def test_a_missing_level_is_named(bank):
    first_file(bank, level=1).unlink()
    with pytest.raises(
        StorageError, match=r"cannot open .*level1-1\.bank, a level of a memory bank: No such"
    ):
        BankFiles(bank)


@pytest.mark.parametrize("content", [b"", b"short", b"PK\x03\x04" + bytes(9000)])
def test_another_kind_of_file_is_named(bank, content):
    first_file(bank).write_bytes(content)
    with pytest.raises(StorageError, match=r"level3-1\.bank is not a level of a memory bank"):
        BankFiles(bank)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (5, "cut short: it has 5 bytes, its header alone 4,096"),
        (4095, "cut short: it has 4,095 bytes, its header alone 4,096"),
        (4096, "has 4,096 bytes where its 8 blocks of 4,096 need 40,960"),
        (40_959, "has 40,959 bytes where its 8 blocks of 4,096 need 40,960"),
        (40_961, "has 40,961 bytes where"),
    ],
)
def test_a_level_that_was_cut_short_is_named(bank, kept, says):
    path = first_file(bank)
    path.write_bytes((path.read_bytes() + b"x")[:kept])
    with pytest.raises(StorageError, match=rf"level3-1\.bank (is )?{says}"):
        BankFiles(bank)


@pytest.mark.parametrize("at", [8, 12, 15, 16, 60, 300, 2000, 4095])
def test_a_flipped_bit_of_the_header_is_found_on_opening(bank, at):
    damage(first_file(bank), at)
    with pytest.raises(StorageError, match=r"the header of .*level3-1\.bank is damaged"):
        BankFiles(bank)


@pytest.mark.parametrize("at", [4096, 4103, 4104, 4096 + 8 + 8 * 8 - 1, 8191])
def test_a_flipped_bit_of_the_checksums_is_found_on_opening(bank, at):
    damage(first_file(bank), at)
    with pytest.raises(StorageError, match=r"the checksums in .*level3-1\.bank are damaged"):
        BankFiles(bank)


def test_a_level_of_another_write_is_refused(bank, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for _ in range(2):
        save(other, router=HASH, base_model=OTHER)
    first_file(bank).write_bytes(first_file(other).read_bytes())
    with pytest.raises(
        StorageError, match=r"level3-1\.bank is not of this bank: its generation is 2, "
    ):
        BankFiles(bank)


def test_a_level_of_another_bank_is_refused(bank, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save(other, router=HASH, base_model=OTHER, dtype="bfloat16")
    first_file(bank).write_bytes(first_file(other).read_bytes())
    with pytest.raises(StorageError, match=r"its dtype is bfloat16, and that of .*json is float32"):
        BankFiles(bank)


@pytest.mark.parametrize("at", [0, 79, 80, 4095])
def test_a_flipped_bit_of_a_record_is_found_on_reading_it(bank, at):
    damage(first_file(bank), 8192 + 5 * 4096 + at)
    files = BankFiles(bank)
    with pytest.raises(StorageError, match=r"level3-1\.bank is damaged in block 5"):
        files.read(3, 5)
    files.read(3, 4)


def test_a_file_that_is_cut_while_it_is_open_is_named(bank):
    files = BankFiles(bank)
    os.truncate(first_file(bank), 8192 + 7 * 4096 + 10)
    files.read(3, 6)
    with pytest.raises(StorageError, match=r"has 10 bytes of block 7, which needs 4,096; was the"):
        files.read(3, 7)


@pytest.mark.parametrize("node", [-1, 8])
def test_blocks_that_are_not_there_are_refused(bank, node):
    with pytest.raises(StorageError, match=rf"level 3 has blocks 0 to 7, and no {node}"):
        BankFiles(bank).read(3, node)


def test_verify_tells_all_problems(bank, capsys):
    bank_program.run(["verify", str(bank)])
    assert "every block is as it was written; generation 1, 3 files" in capsys.readouterr().out
    for node in (2, 6):
        damage(first_file(bank), 8192 + node * 4096)
    damage(first_file(bank, level=1), 4096)
    problems = verify_bank(bank)
    assert len(problems) == 3
    assert "level1-1.bank are damaged" in problems[0]
    assert ["block 2" in problems[1], "block 6" in problems[2]] == [True, True]
    with pytest.raises(StorageError) as caught:
        bank_program.run(["verify", str(bank)])
    assert str(caught.value).splitlines() == problems
    (bank / "manifest.json").unlink()
    assert "no manifest.json" in verify_bank(bank)[0]
