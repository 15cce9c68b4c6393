import gzip
import itertools
import json
import math

import numpy as np
import pytest
import torch

from mneme.tasks import ByteTokenizer, LocalFiles, SentencePieceTokenizer, StandardLibrary, Text
from mneme.tasks.batch import IGNORE
from mneme.tasks.text.store import _checksum_of


@pytest.fixture(params=["bytes", "sentencepiece"])
def task(request, make_text):
    pieces = request.param == "sentencepiece"
    return make_text(tokenizer=SentencePieceTokenizer(512) if pieces else ByteTokenizer())


def store_folder(tmp_path):
    (meta,) = (tmp_path / "cache").rglob("meta.json")
    return meta.parent


def test_the_store_holds_every_document_and_its_end(make_text, corpus_dir):
    task = make_text()
    texts = []
    for split, size in task.store.meta.splits.items():
        stream = np.asarray(task.store.streams[split])
        assert len(stream) == size.tokens == size.bytes + size.files
        ends = np.flatnonzero(stream == task.tokenizer.end_of_document)
        assert ends[-1] == len(stream) - 1
        texts += [task.tokenizer.decode(part) for part in np.split(stream, ends)]
    assert sorted(filter(None, texts)) == sorted(
        path.read_text(encoding="utf-8") for path in corpus_dir.rglob("*.txt")
    )


def test_training_windows_are_shifted_by_one_and_come_from_the_train_split(task):
    batch = task.train_batch(0)
    stream = np.asarray(task.store.streams["train"]).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(stream, task.seq_len + 1)
    for inputs, targets in zip(batch.inputs.numpy(), batch.targets.numpy(), strict=True):
        assert (windows == np.append(inputs, targets[-1])).all(axis=1).any()
        assert (inputs[1:] == targets[:-1]).all()
    assert torch.equal(batch.slices["bytes"], task.tokenizer.token_bytes[batch.targets])
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


def lanes(batches, field):
    return torch.cat([getattr(batch, field) for batch in batches], dim=1)


@pytest.mark.parametrize(("length", "rows"), [(16, 4), (7, 3), (64, 1), (5, 13)])
def test_lanes_are_contiguous_and_score_the_same_tokens_at_any_size(task, length, rows):
    batches = list(task.eval_batches("val", seq_len=length, batch_size=rows))
    assert {batch.inputs.shape for batch in batches} == {(rows, length)}
    inputs, targets = lanes(batches, "inputs"), lanes(batches, "targets")
    scored = targets != IGNORE
    assert torch.equal(inputs[:, 1:][scored[:, :-1]], targets[:, :-1][scored[:, :-1]])
    stream = torch.from_numpy(np.asarray(task.store.streams["val"]).astype(np.int64))
    count = task.scored_tokens("val")
    assert torch.equal(targets[scored], stream[1 : count + 1])  # row by row: each once, in order
    assert torch.equal(inputs[scored], stream[:count])
    sizes = torch.cat([batch.slices["bytes"] for batch in batches], dim=1)
    assert sizes.sum() == task.facts()["val_scored_bytes"]
    assert (sizes[~scored] == 0).all()


def test_eval_tokens_limits_what_is_scored(make_text):
    assert make_text(eval_tokens=500).scored_tokens("val") == 500
    task = make_text(eval_tokens=10**9)
    assert task.scored_tokens("val") == task.store.meta.splits["val"].tokens - 1


def test_a_uniform_model_costs_eight_bits_and_the_ends(make_text):
    task = make_text()
    metrics = task.metrics()
    for batch in task.eval_batches("test"):
        metrics.update(torch.zeros(*batch.inputs.shape, 257), batch)
    results = metrics.compute()
    ends = results["tokens"] - results["bytes"]
    assert results["tokens"] == task.scored_tokens("test")
    assert ends > 0
    wanted = math.log2(257) * (1 + ends / results["bytes"])
    assert results["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    assert results["loss"] == pytest.approx(math.log(257), rel=1e-6)


def test_the_guess_level_is_what_a_unigram_model_scores(task):
    counts = np.bincount(task.store.streams["train"], minlength=task.vocab_size) + 1
    logits = torch.from_numpy(np.log(counts / counts.sum()))
    metrics = task.metrics()
    for batch in task.eval_batches("val"):
        metrics.update(logits.expand(*batch.inputs.shape, -1), batch)
    assert metrics.compute()["bits_per_byte"] == pytest.approx(task.chance_level, rel=1e-5)


def test_compressors_are_given_exactly_the_scored_text(task):
    ids = np.asarray(task.store.streams["val"])[1 : task.scored_tokens("val") + 1]
    text = task.tokenizer.decode_bytes(ids)
    size = len(gzip.compress(text, 9))
    facts = task.facts()
    assert facts["val_gzip_bits_per_byte"] == pytest.approx(8 * size / len(text), rel=1e-9)
    assert 0 < facts["val_xz_bits_per_byte"] < 8
    assert facts["val_scored_bytes"] == len(text)


def test_facts_can_be_written_as_json_and_identify_the_corpus(task):
    facts = json.loads(json.dumps(task.facts()))
    assert len(facts["corpus_hash"]) == 64
    assert facts["train_files"] + facts["val_files"] + facts["test_files"] == 40


def test_a_prepared_store_is_used_again(make_text, tmp_path, monkeypatch):
    first = make_text().train_batch(0)
    before = {path: path.stat().st_mtime_ns for path in store_folder(tmp_path).iterdir()}
    monkeypatch.setattr("mneme.tasks.text.store._write_store", None)  # preparing again would fail
    assert torch.equal(make_text().train_batch(0).inputs, first.inputs)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in before) == ["meta.json", "test.bin", "train.bin", "val.bin"]


