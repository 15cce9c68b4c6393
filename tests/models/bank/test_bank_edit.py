"""Blocks that are deleted, replaced and taken out; banks that are put together."""

import os
import resource
from dataclasses import replace

import pytest
import torch

from mneme.models.bank import (
    BankFiles,
    StoredBank,
    compact_bank,
    delete_block,
    delete_blocks,
    export_block,
    export_blocks,
    merge_banks,
    nodes_below,
    read_manifest,
    replace_block,
    replace_blocks,
    verify_bank,
)
from mneme.storage import writing
from mneme.storage.files import StorageError
from mneme.storage.generations import read_generation
from mneme.storage.record_file import tensor_bytes
from mneme.storage.writing import locked
from scripts import bank as bank_program
from tests.models.bank.banks import NODES, SHAPE, block, contents, damage, finish, fork, save

WHOLE = {"manifest.json", *(f"level{n}-1.bank" for n in (0, 1, 3))}


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


def raw(level, node, seed=0):
    """The bytes of a block that `save` put into a file of bfloat16."""
    return bytes(tensor_bytes(block(level, node, seed=seed), "bfloat16"))


def found_in(folder, data):
    """Whether any file has these bytes."""
    return any(data in content for content in contents(folder).values())


@pytest.mark.parametrize(("level", "node"), [(0, 0), (1, 1), (3, 0), (3, 7)])
def test_a_block_is_replaced_and_no_other(bank, level, node):
    before = read_manifest(bank)
    replace_block(bank, level, node, some(level))
    assert_blocks(bank, {(level, node): some(level)})
    assert read_manifest(bank) == replace(before, generation=2)
    assert set(contents(bank)) == {*WHOLE, f"level{level}-2.bank"}


@pytest.mark.parametrize(("level", "node"), [(0, 0), (3, 4)])
def test_a_block_that_is_deleted_is_zero(bank, level, node):
    delete_block(bank, level, node)
    assert not export_block(bank, level, node).any()
    assert_blocks(bank, {(level, node): torch.zeros(SHAPE.record(level))})


def test_a_block_that_is_taken_out_and_put_back_is_as_it_was(bank):
    taken = export_block(bank, 3, 2)
    delete_block(bank, 3, 2)
    replace_block(bank, 3, 2, taken)
    assert_blocks(bank, {})


def test_a_damaged_block_can_be_replaced(bank):
    damage(bank / "level3-1.bank", 8192 + 2 * 4096)
    with pytest.raises(StorageError, match=r"level3-1\.bank is damaged in block 2"):
        export_block(bank, 3, 2)
    replace_block(bank, 3, 2, some(3))
    assert_blocks(bank, {(3, 2): some(3)})


def test_an_edit_changes_no_byte_but_of_what_it_replaces(bank):
    before = contents(bank)
    replace_blocks(bank, {(3, 2): some(3), (1, 0): some(1)})
    for name, node in {"level3-1.bank": 2, "level1-1.bank": 0, "level0-1.bank": -9}.items():
        start, now = 8192 + 4096 * node, contents(bank)[name]
        changed = {at for at in range(len(now)) if now[at] != before[name][at]}
        assert changed <= {*range(start, start + 4096)}


def test_a_damaged_block_of_an_edit_is_found(bank):
    replace_blocks(bank, {(3, 2): some(3), (3, 7): some(3)})
    damage(bank / "level3-2.bank", 8192 + 4096)
    with pytest.raises(StorageError, match=r"level3-2\.bank is damaged in block 1"):
        export_block(bank, 3, 7)
    assert torch.equal(export_block(bank, 3, 2), some(3).bfloat16())
    assert len(verify_bank(bank)) == 1


# What is left of older blocks


@pytest.mark.parametrize("act", [delete_block, lambda *at: replace_block(*at, some(at[1]))])
def test_what_nobody_reads_is_erased_at_once(bank, act):
    assert found_in(bank, raw(3, 2))
    act(bank, 3, 2)
    assert not found_in(bank, raw(3, 2))
    assert read_generation(bank).superseded == ()
    assert [path.name for path in bank.glob("generation-*.lock")] == ["generation-2.lock"]


