"""Learning a SentencePiece vocabulary from documents.

"SentencePiece: A simple and language independent subword tokenizer and detokenizer for Neural Text
Processing", https://arxiv.org/abs/1808.06226.
"""

import io
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import sentencepiece

from mneme.tasks.text.corpus import Document, blocks

# Enough text for a vocabulary of a few thousand pieces, and trained on in seconds.
SAMPLE_BYTES = 4_000_000

# The trainer passes over longer lines without a word.
LINE_BYTES = 4192

# Ids that no text decides: unknown (never produced, as every byte has a piece), end of document,
# newline, tab and 256 bytes.
FIXED_PIECES = 260
END_OF_DOCUMENT = 1

# The share of the text's characters that become pieces, where there is room: SentencePiece's own
# default. The others are spelt in bytes.
COVERAGE = 0.9995

_OPTIONS: dict[str, Any] = {
    "hard_vocab_limit": False,  # a corpus too small leaves the last ids unused
    "character_coverage": COVERAGE,
    "max_sentence_length": LINE_BYTES,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,  # indentation is worth a token
    "user_defined_symbols": ["\n", "\t"],
    "unk_id": 0,
    "eos_id": END_OF_DOCUMENT,
    "bos_id": -1,
    "pad_id": -1,
    "num_threads": 1,  # so that no order of addition depends on chance
    "minloglevel": 2,
}


def learn_model(documents: Sequence[Document], vocab_size: int) -> bytes:
    """Learns a vocabulary that loses nothing; the same documents always give the same one.

    Lines longer than the trainer takes are cut. No more than half of the ids that are free become
    single characters, the most frequent ones: where text has many, such as Chinese, the others
    are spelt in bytes.

    Raises:
        ValueError: there is no text to learn from.
    """
    lines = list(_sample_lines(documents))
    if not any(lines):
        raise ValueError(
            f"the {len(documents)} files to train on have no text to learn a vocabulary from; add "
            "files that have, or use tasks.ByteTokenizer, which learns nothing"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_apart_from_rare(lines, (vocab_size - FIXED_PIECES) // 2)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            **_OPTIONS,
        )
    except RuntimeError as error:
        raise ValueError(f"SentencePiece learns no vocabulary from these files: {error}") from error
    return model.getvalue()


def _apart_from_rare(lines: Sequence[str], most: int) -> Sequence[str]:
    """Lines cut at the rare characters, if more than `most` would become pieces.

    The trainer itself can be told to leave out no more than 2 % of a text.
    """
    counts = Counter[str]()
    for line in lines:
        counts.update(line)
    ranked = counts.most_common()
    covered = list(accumulate(count for _, count in ranked))
    if bisect(covered, COVERAGE * covered[-1]) <= most:
        return lines
    cut = dict.fromkeys((ord(character) for character, _ in ranked[most:]), "\n")
    return [part for line in lines for part in line.translate(cut).split("\n")]


def _sample_lines(documents: Sequence[Document]) -> Iterator[str]:
    """Lines of the first `SAMPLE_BYTES` or so of text, none too long for the trainer."""
    left = SAMPLE_BYTES
    for document in documents:
        for block in blocks(document):
            for line in block[:SAMPLE_BYTES].splitlines():  # a block may be one long line
                yield from _cut(line)
            left -= len(block.encode("utf-8"))
            if left <= 0:
                return


def _cut(line: str) -> Iterator[str]:
    """A line in parts that the trainer takes, cut between characters."""
    data, start = line.encode("utf-8"), 0
    while len(data) - start > LINE_BYTES:
        end = start + LINE_BYTES
        while data[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        yield data[start:end].decode("utf-8")
        start = end
    yield data[start:].decode("utf-8")
