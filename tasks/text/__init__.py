"""Text tasks: a source, a tokenizer, and a store of tokens that are read in place."""

from mneme.tasks.text.corpus import LocalFiles, Source, StandardLibrary
from mneme.tasks.text.text import Text
from mneme.tasks.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "LocalFiles",
    "SentencePieceTokenizer",
    "Source",
    "StandardLibrary",
    "Text",
    "Tokenizer",
]
