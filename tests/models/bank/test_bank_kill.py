"""A writer that is killed loses nothing that it reported, and leaves a bank that is whole."""

import os
import random
import select
import signal
import sys
import time
from itertools import count

import torch

from mneme.models.bank import (
    BankFiles,
    export_blocks,
    read_manifest,
    replace_blocks,
    verify_bank,
    write_bank,
)
from mneme.storage.generations import read_generation
from tests.models.bank.banks import NODES, SHAPE, everything, finish, fork

EDITED = [(1, 0), (3, 5)]
KILLS = 10
CHANGING = {"fsync", "replace", "unlink", "write", "seek", "flush"}  # calls that may change files


def full(level, value):
    return torch.full(SHAPE.record(level), value)


def write(folder, step):
    """A bank whose every number is its step."""

    def records(level):
        return (full(level, float(step)) for _ in range(SHAPE.nodes(level)))

    write_bank(folder, SHAPE, records, dtype="float32", facts={"step": step})


def change(folder, step):
    """Gives two blocks another value, in one edit."""
    replace_blocks(folder, {(level, node): full(level, step + 0.5) for level, node in EDITED})


def step_of(folder) -> float:
    """Of a bank that is whole: its step, and a half if it has been edited."""
    step = read_manifest(folder).facts["step"]
    assert verify_bank(folder) == []
    found = {
        place: block.unique().tolist() for place, block in export_blocks(folder, NODES).items()
    }
    edited = found[EDITED[0]] == [step + 0.5]
    for place, values in found.items():
        assert values == [step + 0.5 * (edited and place in EDITED)], (place, edited)
    return step + 0.5 * edited


def test_what_was_reported_outlives_a_kill_at_any_moment(tmp_path):
    write(tmp_path, 0)
    moments = random.Random(0)

    def write_on(report):
        for step in count(int(step_of(tmp_path)) + 1):
            write(tmp_path, step)
            report(f"saved {step}")
            change(tmp_path, step)
            report(f"edited {step}.5")

    for _ in range(KILLS):
        child, out = fork(write_on)
        select.select([out], [], [], 60)
        time.sleep(moments.uniform(0, 0.1))
        reports, _ = finish(child, out, kill=True)
        told = [line.split() for line in reports]
        assert {what for what, _ in told} <= {"saved", "edited"}, reports
        last = float(told[-1][1])
        assert last <= step_of(tmp_path) <= last + 0.5


def moments_of(act, folder) -> list[dict[str, bytes]]:
    """What a kill would leave at every moment of an act: the files as they are between calls.

    What the process has not yet given to the system is not in them, and would be lost.
    """
    found = [everything(folder)]

    def look(frame, event, function):
        if event == "c_call" and function.__name__ in CHANGING and found[-1] != everything(folder):
            found.append(everything(folder))

    sys.setprofile(look)
    try:
        act()
    finally:
        sys.setprofile(None)
    return [*found, everything(folder)]


def restored(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_kill_between_any_two_calls_leaves_the_older_or_the_newer_bank(tmp_path):
    bank = tmp_path / "bank"
    write(bank, 1)
    moments = moments_of(lambda: write(bank, 2), bank)
    assert len(moments) > 15
    steps = []
    for i, files in enumerate(moments):
        left = restored(tmp_path / f"{i}", files)
        steps.append(step_of(left))
        assert everything(left) == files, "reading writes nothing"
        if i == 0 or len(files) != len(moments[i - 1]):  # a file has come, or one has gone
            write(left, 3)
            assert len(os.listdir(left)) == 6, "the next write removes what this one has left"
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
    assert steps.index(2) < len(steps) - 2, "the older files go after the newer are in place"


def test_a_kill_between_any_two_calls_leaves_all_of_an_edit_or_nothing(tmp_path):
    bank = tmp_path / "bank"
    write(bank, 1)
    moments = moments_of(lambda: change(bank, 1), bank)
    assert len(moments) > 10
    steps = []
    for i, files in enumerate(moments):
        left = restored(tmp_path / f"{i}", files)
        steps.append(step_of(left))
        assert everything(left) == files, "reading writes nothing"
        change(left, 1)
        assert step_of(left) == 1.5
        assert not read_generation(left).superseded
        for level, node in EDITED:  # of the first write: where they lay, there is nothing
            assert not any(
                (left / f"level{level}-1.bank").read_bytes()[8192 + 4096 * node :][:4096]
            )
        assert len(list(left.glob("generation-*.lock"))) == 1
    assert steps == sorted(steps)
    assert set(steps) == {1, 1.5}


def test_a_reader_of_another_process_holds_what_it_reads_until_it_is_killed(tmp_path):
    write(tmp_path, 1)

    def read(report):
        bank = BankFiles(tmp_path)
        report("open")
        signal.pause()
        bank.close()

    child, out = fork(read)
    select.select([out], [], [], 60)
    change(tmp_path, 1)
    assert len(read_generation(tmp_path).superseded) == len(EDITED)
    assert finish(child, out, kill=True) == (["open"], False)
    change(tmp_path, 1)
    assert not read_generation(tmp_path).superseded


def order_of(act) -> list[str]:
    """The calls of an act by which names and contents of files come to be on disk."""
    found = []

    def look(frame, event, function):
        if event == "c_call" and function.__module__ == "posix":
            found.append(function.__name__)

    sys.setprofile(look)
    try:
        act()
    finally:
        sys.setprofile(None)
    return [name for name in found if name in ("fsync", "replace", "unlink")]


def test_nothing_is_given_up_before_what_replaces_it_is_on_disk(tmp_path):
    """A power cut, other than a kill, loses what was not yet told to be on disk."""
    write(tmp_path, 1)
    file = ["fsync", "replace", "fsync"]  # its contents, its name, and its name on disk
    levels, lock, manifest, removals = 3 * file, file, file, 4 * ["unlink"]  # of files and a lock
    newer = [*levels, *lock, *manifest]
    assert order_of(lambda: write(tmp_path, 2)) == [*newer, *manifest, *removals]
    newer, erased = [*2 * file, *lock, *manifest], 2 * ["fsync"]
    assert order_of(lambda: change(tmp_path, 2)) == [*newer, *erased, *manifest, "unlink"]
