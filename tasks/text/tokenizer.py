"""Text to token ids and back, without loss.

Every tokenizer says how many bytes of UTF-8 each token stands for, so that a model's loss can be
stated per byte whatever the tokenizer. V vocabulary, N tokens.
"""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.text.corpus import Document, blocks
from tasks.text.files import replacing

Ids = NDArray[np.int64]

# Enough text for a vocabulary of a few thousand pieces, and trained on in seconds.
SAMPLE_BYTES = 4_000_000

MODEL_FILE = "tokenizer.model"

# SentencePiece writes a space as this character; the character itself must go in as bytes.
SPACE_MARK = "\u2581"

# Within sentencepiece's vocabulary: unknown (never produced, as every byte has a piece), end of
# document, newline, tab, 256 bytes; and some room for characters.
SMALLEST_VOCABULARY = 512


class Tokenizer(ABC):
    """A reversible map between text and token ids.

    Attributes:
        vocab_size: V; ids are in `[0, V)`.
        key: names the tokenizer and its settings, for use in a path.
        end_of_document: the id that ends each document; it stands for no text.
    """

    vocab_size: int
    key: str
    end_of_document: int

    def prepare(self, documents: Sequence[Document], folder: Path) -> None:  # noqa: B027
        """Learns the vocabulary from the first training documents, or loads it from `folder`.

        Does nothing for a tokenizer that has nothing to learn.
        """

    def save(self, folder: Path) -> None:  # noqa: B027
        """Writes what was learnt, if anything, so that other text can be given the same ids."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the same text could be given other ids."""

    @property
    @abstractmethod
    def pieces(self) -> Sequence[bytes]:
        """The UTF-8 bytes each of the V ids stands for; none for special ids."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The ids of a text, `[N]`, without an end of document."""

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """The bytes that ids stand for; special ids stand for none."""
        pieces = self.pieces
        return b"".join(pieces[int(index)] for index in ids)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text that ids stand for: `decode(encode(text)) == text`.

        A model may also produce ids that are not valid UTF-8 together; what is not comes out as
        U+FFFD.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def token_bytes(self) -> Tensor:
        """How many bytes each id stands for, `[V]` int64; 0 for special ids."""
        return torch.tensor([len(piece) for piece in self.pieces])


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8, and one that ends a document."""

    vocab_size = 257
    key = "bytes"
    end_of_document = 256
    fingerprint = "bytes"
    pieces = (*(bytes([value]) for value in range(256)), b"")

    def encode(self, text: str) -> Ids:
        """The bytes of a text, `[N]`."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)


class SentencePieceTokenizer(Tokenizer):
    r"""Byte-pair encoding, learnt once from the training documents and cached.

    Lossless, unlike SentencePiece's defaults: text is not normalised, spaces are neither added
    nor merged, newline and tab are tokens of their own (so encoding line by line is the same as
    encoding whole), and characters outside the vocabulary are spelt in bytes. Reference:
    "SentencePiece: A simple and language independent subword tokenizer and detokenizer for
    Neural Text Processing", https://arxiv.org/abs/1808.06226.

    Args:
        vocab_size: V, the number of ids. A corpus too small to fill it leaves the last ids
            unused.
        model_file: a vocabulary learnt before, to be used as it is; a run keeps the one it was
            trained with as `tokenizer.model`. Default: learn one from the corpus.
    """

    end_of_document = 1

    def __init__(self, vocab_size: int = 4096, model_file: str | None = None) -> None:
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size ({vocab_size}) must be at least {SMALLEST_VOCABULARY}: 260 ids are "
                "bytes and special tokens; for the smallest vocabulary use ByteTokenizer"
            )
        self.vocab_size = vocab_size
        self.key = f"sentencepiece-bpe-{vocab_size}-{SAMPLE_BYTES}"
        self._given = None if model_file is None else _read_model(model_file)
        if self._given is not None:
            self.key = f"sentencepiece-{vocab_size}-{hashlib.sha256(self._given).hexdigest()[:16]}"
        self._model: bytes | None = None

    def prepare(self, documents: Sequence[Document], folder: Path) -> None:
        """Loads the model from `folder`, where it is first learnt and put if there is none."""
        path = folder / MODEL_FILE
        if not path.exists():
            model = self._given or _train(documents, self.vocab_size)
            with replacing(path) as file:
                file.write(model)
        model = path.read_bytes()
        if self._model not in (None, model):
            raise ValueError(
                f"this SentencePieceTokenizer already holds the vocabulary of another corpus than "
                f"that of {folder}: make one for each corpus"
            )
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self._pieces = _piece_bytes(self._processor, self.vocab_size)
        self._space_mark = [self._pieces.index(bytes([byte])) for byte in SPACE_MARK.encode()]

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could be given other ids."""
        return hashlib.sha256(self._prepared()).hexdigest()

    @property
    def pieces(self) -> Sequence[bytes]:
        """The UTF-8 bytes each of the V ids stands for; none for special and unused ids."""
        self._prepared()
        return self._pieces

    def encode(self, text: str) -> Ids:
        """The ids of a text, `[N]`, without an end of document."""
        self._prepared()
        first, *others = text.split(SPACE_MARK)
        ids: list[int] = self._processor.encode(first)
        for part in others:
            ids += self._space_mark
            ids += self._processor.encode(part)
        return np.array(ids, dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Writes the model to `folder`, for `model_file`."""
        with replacing(folder / MODEL_FILE) as file:
            file.write(self._prepared())

    def _prepared(self) -> bytes:
        if self._model is None:
            raise RuntimeError(
                "this SentencePieceTokenizer has not learnt its vocabulary: call "
                "prepare(documents, folder), as the Text task does, before using it"
            )
        return self._model


def _read_model(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"model_file: cannot read {file}: {error.strerror}") from error


def _train(documents: Sequence[Document], vocab_size: int) -> bytes:
    """Learns a vocabulary; the same documents always give the same one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sample_lines(documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,  # indentation is worth a token
        user_defined_symbols=["\n", "\t"],
        unk_id=0,
        eos_id=SentencePieceTokenizer.end_of_document,
        bos_id=-1,
        pad_id=-1,
        num_threads=1,  # so that no order of addition depends on chance
        minloglevel=2,
    )
    return model.getvalue()


def _sample_lines(documents: Sequence[Document]) -> Iterator[str]:
    """Lines of the first `SAMPLE_BYTES` or so of text."""
    left = SAMPLE_BYTES
    for document in documents:
        for block in blocks(document):
            yield from block.splitlines()
            left -= len(block.encode("utf-8"))
            if left <= 0:
                return


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, vocab_size: int) -> list[bytes]:
    """The bytes each id stands for, padded to `vocab_size` with ids that are never used."""
    pieces = []
    for index in range(processor.get_piece_size()):
        piece = processor.id_to_piece(index)
        if processor.is_byte(index):
            pieces.append(bytes([int(piece[3:5], 16)]))  # written <0x0A>
        elif processor.is_control(index) or processor.is_unknown(index):
            pieces.append(b"")
        else:
            pieces.append(piece.replace(SPACE_MARK, " ").encode("utf-8"))
    return pieces + [b""] * (vocab_size - len(pieces))