def truncate(folder):
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])


def drop_tokens(folder):
    (folder / "val.bin").unlink()


def drop_meta(folder):
    (folder / "meta.json").unlink()


def cut_meta(folder):
    path = folder / "meta.json"
    path.write_text(path.read_text()[:50])


def age_meta(folder):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


@pytest.mark.parametrize("damage", [truncate, drop_tokens, drop_meta, cut_meta, age_meta])
def test_a_damaged_store_is_made_again(make_text, tmp_path, damage):
    make_text().setup()
    folder = store_folder(tmp_path)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    make_text().setup()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_store_is_made_again_when_the_tokenizer_changes(make_text, tmp_path):
    def task():
        return make_text(tokenizer=SentencePieceTokenizer(512))

    task().setup()
    folder = store_folder(tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    other = {k: v for k, v in meta.items() if k != "checksum"} | {"fingerprint": "of another"}
    other["checksum"] = _checksum_of(other)
    (folder / "meta.json").write_text(json.dumps(other))
    assert task().store.meta.fingerprint == meta["fingerprint"]


def test_a_preparation_that_dies_leaves_nothing_that_looks_finished(make_text, tmp_path):
    class Dying(ByteTokenizer):
        def encode(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_text(tokenizer=Dying()).setup()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    make_text().setup()


def test_another_corpus_gets_another_store(make_text, corpus_dir, tmp_path):
    one = make_text().store.meta.corpus_hash
    (corpus_dir / "part0" / "00.txt").write_text("changed\n" * 100)
    assert make_text().store.meta.corpus_hash != one
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 300}, r"4 lanes of at least one block of 300 tokens need 4 \* 300 = 1200"),
        ({"eval_tokens": 63}, r"4 \* 16 = 64 targets, but 63 are scored in the val split"),
        ({"seq_len": 10**6}, r"train split holds \d+ tokens, fewer than .* \+ 1 = 1000001"),
    ],
)
def test_a_corpus_too_small_is_explained_with_the_arithmetic(make_text, options, message):
    with pytest.raises(ValueError, match=message):
        make_text(**options).setup()


def test_evaluation_at_no_length_is_an_error(make_text):
    with pytest.raises(ValueError, match=r"seq_len \(0\) and batch_size \(4\) must be at least 1"):
        make_text().eval_batches("val", seq_len=0)


def test_a_large_vocabulary_is_stored_in_wider_integers(make_text):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        pieces = (*ByteTokenizer.pieces, *[b""] * (70_000 - 257))

        def encode(self, text):
            return super().encode(text)

    task = make_text(tokenizer=Wide())
    assert task.store.streams["train"].dtype == np.uint32
    assert torch.equal(task.train_batch(3).inputs, make_text().train_batch(3).inputs)


def test_preparation_is_the_same_everywhere(tmp_path, corpus_dir):
    stores = []
    for name in ("a", "b"):
        source = LocalFiles([f"{corpus_dir}/**/*.txt"])
        task = Text(source=source, tokenizer=ByteTokenizer(), cache_dir=tmp_path / name)
        stores.append([np.asarray(stream).tobytes() for stream in task.store.streams.values()])
    assert stores[0] == stores[1]


def test_the_standard_library_end_to_end(tmp_path):
    task = Text(source=StandardLibrary(), tokenizer=ByteTokenizer(), cache_dir=str(tmp_path))
    task.setup()
    facts = task.facts()
    assert facts["train_bytes"] > 10 * facts["val_bytes"]
    assert facts["val_scored_tokens"] == facts["test_scored_tokens"] == 262_144
    for split in ("val", "test"):
        levels = [facts[f"{split}_{name}_bits_per_byte"] for name in ("xz", "gzip", "unigram")]
        assert 1 < levels[0] < levels[1] < levels[2] < 6
    batches = itertools.islice(iter(task.train_dataloader()), 2)
    assert [batch.inputs.shape for batch in batches] == [(16, 256)] * 2
