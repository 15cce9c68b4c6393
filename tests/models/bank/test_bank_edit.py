"""Blocks that are deleted, replaced and taken out; banks that are put together."""

import os
import resource
import select
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mneme.models.bank import (
    BankError,
    delete_block,
    delete_blocks,
    edit,
    export_block,
    export_blocks,
    merge_banks,
    nodes_below,
    open_levels,
    read_manifest,
    replace_block,
    replace_blocks,
    verify_bank,
    write_bank,
)
from mneme.models.bank.journal import JOURNAL, Patch, apply_journal, locked, write_journal
from tests.models.bank.banks import NODES, SHAPE, block, contents, damage, finish, fork, save


@pytest.fixture
def bank(tmp_path):
    save(tmp_path, dtype="bfloat16", facts={"step": 3})
    return tmp_path


def assert_blocks(folder, changed, seed=0, dtype=torch.bfloat16):
    """The bank is sound, has these blocks, and those of `save` in all other places."""
    assert verify_bank(folder) == []
    for (level, node), found in export_blocks(folder, NODES).items():
        expected = changed.get((level, node), block(level, node, seed=seed))
        assert torch.equal(found, expected.to(dtype)), (level, node)


def some(level, seed=9):
    return block(level, 0, seed=seed)


# One block


@pytest.mark.parametrize(("level", "node"), [(0, 0), (1, 1), (3, 0), (3, 7)])
def test_a_block_is_replaced_and_no_other(bank, level, node):
    before = read_manifest(bank)
    replace_block(bank, level, node, some(level))
    assert_blocks(bank, {(level, node): some(level)})
    assert read_manifest(bank) == before
    assert set(contents(bank)) == {"manifest.json", *(f"level{n}-1.bank" for n in (0, 1, 3))}


@pytest.mark.parametrize(("level", "node"), [(0, 0), (3, 4)])
def test_a_block_that_is_deleted_is_zero(bank, level, node):
    delete_block(bank, level, node)
    assert not export_block(bank, level, node).any()
    assert_blocks(bank, {(level, node): torch.zeros(SHAPE.record(level))})


def test_a_block_that_is_taken_out_and_put_back_changes_nothing(bank):
    before = contents(bank)
    taken = export_block(bank, 3, 2)
    delete_block(bank, 3, 2)
    assert contents(bank) != before
    replace_block(bank, 3, 2, taken)
    assert contents(bank) == before


def test_a_damaged_block_can_be_replaced(bank):
    damage(bank / "level3-1.bank", 8192 + 2 * 4096)
    with pytest.raises(BankError, match=r"record 2 of .* Replace the block"):
        export_block(bank, 3, 2)
    replace_block(bank, 3, 2, some(3))
    assert_blocks(bank, {(3, 2): some(3)})


def test_a_bank_that_was_open_takes_a_new_block_for_a_damaged_one(bank):
    _, levels = open_levels(bank)
    replace_block(bank, 3, 2, some(3))
    with pytest.raises(BankError, match=r"record 2 .* is damaged"):
        levels[3].read(2)
    open_levels(bank)[1][3].read(2)


# Many


def test_a_subtree_is_the_nodes_below_that_have_blocks():
    assert nodes_below(SHAPE, 1, 1) == [(1, 1), *((3, n) for n in (4, 5, 6, 7))]
    assert nodes_below(SHAPE, 2, 1) == [(3, 2), (3, 3)]
    assert nodes_below(SHAPE, 3, 6) == [(3, 6)]
    whole = [n for child in (0, 1) for n in nodes_below(SHAPE, 1, child)]
    assert sorted(whole) == NODES[1:]


@pytest.mark.parametrize(("level", "node"), [(0, 0), (4, 0), (2, 4), (1, -1)])
def test_a_subtree_of_no_node_is_refused(level, node):
    with pytest.raises(ValueError, match=f"there is no node {node} at level {level}"):
        nodes_below(SHAPE, level, node)


def test_a_subtree_is_deleted_and_brought_back(bank):
    below = nodes_below(SHAPE, 1, 1)
    taken = export_blocks(bank, below)
    delete_blocks(bank, below)
    assert_blocks(bank, {(level, node): torch.zeros(SHAPE.record(level)) for level, node in below})
    replace_blocks(bank, taken)
    assert_blocks(bank, {})


def test_no_block_at_all_is_an_edit_too(bank):
    before = contents(bank)
    delete_blocks(bank, [])
    replace_blocks(bank, {})
    assert contents(bank) == before


# What is refused


@pytest.mark.parametrize(
    ("level", "node", "record", "says"),
    [
        (2, 0, torch.zeros(2, 0, 5), r"no blocks at level 2, only at \[0, 1, 3\]"),
        (3, 8, torch.zeros(2, 2, 5), r"level3-1\.bank has blocks 0 to 7, and no 8"),
        (3, 7, torch.zeros(2, 3, 5), r"block 7 of level 3 must have the shape \(2, 2, 5\)"),
        (3, 7, torch.full((2, 2, 5), float("inf")), "block 7 of level 3 is not finite"),
    ],
)
def test_an_edit_that_cannot_be_made_changes_nothing(bank, level, node, record, says):
    before = contents(bank)
    with pytest.raises(BankError, match=says):
        replace_blocks(bank, {(1, 0): some(1), (level, node): record})
    assert contents(bank) == before


