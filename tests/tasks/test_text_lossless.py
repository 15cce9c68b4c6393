"""Bits per byte are of the text, or are not reported."""

import io
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from mneme.tasks import ByteTokenizer, LocalFiles, SentencePieceTokenizer, Text

LOSSLESS = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}
SIZE = 512


@pytest.fixture
def corpus_dir(tmp_path):
    """Forty files with enough words for 600 pieces."""
    rng = np.random.default_rng(0)
    syllables = rng.choice([*"bdfgklmnprst"], (300, 3)), rng.choice([*"aeiouäö"], (300, 3))
    words = [
        "".join(map("".join, zip(*pair, strict=True))) for pair in zip(*syllables, strict=True)
    ]
    for index in range(40):
        path = tmp_path / "corpus" / f"part{index % 3}" / f"{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(" ".join(rng.choice(words, 12)) + "\n" for _ in range(30)))
    return tmp_path / "corpus"


def train_model(path: Path, corpus: Path, **options) -> str:
    """What a user of SentencePiece's trainer has, with or without its defaults."""
    model = io.BytesIO()
    settings = {"vocab_size": SIZE, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(
            file.read_text(encoding="utf-8").splitlines() for file in sorted(corpus.rglob("*.txt"))
        ),
        model_writer=model,
        **(settings | options),
    )
    path.write_bytes(model.getvalue())
    return str(path)


def test_a_model_that_keeps_text_is_scored_in_bits_per_byte(make_text, corpus_dir, tmp_path):
    file = train_model(tmp_path / "m.model", corpus_dir, **LOSSLESS)
    task = make_text(tokenizer=SentencePieceTokenizer(SIZE, file))
    assert task.monitor == "bits_per_byte"
    assert task.remark == ""
    for split, size in task.store.meta.splits.items():
        ids = np.asarray(task.store.streams[split]).astype(np.int64)
        assert task.tokenizer.token_bytes[torch.from_numpy(ids)].sum() == size.bytes
    # SentencePiece's own default is another id than that of a vocabulary learnt here
    assert task.tokenizer.end_of_document == 2
    assert (np.asarray(task.store.streams["train"]) == 2).sum() == task.facts()["train_files"]


@pytest.mark.parametrize("kept", [[], *itertools.combinations(LOSSLESS, 1), [*LOSSLESS][1:]])
def test_what_a_refusal_advises_is_enough(make_text, corpus_dir, tmp_path, kept):
    options = {name: LOSSLESS[name] for name in kept}
    file = train_model(tmp_path / "m.model", corpus_dir, **options)
    (corpus_dir / "part0" / "00.txt").write_text("plain\n  two  spaces and \ufb01n, \u2167\n")
    with pytest.raises(ValueError, match=r"^the tokenizer changes the text: line \d+ of ") as error:
        make_text(tokenizer=SentencePieceTokenizer(SIZE, file)).setup()
    assert file in str(error.value)
    assert "tokenizer.lossy=true" in str(error.value)
    assert "\n" not in str(error.value)
    advised = dict(re.findall(r"--(\w+)=(\w+)", str(error.value)))
    assert not set(advised) & set(options), "what was done right is not mentioned"
    parsed = {name: {"false": False}.get(value, value) for name, value in advised.items()}
    again = train_model(tmp_path / "again.model", corpus_dir, **options, **parsed)
    make_text(tokenizer=SentencePieceTokenizer(SIZE, again)).setup()


def test_the_place_of_the_first_loss_is_named(make_text, corpus_dir, tmp_path):
    file = train_model(
        tmp_path / "m.model", corpus_dir, **(LOSSLESS | {"normalization_rule_name": "nfkc"})
    )
    for path in corpus_dir.rglob("*.txt"):
        path.write_text("plain text\n" * 100)
    (corpus_dir / "part1" / "01.txt").write_text("one\n" * 6 + "the number \u2167 is eight\n" * 9)
    with pytest.raises(ValueError, match=r"line 7 of part1/01.txt holds '.{0,9}the number \u2167"):
        make_text(tokenizer=SentencePieceTokenizer(SIZE, file)).setup()