@pytest.mark.parametrize("by", ["edit", "command"])
def test_what_is_read_is_erased_when_it_is_read_no_more(bank, by, capsys):
    """With a generation between that nobody holds, and one that began after the deletion."""
    reader = BankFiles(bank)
    delete_blocks(bank, [(3, 2), (1, 0)])
    replace_block(bank, 3, 4, some(3))
    later = BankFiles(bank)
    delete_block(bank, 0, 0)
    bank_program.run(["compact", str(bank)])
    assert "are still being read, and are not erased yet" in capsys.readouterr().out
    for node in [(3, 2), (1, 0), (3, 4), (0, 0)]:
        assert found_in(bank, raw(*node))
        assert torch.equal(reader.read(*node), block(*node).bfloat16())
    assert torch.equal(later.read(0, 0), block(0, 0).bfloat16())
    assert not later.read(3, 2).any()
    reader.close()
    compact_bank(bank)
    assert not any(found_in(bank, raw(*node)) for node in [(3, 2), (1, 0), (3, 4)])
    assert later.held.problems() == []
    later.close()
    if by == "edit":
        delete_block(bank, 3, 7)
    else:
        bank_program.run(["compact", str(bank)])
        assert "erased yet" not in capsys.readouterr().out
    assert not found_in(bank, raw(0, 0))
    assert read_generation(bank).superseded == ()
    assert len(list(bank.glob("generation-*.lock"))) == 1


def test_a_block_of_an_edit_is_erased_as_well(bank):
    replace_block(bank, 3, 2, block(3, 2, seed=5))
    assert found_in(bank, raw(3, 2, seed=5))
    replace_block(bank, 3, 2, some(3))
    assert not found_in(bank, raw(3, 2, seed=5))
    assert_blocks(bank, {(3, 2): some(3)})


def test_readers_of_a_bank_that_is_edited_read_it_as_it_was(bank):
    reader = StoredBank(bank, read="pread", cache_bytes=0, dtype=torch.bfloat16)
    delete_blocks(bank, [(3, 2), (0, 0)])
    assert torch.equal(reader.record(3, 2), block(3, 2).bfloat16())
    assert torch.equal(reader.record(0, 0), block(0, 0).bfloat16())
    other = StoredBank(bank, read="pread", cache_bytes=0)
    assert not other.record(3, 2).any()
    assert torch.equal(other.record(3, 3), block(3, 3).bfloat16())
    reader.close()
    assert found_in(bank, raw(3, 2)), "nobody has edited it since"
    delete_blocks(bank, [])
    assert not found_in(bank, raw(3, 2))
    other.close()


