"""A bank is read as it was when it was opened, whatever becomes of it meanwhile."""

import os
from pathlib import Path

import pytest
import torch

from mneme.models.bank import BankFiles, read_manifest, replace_block, verify_bank
from mneme.storage import generations
from mneme.storage.files import StorageError
from tests.models.bank.banks import block, contents, finish, fork, save


@pytest.mark.parametrize("change", [save, lambda folder: replace_block(folder, 3, 2, block(3, 0))])
def test_a_bank_that_changes_while_it_is_opened_is_opened_as_it_is_then(
    tmp_path, monkeypatch, change
):
    """Between the look at the manifest and the lock."""
    save(tmp_path, seed=1)
    opening, changes = generations.open_regular, []

    def late(path):
        if path.name == "generation-1.lock" and not changes:
            changes.append(change(tmp_path))
            assert not path.exists(), "nobody holds it"
        return opening(path)

    monkeypatch.setattr(generations, "open_regular", late)
    with BankFiles(tmp_path) as bank:
        assert bank.manifest.generation == 2
        assert torch.equal(bank.read(3, 2), block(3, 2 if change is save else 0))
        assert torch.equal(bank.read(1, 0), block(1, 0, seed=int(change is not save)))
    assert len(changes) == 1


def test_a_bank_that_changes_while_it_is_read_is_read_as_it_was(tmp_path):
    save(tmp_path)
    with BankFiles(tmp_path) as bank:
        replace_block(tmp_path, 3, 2, block(3, 0))
        save(tmp_path, seed=1)
        assert bank.held.problems() == []
        assert torch.equal(bank.read(3, 2), block(3, 2))
        assert set(contents(tmp_path)) >= {f"level{n}-{g}.bank" for n in (0, 1, 3) for g in (1, 3)}
    assert verify_bank(tmp_path) == []
    save(tmp_path, seed=2)
    assert set(contents(tmp_path)) == {"manifest.json", *(f"level{n}-4.bank" for n in (0, 1, 3))}


def test_generations_that_nobody_reads_do_not_wait_for_one_that_is_read(tmp_path):
    save(tmp_path)
    with BankFiles(tmp_path):
        for seed in (1, 2, 3):
            save(tmp_path, seed=seed)
        found = {int(path.stem.split("-")[1]) for path in tmp_path.glob("level3-*.bank")}
        assert found == {1, 4}


def test_a_lock_that_is_lost_is_named(tmp_path):
    save(tmp_path)
    (tmp_path / "generation-1.lock").unlink()
    with pytest.raises(
        StorageError, match=r"cannot lock .*generation-1\.lock, as readers do: No such"
    ):
        BankFiles(tmp_path)
    assert read_manifest(tmp_path).generation == 1
    (tmp_path / "generation-1.lock").touch()
    BankFiles(tmp_path).close()


def test_who_may_not_write_reads(tmp_path):
    save(tmp_path)
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def read(report):
        os.chdir(tmp_path)  # another user may not come in from above
        if os.geteuid() == 0:
            os.setuid(65534)  # as root may write everywhere
        with BankFiles(Path()) as bank:
            report(torch.equal(bank.read(3, 5), block(3, 5)))

    assert finish(*fork(read))[0] == ["True"]
    tmp_path.chmod(0o755)