def test_a_lossy_tokenizer_is_scored_by_the_token(make_text, corpus_dir, tmp_path):
    file = train_model(tmp_path / "m.model", corpus_dir)
    task = make_text(tokenizer=SentencePieceTokenizer(SIZE, file, lossy=True))
    assert task.monitor == "loss"
    assert "declared to be lossy: in this corpus, line 1 of " in task.remark
    metrics = task.metrics()
    counts = np.bincount(task.store.streams["train"], minlength=SIZE) + 1
    logits = torch.from_numpy(np.log(counts / counts.sum()))
    for batch in task.eval_batches("val"):
        metrics.update(logits.expand(*batch.inputs.shape, -1), batch)
    found = metrics.compute()
    assert set(found) == {"loss", "perplexity", "tokens"}
    assert found["loss"] == pytest.approx(task.chance_level, rel=1e-5)
    assert task.baselines("val") == {"unigram": task.chance_level}
    facts = json.loads(json.dumps(task.facts()))
    assert facts["remark"] == task.remark
    assert not [name for name in facts if "per_byte" in name or name.endswith("scored_bytes")]


def test_a_store_of_a_lossy_tokenizer_serves_no_other(make_text, corpus_dir, tmp_path):
    file = train_model(tmp_path / "m.model", corpus_dir)
    make_text(tokenizer=SentencePieceTokenizer(SIZE, file, lossy=True)).setup()
    with pytest.raises(ValueError, match="the tokenizer changes the text"):
        make_text(tokenizer=SentencePieceTokenizer(SIZE, file)).setup()


def test_any_tokenizer_is_checked(make_text):
    class Forgetful(ByteTokenizer):
        key = "forgetful"

        def encode(self, text):
            return super().encode(text.replace("ä", "a"))

    with pytest.raises(ValueError, match=r"the tokenizer changes the text: line \d+ of .*ä.*a"):
        make_text(tokenizer=Forgetful()).setup()


def test_a_learnt_vocabulary_is_not_lossy():
    with pytest.raises(ValueError, match="a vocabulary that is learnt here loses nothing"):
        SentencePieceTokenizer(SIZE, lossy=True)