def test_an_erasure_that_was_cut_short_is_made_by_the_next_edit(bank, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_overwrite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            delete_block(bank, 3, 2)
    assert_blocks(bank, {(3, 2): torch.zeros(SHAPE.record(3))})
    assert found_in(bank, raw(3, 2))
    delete_block(bank, 3, 5)
    assert not found_in(bank, raw(3, 2))


def test_an_erasure_that_the_system_refuses_is_named_and_made_later(bank):
    def edit(report):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # enough for what is new
        try:
            replace_blocks(bank, {(1, 0): some(1), (3, 7): some(3)})
        except StorageError as error:
            report(error)

    (message,), _ = finish(*fork(edit))
    assert "level3-1.bank: [Errno 27]" in message
    assert "the new generation is in place; what it supersedes is erased by the next" in message
    assert_blocks(bank, {(1, 0): some(1), (3, 7): some(3)})
    assert found_in(bank, raw(3, 7))
    compact_bank(bank)
    assert not found_in(bank, raw(3, 7))


@pytest.mark.parametrize("what", ["link", "other file", "nothing"])
def test_only_files_of_the_bank_are_overwritten(bank, what):
    """A folder may come from others."""
    reader = BankFiles(bank)
    delete_block(bank, 3, 2)
    reader.close()
    victim, level = bank / "victim.txt", bank / "level3-1.bank"
    victim.write_bytes(level.read_bytes() if what == "link" else bytes(range(256)) * 400)
    before = victim.read_bytes()
    level.unlink()
    if what == "link":
        level.symlink_to(victim)
    elif what == "other file":
        os.link(victim, level)
    delete_block(bank, 1, 0)
    assert victim.read_bytes() == before


# Compacting


def test_compacting_leaves_one_file_a_level_and_the_same_blocks(bank, capsys):
    changed = {(level, 0): some(level) for level in (0, 1, 3)}
    for node, new in changed.items():
        replace_block(bank, *node, new)
    before = read_manifest(bank)
    bank_program.run(["compact", str(bank)])
    assert "written whole; generation 5, 3 files" in capsys.readouterr().out
    assert read_manifest(bank) == replace(before, generation=5)
    assert set(contents(bank)) == {"manifest.json", *(f"level{n}-5.bank" for n in (0, 1, 3))}
    assert_blocks(bank, changed)
    whole = contents(bank)
    compact_bank(bank)
    assert contents(bank) == whole, "there is nothing to do"


def test_a_damaged_bank_is_not_compacted(bank):
    delete_block(bank, 1, 0)
    damage(bank / "level3-1.bank", 8192 + 6 * 4096)
    before = contents(bank)
    with pytest.raises(StorageError, match="is damaged in block 6"):
        compact_bank(bank)
    assert contents(bank) == before


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
        (3, 8, torch.zeros(2, 2, 5), r"level 3 has blocks 0 to 7, and no 8"),
        (3, 7, torch.zeros(2, 3, 5), r"block 7 of level 3 must have the shape \(2, 2, 5\)"),
        (3, 7, torch.full((2, 2, 5), float("inf")), "block 7 of level 3 is not finite"),
    ],
)
def test_an_edit_that_cannot_be_made_changes_nothing(bank, level, node, record, says):
    before = contents(bank)
    with pytest.raises(StorageError, match=says):
        replace_blocks(bank, {(1, 0): some(1), (level, node): record})
    assert contents(bank) == before


def test_an_edit_needs_a_bank(tmp_path):
    with pytest.raises(StorageError, match="no memory bank"):
        delete_block(tmp_path / "absent", 1, 0)
    with pytest.raises(StorageError, match="no memory bank"):
        delete_block(tmp_path, 1, 0)


def test_a_bank_that_is_being_written_is_not_edited(bank):
    with locked(bank), pytest.raises(StorageError, match="another process or thread is writing"):
        delete_block(bank, 1, 0)


def test_an_edit_on_a_full_disk_changes_nothing(bank):
    before = contents(bank)

    def write(report):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            delete_blocks(bank, nodes_below(SHAPE, 1, 0))
        except StorageError as error:
            report(error)

    (message,), _ = finish(*fork(write))
    says = "level1-2.bank, which needs 12,288 bytes: [Errno 27] File too large; nothing that was"
    assert says in message
    assert contents(bank) == before


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
    with pytest.raises(StorageError, match=f"banks to be merged must have {says}"):
        merge_banks(parts, tmp_path / "out", generic=0)
    assert not (tmp_path / "out").exists()


def test_every_child_and_the_generic_block_are_asked_for(parts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(StorageError, match=r"generic must be one of the children \[0, 1\], got 2"):
        merge_banks(parts, out, generic=2)
    with pytest.raises(StorageError, match=r"are given for the children \[0\]; needed: \[0, 1\]"):
        merge_banks({0: parts[0]}, out, generic=0)


def test_a_damaged_block_is_not_merged(parts, tmp_path):
    damage(parts[1] / "level3-1.bank", 8192 + 6 * 4096)
    with pytest.raises(StorageError, match=r"child1.* is damaged in block 6"):
        merge_banks(parts, tmp_path / "out", generic=0)
    assert contents(tmp_path / "out") == {}