def test_an_edit_needs_a_bank(tmp_path):
    with pytest.raises(BankError, match="no memory bank"):
        delete_block(tmp_path / "absent", 1, 0)
    with pytest.raises(BankError, match="no memory bank"):
        delete_block(tmp_path, 1, 0)


def test_a_bank_that_is_being_written_is_not_edited(bank):
    with locked(bank), pytest.raises(BankError, match="another process or thread is writing"):
        delete_block(bank, 1, 0)


def test_an_edit_on_a_full_disk_changes_nothing(bank):
    before = contents(bank)

    def write(report):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            delete_blocks(bank, nodes_below(SHAPE, 1, 0))
        except BankError as error:
            report(error)

    (message,), _ = finish(*fork(write))
    assert "edit.journal: [Errno 27] File too large; nothing that was saved is lost" in message
    assert contents(bank) == before


# Journals


@pytest.fixture
def cut_short(bank, monkeypatch):
    """A bank with the journal of an edit that has not been made."""
    with monkeypatch.context() as patch:
        patch.setattr(edit, "apply_journal", lambda folder: None)
        replace_blocks(bank, {(1, 0): some(1), (3, 5): some(3)})
    assert (bank / JOURNAL).exists()
    return bank


EDITED = {(1, 0): some(1), (3, 5): some(3)}


def test_an_edit_that_was_cut_short_is_made_when_the_bank_is_read(cut_short):
    read_manifest(cut_short)
    assert not (cut_short / JOURNAL).exists()
    assert_blocks(cut_short, EDITED)


def test_an_edit_that_was_cut_short_is_made_before_another(cut_short):
    delete_block(cut_short, 3, 4)
    assert_blocks(cut_short, {**EDITED, (3, 4): torch.zeros(SHAPE.record(3))})


def test_an_edit_that_was_cut_short_is_no_part_of_a_newer_bank(cut_short):
    save(cut_short, seed=1, dtype="bfloat16")
    assert not (cut_short / JOURNAL).exists()
    assert_blocks(cut_short, {}, seed=1)


def test_making_an_edit_twice_is_making_it_once(cut_short):
    journal = (cut_short / JOURNAL).read_bytes()
    apply_journal(cut_short)
    once = contents(cut_short)
    (cut_short / JOURNAL).write_bytes(journal)
    apply_journal(cut_short)
    assert contents(cut_short) == once