BAD_MODELS = {
    "empty": (lambda data: b"", "is empty"),
    "garbage": (lambda data: b"no model at all" * 500, "is not a SentencePiece model"),
    "of another program": (lambda data: b'{"model": {"vocab": {}}}', "is not a SentencePiece"),
    "half": (lambda data: data[: len(data) // 2], "is not a SentencePiece model"),
    "without its end": (lambda data: data[:-1], "is not a SentencePiece model"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_file_that_is_no_model_is_named_and_never_replaced(corpus_dir, tmp_path, name):
    spoil, message = BAD_MODELS[name]
    path = tmp_path / "m.model"
    train_model(path, corpus_dir, **LOSSLESS)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=f"^model_file: {path} {message}"):
        SentencePieceTokenizer(SIZE, str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byte_fallback": False}, r"has no pieces for bytes.*--byte_fallback=true"),
        ({"eos_id": -1}, r"has no piece for the end of a document.*--eos_id=1"),
        ({"vocab_size": 600}, r"has 600 pieces, and vocab_size is 512: set vocab_size=600"),
        ({"vocab_size": 400}, r"has 400 pieces, and vocab_size is 512: set vocab_size=400"),
    ],
)
def test_a_model_that_does_not_fit_says_what_would(corpus_dir, tmp_path, options, message):
    file = train_model(tmp_path / "m.model", corpus_dir, **LOSSLESS, **options)
    with pytest.raises(ValueError, match=f"^model_file: {file} {message}"):
        SentencePieceTokenizer(SIZE, file)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [("pipe", "is not a file"), (".", "is not a file"), ("no", "cannot read")]:
        with pytest.raises(ValueError, match=message):
            SentencePieceTokenizer(SIZE, str(tmp_path / path))


def test_a_given_model_is_what_is_used_whatever_the_cache_holds(make_text, corpus_dir, tmp_path):
    file = train_model(tmp_path / "m.model", corpus_dir, **LOSSLESS)
    task = make_text(tokenizer=SentencePieceTokenizer(SIZE, file))
    folder = tmp_path / "cache" / task.store.meta.corpus_hash[:16] / task.tokenizer.key
    (folder / "tokenizer.model").write_bytes(b"something else")
    again = make_text(tokenizer=SentencePieceTokenizer(SIZE, file))
    assert again.store.meta.fingerprint == task.store.meta.fingerprint


def write(folder: Path, *texts: str) -> LocalFiles:
    for index, text in enumerate(texts):
        folder.mkdir(exist_ok=True)
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    return LocalFiles([f"{folder}/*.txt"])


HAN = "".join(chr(0x4E00 + index) for index in range(3000))
HARD = {
    "long lines": "".join(f"word{index % 97} and 記憶 " for index in range(4000)),
    "more characters than ids": "\n".join(HAN[i : i + 50] for i in range(0, 3000, 50)) + "\n",
    "long lines of many characters": HAN * 3,
    "one character": "a" * 20_000,
    "only spaces": " " * 3_000,
    "only tabs and line ends": "\t\n" * 2_000,
    "no text that is printed": "\0\x07\x0b" * 1_000,
}


@pytest.mark.parametrize("name", HARD)
def test_a_vocabulary_is_learnt_from_text_of_any_kind(tmp_path, name):
    source = write(tmp_path / "corpus", *[HARD[name]] * 3)
    task = Text(
        source=source,
        tokenizer=SentencePieceTokenizer(SIZE),
        seq_len=4,
        batch_size=2,
        cache_dir=tmp_path / "c",
    )
    task.setup()
    assert task.store.meta.loss is None
    assert math.isfinite(task.chance_level)


def test_long_lines_are_learnt_from(tmp_path):
    lengths = []
    text = "".join(f"memory number {index} is read; " for index in range(3000))
    for name, shown in {"long": text, "short": text.replace("; ", "; \n")}.items():
        tokenizer = SentencePieceTokenizer(SIZE)
        tokenizer.prepare(write(tmp_path / name, shown).documents(), tmp_path / f"{name}_model")
        lengths.append(len(tokenizer.encode(text)))
    assert lengths[0] < 1.1 * lengths[1]


def test_the_most_frequent_of_many_characters_are_pieces(tmp_path):
    tokenizer = SentencePieceTokenizer(SIZE)
    text = HAN + "記憶の" * 200 + "".join(HAN[:60]) * 20
    tokenizer.prepare(write(tmp_path / "corpus", text).documents(), tmp_path / "model")
    assert {"記".encode(), "憶".encode(), HAN[7].encode()} <= set(tokenizer.pieces)


def test_empty_files_do_no_harm(tmp_path):
    texts = ["", "some text to read\n" * 50, ""] * 100
    source = write(tmp_path / "corpus", *texts)
    task = Text(
        source=source,
        tokenizer=SentencePieceTokenizer(SIZE),
        seq_len=4,
        batch_size=2,
        cache_dir=tmp_path / "c",
    )
    task.setup()
    assert task.facts()["train_bytes"] > 0


def test_nothing_but_empty_files_says_so(tmp_path):
    source = write(tmp_path / "corpus", *[""] * 400)
    with pytest.raises(ValueError, match=r"files to train on have no text to learn a vocabulary"):
        Text(
            source=source, tokenizer=SentencePieceTokenizer(SIZE), cache_dir=tmp_path / "c"
        ).setup()
    with pytest.raises(ValueError, match=r"what is scored of the val split holds no text"):
        Text(
            source=source,
            tokenizer=ByteTokenizer(),
            seq_len=2,
            batch_size=1,
            cache_dir=tmp_path / "c",
        ).setup()


def test_one_changed_byte_anywhere_in_the_cache_is_found(make_text, tmp_path):
    def stored():
        task = make_text(tokenizer=SentencePieceTokenizer(SIZE))
        task.setup()
        return {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}

    whole = stored()
    assert len(whole) == 6
    for path, data in whole.items():
        for place in (0, len(data) // 2, len(data) - 1):
            spoilt = bytearray(data)
            spoilt[place] ^= 1
            path.write_bytes(bytes(spoilt))
            assert stored() == whole, f"byte {place} of {path.name}"
        path.write_bytes(bytes(len(data)))  # as a crash of the machine leaves it
        assert stored() == whole, path.name
