"""Text tasks: a source, a tokenizer, and a store of tokens that are read in place."""

from tasks.text.corpus import LocalFiles, Source, StandardLibrary
from tasks.text.text import Text
from tasks.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "LocalFiles",
    "SentencePieceTokenizer",
    "Source",
    "StandardLibrary",
    "Text",
    "Tokenizer",
]
