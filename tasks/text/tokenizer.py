"""Text to token ids and back, without loss unless that is asked for.

Every tokenizer says how many bytes of UTF-8 each token stands for, so that a model's loss can be
stated per byte whatever the tokenizer. V vocabulary, N tokens.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mneme.storage.files import replacing
from mneme.tasks.text.corpus import Document
from mneme.tasks.text.learning import END_OF_DOCUMENT, SAMPLE_BYTES, learn_model
from mneme.tasks.text.sentencepiece_model import (
    SPACE_MARK,
    SentencePieceModel,
    parse_model,
    read_model,
)

Ids = NDArray[np.int64]

MODEL_FILE = "tokenizer.model"
CHECKSUM_FILE = "tokenizer.sha256"

# Within sentencepiece's vocabulary: unknown (never produced, as every byte has a piece), end of
# document, newline, tab, 256 bytes; and some room for characters.
SMALLEST_VOCABULARY = 512


class Tokenizer(ABC):
    """A reversible map between text and token ids.

    Attributes:
        vocab_size: V; ids are in `[0, V)`.
        key: names the tokenizer and its settings, for use in a path.
        end_of_document: the id that ends each document; it stands for no text.
        lossy: whether ids may stand for another text than they were made from. The bytes of tokens
            are not those of the text then, and no loss can be stated per byte.
        remedy: what to do where text is lost although it may not be.
    """

    vocab_size: int
    key: str
    end_of_document: int
    lossy: bool = False
    remedy: str = "use another tokenizer"

    def prepare(self, documents: Sequence[Document], folder: Path) -> None:  # noqa: B027
        """Learns the vocabulary from the first training documents, or loads it from `folder`.

        Does nothing for a tokenizer that has nothing to learn.
        """

    def save(self, folder: Path) -> None:  # noqa: B027
        """Writes what was learnt, if anything, so that other text can be given the same ids."""

    def load(self, folder: Path) -> "Tokenizer":
        """A tokenizer of these settings, with what `save` wrote to a folder.

        Raises:
            ValueError: it is not there, or no usable model.
        """
        return self

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
        """The text that ids stand for: `decode(encode(text)) == text`, unless `lossy`.

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

    def decode_bytes(self, ids: Sequence[int] | Ids) -> bytes:
        """The bytes that ids stand for; the end of a document stands for none."""
        given = np.asarray(ids)
        return given[given != self.end_of_document].astype(np.uint8).tobytes()


class SentencePieceTokenizer(Tokenizer):
    r"""Byte-pair encoding, learnt once from the training documents and cached.

    What is learnt here is lossless, unlike SentencePiece's defaults: text is not normalized, spaces
    are neither added nor merged, newline and tab are tokens of their own (so encoding line by line
    is the same as encoding whole), and characters outside the vocabulary are spelt in bytes.
    Reference: "SentencePiece: A simple and language independent subword tokenizer and detokenizer
    for Neural Text Processing", https://arxiv.org/abs/1808.06226.

    Args:
        vocab_size: V, the number of ids. A corpus too small to fill it leaves the last ids
            unused.
        model_file: a vocabulary learnt before, to be used as it is; a run keeps the one it was
            trained with as `tokenizer.model`. It must have pieces for bytes and for the end of a
            document. Default: learn one from the corpus.
        lossy: use a `model_file` that changes text, by normalizing it for example; bits per byte
            are then not reported. Without it such a model is refused where it changes the corpus.

    Raises:
        ValueError: `model_file` is no usable model, or none of `vocab_size` ids.
    """

    def __init__(
        self, vocab_size: int = 4096, model_file: str | None = None, lossy: bool = False
    ) -> None:
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size ({vocab_size}) must be at least {SMALLEST_VOCABULARY}: 260 ids are "
                "bytes and special tokens; for the smallest vocabulary use ByteTokenizer"
            )
        if lossy and model_file is None:
            raise ValueError("lossy: a vocabulary that is learnt here loses nothing; leave it out")
        self.vocab_size = vocab_size
        self.lossy = lossy
        self.end_of_document = END_OF_DOCUMENT
        self.key = f"sentencepiece-bpe-{vocab_size}-{SAMPLE_BYTES}"
        self._given: SentencePieceModel | None = None
        self._model: SentencePieceModel | None = None
        if model_file is not None:
            self._given = read_model(model_file, vocab_size)
            self.end_of_document = self._given.end_of_document
            self.key = f"sentencepiece-{vocab_size}-{self._given.fingerprint[:16]}"
            self.remedy = (
                f"train {model_file} again with SentencePiece's {' '.join(self._given.options)}, "
                "or set tokenizer.lossy=true to do without bits per byte"
            )

    def prepare(self, documents: Sequence[Document], folder: Path) -> None:
        """Takes the vocabulary from `model_file`, or from `folder`, where it is learnt first.

        A vocabulary in `folder` that is not as it was written is learnt again.
        """
        model = self._given or self._learnt(documents, folder)
        if self._model is not None and self._model.data != model.data:
            raise ValueError(
                f"this SentencePieceTokenizer already holds the vocabulary of another corpus than "
                f"that of {folder}: make one for each corpus"
            )
        self._model = model
        self._space_mark = [model.pieces.index(bytes([byte])) for byte in SPACE_MARK.encode()]

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could be given other ids."""
        return self._prepared().fingerprint

    @property
    def pieces(self) -> Sequence[bytes]:
        """The UTF-8 bytes each of the V ids stands for; none for special and unused ids."""
        return self._prepared().pieces

    def encode(self, text: str) -> Ids:
        """The ids of a text, `[N]`, without an end of document."""
        processor = self._prepared().processor
        first, *others = text.split(SPACE_MARK)
        ids: list[int] = processor.encode(first)
        for part in others:
            ids += self._space_mark
            ids += processor.encode(part)
        return np.array(ids, dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Writes the model to `folder`, for `model_file`."""
        with replacing(folder / MODEL_FILE) as file:
            file.write(self._prepared().data)

    def load(self, folder: Path) -> "SentencePieceTokenizer":
        """The vocabulary in `folder`, or that of `model_file`, ready for use."""
        file = None if self._given else str(folder / MODEL_FILE)
        given = SentencePieceTokenizer(self.vocab_size, file, self.lossy) if file else self
        given.prepare([], folder)
        return given

    def _learnt(self, documents: Sequence[Document], folder: Path) -> SentencePieceModel:
        """The vocabulary in `folder`, if it is whole; else a new one, which is put there."""
        path, checksum = folder / MODEL_FILE, folder / CHECKSUM_FILE
        try:
            data = path.read_bytes()
            whole = checksum.read_text() == hashlib.sha256(data).hexdigest()
        except (OSError, UnicodeDecodeError):
            whole = False
        if not whole:
            data = learn_model(documents, self.vocab_size)
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(data)
            with replacing(checksum) as file:  # after what it is of: half a pair is learnt again
                file.write(hashlib.sha256(data).hexdigest().encode())
        return parse_model(data, self.vocab_size)

    def _prepared(self) -> SentencePieceModel:
        if self._model is None:
            raise RuntimeError(
                "this SentencePieceTokenizer has not learnt its vocabulary: call "
                "prepare(documents, folder), as the Text task does, before using it"
            )
        return self._model
