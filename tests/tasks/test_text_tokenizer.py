import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mneme.tasks import ByteTokenizer, LocalFiles, SentencePieceTokenizer

TEXT = """def keep(memory: dict[str, int]) -> None:
    for key, value in memory.items():
        if value > 10:
            memory[key] = value - 1\tthe rest is left as it was
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for index in range(6):
        (folder / f"{index}.py").write_text(TEXT * (index + 1) + "größer als zuvor\n")
    return LocalFiles([f"{folder}/*.py"]).documents()


@pytest.fixture(scope="module")
def pieces(documents, tmp_path_factory):
    tokenizer = SentencePieceTokenizer(vocab_size=512)
    tokenizer.prepare(documents, tmp_path_factory.mktemp("model"))
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request, pieces):
    return pieces if request.param == "sentencepiece" else ByteTokenizer()


# Any text that can be written as UTF-8, and code-like text in which spaces and line ends abound.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    st.sampled_from(" \n\t\r\0\u2581\u2585\u2047\ufeff\ufffde_=({1é憶😀")
)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
@example("")
@example("  two  \n\n\tand  ")
@example("</s><unk><0x41> \u2581\u2581 ⁇ ▅")
@example(TEXT)
def test_encoding_loses_nothing_and_counts_every_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[torch.from_numpy(ids)].sum() == len(text.encode())
    assert tokenizer.end_of_document not in ids
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


@settings(max_examples=50, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_encoding_line_by_line_is_encoding_whole(tokenizer, first, second):
    lines = [tokenizer.encode(first + "\n"), tokenizer.encode(second)]
    assert np.array_equal(np.concatenate(lines), tokenizer.encode(f"{first}\n{second}"))


def test_the_end_of_a_document_stands_for_no_bytes(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.end_of_document] == 0
    assert tokenizer.decode([tokenizer.end_of_document]) == ""


def test_bytes_that_are_no_text_are_shown_as_such():
    assert ByteTokenizer().decode([0xE9, 0x61]) == "\ufffda"


def test_pieces_are_longer_than_bytes(pieces):
    assert len(pieces.encode(TEXT)) < len(TEXT) / 2


def test_a_vocabulary_is_learnt_once_and_loaded_after(documents, tmp_path, monkeypatch):
    learnt = SentencePieceTokenizer(vocab_size=512)
    learnt.prepare(documents, tmp_path)
    monkeypatch.setattr("mneme.tasks.text.tokenizer.learn_model", None)  # learning again would fail
    loaded = SentencePieceTokenizer(vocab_size=512)
    loaded.prepare(documents, tmp_path)
    assert loaded.fingerprint == learnt.fingerprint
    assert np.array_equal(loaded.encode(TEXT), learnt.encode(TEXT))


def test_learning_again_gives_the_same_vocabulary(documents, pieces, tmp_path):
    again = SentencePieceTokenizer(vocab_size=512)
    again.prepare(documents, tmp_path)
    assert again.fingerprint == pieces.fingerprint


def test_a_corpus_too_small_for_the_vocabulary_leaves_ids_unused(documents, tmp_path):
    tokenizer = SentencePieceTokenizer(vocab_size=2048)
    tokenizer.prepare(documents, tmp_path)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 2048
    assert tokenizer.token_bytes[-1] == 0
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_one_tokenizer_serves_one_corpus(documents, tmp_path):
    tokenizer = SentencePieceTokenizer(vocab_size=512)
    tokenizer.prepare(documents, tmp_path / "one")
    with pytest.raises(ValueError, match="already holds the vocabulary of another corpus"):
        tokenizer.prepare(documents[:1], tmp_path / "two")


def test_a_tokenizer_that_has_learnt_nothing_says_so():
    with pytest.raises(RuntimeError, match=r"call prepare\(documents, folder\)"):
        SentencePieceTokenizer().encode("a")


def test_a_vocabulary_without_room_is_an_error():
    with pytest.raises(ValueError, match=r"vocab_size \(300\) must be at least 512"):
        SentencePieceTokenizer(vocab_size=300)
