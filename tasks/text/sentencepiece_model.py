"""A SentencePiece model, read and checked: what its ids stand for, and what it does to text.

V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as schema

# SentencePiece writes a space as this character; the character itself must go in as bytes.
SPACE_MARK = "\u2581"

# What the trainer does to text unless told otherwise, and how to tell it.
_KEEPS_CHARACTERS = "--normalization_rule_name=identity"
_KEEPS_BEGINNINGS = "--add_dummy_prefix=false"
_KEEPS_SPACES = "--remove_extra_whitespaces=false"


@dataclass(frozen=True, eq=False)
class SentencePieceModel:
    """A model whose ids are known to be in `[0, V)` and can spell any byte.

    Attributes:
        data: the file's content.
        processor: what encodes with it.
        pieces: the UTF-8 bytes each of the V ids stands for; none for special and unused ids.
        end_of_document: its id for the end of a text.
        options: of SentencePiece's trainer, those that this model needed in order to keep text as
            it is and was trained without; none of them can be changed afterwards.
    """

    data: bytes
    processor: sentencepiece.SentencePieceProcessor
    pieces: Sequence[bytes]
    end_of_document: int
    options: Sequence[str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.data).hexdigest()


def read_model(file: str, vocab_size: int) -> SentencePieceModel:
    """Reads and checks a model's file.

    Raises:
        ValueError: it cannot be read, is no model, or none for `vocab_size` ids.
    """
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"model_file: {file} is not a file")  # a pipe would be waited for
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"model_file: cannot read {file}: {error.strerror}") from error
    try:
        return parse_model(data, vocab_size)
    except ValueError as error:
        raise ValueError(f"model_file: {file} {error}") from error


def parse_model(data: bytes, vocab_size: int) -> SentencePieceModel:
    """Checks the content of a model's file.

    Args:
        data: the content.
        vocab_size: V. A model that was trained with `--hard_vocab_limit=false` may have fewer
            pieces, and leaves the last ids unused.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence that begins with its name.
    """
    if not data:  # the library takes it for a model without pieces
        raise ValueError("is empty; give the .model file that SentencePiece's trainer wrote")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        pieces = _piece_bytes(processor)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "is not a SentencePiece model, or not a whole one; give the .model file that its "
            "trainer wrote"
        ) from error
    described = schema.ModelProto.FromString(data)  # type: ignore[attr-defined]
    _check_size(len(pieces), vocab_size, may_be_fewer=not described.trainer_spec.hard_vocab_limit)
    _check_pieces(processor)
    return SentencePieceModel(
        data=data,
        processor=processor,
        pieces=[*pieces, *[b""] * (vocab_size - len(pieces))],
        end_of_document=processor.eos_id(),
        options=_needed(described.normalizer_spec),
    )


def _check_size(found: int, vocab_size: int, *, may_be_fewer: bool) -> None:
    if found > vocab_size or (found < vocab_size and not may_be_fewer):
        raise ValueError(
            f"has {found} pieces, and vocab_size is {vocab_size}: set vocab_size={found}"
        )


def _check_pieces(processor: sentencepiece.SentencePieceProcessor) -> None:
    spelt = sum(processor.is_byte(index) for index in range(processor.get_piece_size()))
    if spelt != 256:
        raise ValueError(
            "has no pieces for bytes, so that it cannot spell what it does not know; train it with "
            "SentencePiece's --byte_fallback=true"
        )
    if processor.eos_id() < 0:
        raise ValueError(
            "has no piece for the end of a document; train it with SentencePiece's --eos_id=1"
        )


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    """The bytes each piece stands for."""
    pieces = []
    for index in range(processor.get_piece_size()):
        piece = processor.id_to_piece(index)
        if processor.is_byte(index):
            pieces.append(bytes([int(piece[3:5], 16)]))  # written <0x0A>
        elif processor.is_control(index) or processor.is_unknown(index):
            pieces.append(b"")
        else:
            pieces.append(piece.replace(SPACE_MARK, " ").encode("utf-8"))
    return pieces


def _needed(spec: Any) -> list[str]:
    """The trainer's options without which a model does not keep text as it is."""
    found = []
    if spec.precompiled_charsmap or spec.normalization_rule_tsv:
        found.append(_KEEPS_CHARACTERS)
    if spec.add_dummy_prefix:
        found.append(_KEEPS_BEGINNINGS)
    if spec.remove_extra_whitespaces:
        found.append(_KEEPS_SPACES)
    return found or [_KEEPS_CHARACTERS, _KEEPS_BEGINNINGS, _KEEPS_SPACES]
