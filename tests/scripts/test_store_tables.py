"""From a trained run to its tables in files, and what is measured of them."""

import shutil

import pytest
import torch

from mneme.harness.config.build import build
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.evaluation import restore_model
from mneme.harness.run.checkpoints import checkpoint_config, read_checkpoint
from mneme.harness.run.jobs import start_run
from mneme.harness.run.run_directory import RunDirectory, RunError
from mneme.layers import replace_tables
from mneme.storage.files import StorageError
from mneme.storage.quantized_rows import TableFile
from mneme.storage.record_file import GROUP_ROWS
from scripts import store_tables
from scripts.store_tables import MODEL, export, served_model
from tests.harness.conftest import TINY
from tests.scripts.test_report import table

MEMORY = (
    "ffn=memory_plus",
    "ffn.sub_keys=8",
    "ffn.top_k=4",
    "ffn.table.update=dense",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunDirectory:
    """A memory under a mixer that has buffers which no checkpoint holds."""
    path = tmp_path_factory.mktemp("runs") / "run"
    mixer = ("mixer=atlas", "mixer.heads=1", "mixer.chunk_size=8")
    return start_run(compose_checked([*TINY, *MEMORY, *mixer, f"run_dir={path}"]))[0]


@pytest.fixture
def in_one_process(monkeypatch):
    """Measures here: starting a process takes seconds."""

    def measure(where, split, cache_bytes):
        return store_tables.measure(where, split=split, cache_bytes=cache_bytes)

    monkeypatch.setattr(store_tables, "_in_a_process", measure)


def test_an_exported_folder_alone_serves_the_model(trained, monkeypatch):
    folder = export(trained, trained.best, 8)
    assert sorted(file.name for file in folder.iterdir()) == [MODEL, "tables.memory_plus.table"]
    assert "optimizer_states" not in read_checkpoint(folder / MODEL)
    checkpoint = read_checkpoint(trained.best)
    config = checkpoint_config(checkpoint)
    model = restore_model(config, checkpoint)
    replace_tables(model, folder)
    tokens = build(config["task"]).train_batch(0).inputs
    served = served_model(folder.rename(folder.with_name("moved")), cache_bytes=2**16)
    assert not any(t.is_meta for t in (*served.parameters(), *served.buffers()))
    with torch.inference_mode():
        assert torch.equal(served(tokens)[0], model(tokens)[0])


def test_quality_and_costs_are_told_of_every_form(trained, in_one_process, capsys, tmp_path):
    out = tmp_path / "stored.md"
    store_tables.run([str(trained.path), "--cache-mb", "0.001", "--out", str(out)])
    printed = capsys.readouterr().out
    exact, eight, four = table(printed)
    assert [row["tables"] for row in (exact, eight, four)] == [
        "fp32 in memory", "8 bits in a file", "4 bits in a file",
    ]  # fmt: skip
    assert float(exact["loss (val)"]) == pytest.approx(
        trained.read_summary()["metrics"]["val/loss"], abs=1e-4
    )
    for row in (eight, four):
        lost = float(row["loss (val)"]) - float(exact["loss (val)"])
        assert float(row["lost in loss"]) == pytest.approx(lost, abs=1.1e-4)
        assert abs(lost) < 0.01
        assert 0 < float(row["from the cache"].rstrip("%")) < 100
        assert int(row["rows read/s"].replace(",", "")) > 0
    assert "caches of 0.001 MiB" in printed
    assert "<!-- report: stored -->" in out.read_text()


def test_bits_that_are_few_enough_lose_something(trained, in_one_process, capsys):
    """The measured model reads what is in the files, not the weights of the checkpoint."""
    weights = read_checkpoint(trained.best)
    name = "model.tables.memory_plus.weight"
    weights["state_dict"][name] = weights["state_dict"][name] * 100
    loud = trained.best.with_name("loud.ckpt")
    torch.save(weights, loud)
    store_tables.run([str(loud), "--bits", "4"])
    _, four = table(capsys.readouterr().out)
    assert float(four["lost in loss"]) != 0


def test_a_process_of_its_own_measures_its_memory(trained):
    folder = export(trained, trained.best, 4)
    served = store_tables._in_a_process(folder, "val", 1000)
    assert served.table_bytes == (folder / "tables.memory_plus.table").stat().st_size
    assert served.after["RssAnon"] >= served.before["RssAnon"] > 0
    assert served.reads.rows > served.reads.cached


def test_tables_of_another_model_of_the_same_shape_are_refused(trained, tmp_path):
    weights = read_checkpoint(trained.best)
    weights["state_dict"]["model.tables.memory_plus.weight"].neg_()
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / "other.ckpt")
    ours, theirs = (
        export(RunDirectory(tmp_path), tmp_path / "checkpoints" / "other.ckpt", 8),
        export(trained, trained.best, 8),
    )
    name = "tables.memory_plus.table"
    served_model(ours, cache_bytes=0)
    shutil.copy(theirs / name, ours / name)
    with pytest.raises(StorageError, match=r"plus\.table is not the table that was stored with"):
        served_model(ours, cache_bytes=0)
    with pytest.raises(RunError, match=r"plus\.table is not the table that was stored with"):
        store_tables.run([str(tmp_path), "--verify"])


def test_verifying_names_every_damaged_file_and_its_rows(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(store_tables, "_in_a_process", lambda *_: pytest.fail("measured"))
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    folders = [export(run, run.best, bits) for bits in (8, 4)]
    store_tables.run([str(run.path), "--verify"])
    assert capsys.readouterr().out.splitlines() == [f"{folder}: as written" for folder in folders]
    files = [folder / "tables.memory_plus.table" for folder in folders]
    for file in files:
        flip_a_bit(file, TableFile(file).layout.records + 9)
    rows = TableFile(files[0]).layout.count
    assert rows <= GROUP_ROWS
    with pytest.raises(RunError) as caught:
        store_tables.run([str(run.path), "--verify"])
    assert str(caught.value).splitlines() == [
        f"{file} is damaged in rows 0 to {rows - 1}; store the table again" for file in files
    ]
    files[0].unlink()
    with pytest.raises(RunError, match=r"cannot open .*plus\.table, a stored table"):
        store_tables.run([str(run.path), "--verify", "--bits", "8"])


def flip_a_bit(file, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_verifying_a_run_without_stored_tables_is_refused(trained, tmp_path):
    run = shutil.copytree(trained.path, tmp_path / "run")
    shutil.rmtree(run / "tables", ignore_errors=True)
    with pytest.raises(RunError, match="has no stored tables of these bits; store them first"):
        store_tables.run([str(run), "--verify"])


def test_a_run_without_tables_is_refused(tmp_path):
    path = tmp_path / "run"
    start_run(
        compose_checked(
            [*TINY, "trainer.max_steps=1", "trainer.val_check_interval=1", f"run_dir={path}"]
        )
    )
    with pytest.raises(RunError, match=r"best\.ckpt: the model has no table"):
        store_tables.run([str(path)])
    assert not (path / "tables").exists()