def test_a_journal_that_is_not_whole_is_ignored(cut_short):
    journal = cut_short / JOURNAL
    whole = journal.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    for part in (b"", whole[:10], whole[: len(whole) // 2], whole[:-1], flipped, bytes(len(whole))):
        journal.write_bytes(part)
        assert_blocks(cut_short, {})
        assert journal.exists(), "reading writes nothing"
    delete_block(cut_short, 3, 0)
    assert not journal.exists()
    assert_blocks(cut_short, {(3, 0): torch.zeros(SHAPE.record(3))})


def test_an_edit_to_be_made_in_a_folder_that_cannot_be_written_is_named(cut_short):
    (cut_short / ".lock").unlink()
    (cut_short / ".lock").mkdir()  # as root may write everywhere
    with pytest.raises(BankError, match=r"was cut short .*; open the bank once where it can be w"):
        read_manifest(cut_short)
    (cut_short / JOURNAL).unlink()
    assert_blocks(cut_short, {})


def test_a_reader_waits_for_an_edit_of_another(cut_short):
    found = []
    with locked(cut_short):
        reader = threading.Thread(target=lambda: found.append(export_block(cut_short, 3, 5)))
        reader.start()
        reader.join(0.05)
        assert reader.is_alive()
        apply_journal(cut_short)
    reader.join()
    assert torch.equal(found[0], some(3).bfloat16())


def test_a_reader_who_may_not_write_waits_for_an_edit_of_another(cut_short):
    for path in (cut_short, *cut_short.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (cut_short / ".lock").chmod(0o444)
    begins, begin = os.pipe()

    def read(report):
        os.read(begins, 1)
        os.chdir(cut_short)  # another user may not come in from above
        if os.geteuid() == 0:
            os.setuid(65534)  # as root may write everywhere
        report(torch.equal(export_block(Path(), 3, 5), some(3).bfloat16()))

    child, out = fork(read)  # before the lock, which it would have as well
    with locked(cut_short):
        os.write(begin, b"1")
        assert not select.select([out], [], [], 0.05)[0], "it waits"
        apply_journal(cut_short)
    assert finish(child, out)[0] == ["True"]


@pytest.mark.parametrize(
    ("file", "offset"),
    [
        ("../victim.txt", 0),
        ("{outside}/victim.txt", 0),
        ("manifest.json", 0),
        ("level3-1.bank", 4095),
        ("level3-1.bank", -2),
        ("level3-1.bank", 8192 + 8 * 4096 - 1),
        ("level3-1.bank", 2**70),
    ],
)
def test_a_journal_may_change_blocks_of_its_bank_and_nothing_else(tmp_path, file, offset):
    bank, victim = tmp_path / "bank", tmp_path / "victim.txt"
    save(bank)
    victim.write_bytes(b"precious")
    name = file.format(outside=tmp_path)
    write_journal(bank, [Patch("level1-1.bank", 8192, b"ab"), Patch(name, offset, b"ab")])
    before = contents(bank)
    with pytest.raises(BankError, match=r"would change .*; remove edit\.journal, or write"):
        read_manifest(bank)
    assert contents(bank) == before
    save(bank, seed=1)
    assert_blocks(bank, {}, seed=1, dtype=torch.float32)
    assert victim.read_bytes() == b"precious"


def test_a_link_out_of_the_bank_is_not_followed_to_what_is_no_bank(cut_short):
    victim = cut_short / "victim.txt"
    victim.write_bytes(bytes(100_000))
    (cut_short / "level3-1.bank").unlink()
    (cut_short / "level3-1.bank").symlink_to(victim)
    with pytest.raises(BankError, match="is not a level of a memory bank"):
        read_manifest(cut_short)
    assert victim.read_bytes() == bytes(100_000)


def test_an_edit_that_fails_while_files_are_changed_is_made_later(bank):
    def write(report):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # enough for the journal
        try:
            replace_blocks(bank, {(1, 0): some(1), (3, 7): some(3)})
        except BankError as error:
            report(error)

    (message,), _ = finish(*fork(write))
    assert "cannot write" in message
    assert "level3-1.bank: [Errno 27]" in message
    assert "the edit is in edit.journal, and will be made when the bank is next opened" in message
    assert_blocks(bank, {(1, 0): some(1), (3, 7): some(3)})


def test_a_bank_whose_edit_cannot_be_made_can_be_written_again(cut_short):
    (cut_short / "level3-1.bank").unlink()
    with pytest.raises(BankError, match=r"level3-1\.bank: .*No such file"):
        read_manifest(cut_short)
    before = contents(cut_short)
    with pytest.raises(BankError, match="only 0 were given"):
        write_bank(cut_short, SHAPE, lambda level: [], dtype="float32")
    assert contents(cut_short) == before, "the file may yet be found"
    save(cut_short, seed=1)
    assert not (cut_short / JOURNAL).exists()
    assert_blocks(cut_short, {}, seed=1, dtype=torch.float32)


# Merging


@pytest.fixture
def parts(tmp_path):
    folders = {child: tmp_path / f"child{child}" for child in (0, 1)}
    for child, folder in folders.items():
        save(folder, seed=child, router="r", base_model="a", facts={"step": child})
    return folders


def test_a_merged_bank_has_each_subtree_from_its_own(parts, tmp_path):
    merged = merge_banks(parts, tmp_path / "out", generic=1, facts={"step": 5})
    assert merged == read_manifest(tmp_path / "out", router="r", base_model="a")
    assert (merged.facts, merged.shape) == ({"step": 5}, SHAPE)
    second = {place: block(*place, seed=1) for place in [(0, 0), *nodes_below(SHAPE, 1, 1)]}
    assert_blocks(tmp_path / "out", second, seed=0, dtype=torch.float32)


def test_a_merged_bank_may_take_the_place_of_a_part(parts):
    merge_banks(parts, parts[0], generic=0)
    second = {place: block(*place, seed=1) for place in nodes_below(SHAPE, 1, 1)}
    assert_blocks(parts[0], second, seed=0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float16"}, "the same dtype: float32 in .*child0, float16 in .*child1"),
        ({"router": "s"}, "the same router: r in .*child0, s in .*child1"),
        ({"base_model": None}, "the same base_model: a in .*child0, None in .*child1"),
        ({"shape": replace(SHAPE, width=6)}, r"the same shape: BankShape\(.*width=5.*width=6"),
    ],
)
def test_banks_that_do_not_belong_together_are_refused(parts, tmp_path, options, says):
    save(parts[1], **{"router": "r", "base_model": "a", **options})
    with pytest.raises(BankError, match=f"banks to be merged must have {says}"):
        merge_banks(parts, tmp_path / "out", generic=0)
    assert not (tmp_path / "out").exists()


def test_every_child_and_the_generic_block_are_asked_for(parts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BankError, match=r"generic must be one of the children \[0, 1\], got 2"):
        merge_banks(parts, out, generic=2)
    with pytest.raises(BankError, match=r"are given for the children \[0\]; needed: \[0, 1\]"):
        merge_banks({0: parts[0]}, out, generic=0)


def test_a_damaged_block_is_not_merged(parts, tmp_path):
    damage(parts[1] / "level3-1.bank", 8192 + 6 * 4096)
    with pytest.raises(BankError, match=r"record 6 of .*child1.* is damaged"):
        merge_banks(parts, tmp_path / "out", generic=0)
    assert contents(tmp_path / "out") == {}
