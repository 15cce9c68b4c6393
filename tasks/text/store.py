"""Tokens on disk: one flat file per split, read in place.

A store is a folder, named by the hash of its corpus and the settings of its tokenizer::

    <cache>/<first 16 digits of the corpus hash>/<tokenizer key>/
        train.bin  val.bin  test.bin    token ids, nothing else
        meta.json                       written last: without it the store does not exist

Preparation reads the corpus once, a block at a time, so a corpus of any size fits in memory.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tasks.text.corpus import Document, Source, blocks, content_hash, split_documents
from tasks.text.files import cache_root, replacing
from tasks.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1  # raise when the meaning of the files changes; older stores are then made again

# Read in place: an array of uint16, or uint32 where the vocabulary needs it.
Stream = np.memmap[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SplitSize:
    """How much text a split holds; `tokens` includes one end of document per file."""

    files: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class StoreMeta:
    """What a store holds.

    Attributes:
        source: name of the source.
        corpus_hash: SHA-256 of the corpus's names and contents.
        tokenizer: the tokenizer's key.
        fingerprint: the tokenizer's fingerprint, which says what the ids mean.
        dtype: numpy name of the type of the ids.
        splits: sizes of `train`, `val` and `test`.
        train_counts: how often each id occurs in the training split, `[V]`.
        format: version of this layout.
    """

    source: str
    corpus_hash: str
    tokenizer: str
    fingerprint: str
    dtype: str
    splits: dict[str, SplitSize]
    train_counts: list[int]
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A prepared corpus.

    Attributes:
        meta: what it holds.
        token_bytes: how many bytes each id stands for, `[V]` int64.
        streams: the ids of each split, one document after the other, each with its end.
    """

    meta: StoreMeta
    token_bytes: Tensor
    streams: dict[str, Stream]


def prepare_store(
    source: Source, tokenizer: Tokenizer, cache_dir: str | Path | None = None
) -> TokenStore:
    """Opens the store of a corpus, making it first if it is missing or damaged.

    Args:
        source: where the text comes from.
        tokenizer: made ready for use as a side effect (it may have to learn its vocabulary).
        cache_dir: see `cache_root`.
    """
    documents = source.documents()
    corpus_hash = content_hash(documents)
    splits = split_documents(documents)
    folder = cache_root(cache_dir) / corpus_hash[:16] / tokenizer.key
    tokenizer.prepare(splits["train"], folder)
    meta = _read_meta(folder)
    problem = "it is missing" if meta is None else _damage(folder, meta, tokenizer)
    if meta is None or problem:
        logger.info("preparing %s because %s", folder, problem)
        meta = _write_store(folder, splits, tokenizer, source.name, corpus_hash)
    streams = {
        split: np.memmap(folder / f"{split}.bin", dtype=meta.dtype, mode="r") for split in splits
    }
    return TokenStore(meta, tokenizer.token_bytes, streams)


def _read_meta(folder: Path) -> StoreMeta | None:
    """The description of a finished store, or `None` if there is none that can be read."""
    try:
        fields = json.loads((folder / "meta.json").read_text())
        fields["splits"] = {split: SplitSize(**size) for split, size in fields["splits"].items()}
        return StoreMeta(**fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _damage(folder: Path, meta: StoreMeta, tokenizer: Tokenizer) -> str:
    """Why a store cannot be used, empty if it can."""
    if meta.format != FORMAT:
        return f"its format is {meta.format}, not {FORMAT}"
    if meta.fingerprint != tokenizer.fingerprint:
        return "its tokenizer has changed"
    for split, size in meta.splits.items():
        path = folder / f"{split}.bin"
        expected = size.tokens * np.dtype(meta.dtype).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            return f"{path.name} has {found} bytes instead of {expected}"
    return ""


def _write_store(
    folder: Path,
    splits: dict[str, list[Document]],
    tokenizer: Tokenizer,
    source_name: str,
    corpus_hash: str,
) -> StoreMeta:
    """Encodes all splits; the description comes last, so half a store is never taken for one."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    sizes: dict[str, SplitSize] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for split, documents in splits.items():
        with replacing(folder / f"{split}.bin") as file:
            sizes[split], counts[split] = _write_tokens(file, documents, tokenizer, dtype)
    meta = StoreMeta(
        source=source_name,
        corpus_hash=corpus_hash,
        tokenizer=tokenizer.key,
        fingerprint=tokenizer.fingerprint,
        dtype=dtype.name,
        splits=sizes,
        train_counts=counts["train"].tolist(),
    )
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps(asdict(meta)).encode())
    return meta


def _write_tokens(
    file: BinaryIO, documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> tuple[SplitSize, NDArray[np.int64]]:
    """Appends the ids of each document and its end; returns the sizes and the count of each id."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    end = np.array([tokenizer.end_of_document], dtype=dtype)
    size = 0
    for document in documents:
        for block in blocks(document):
            ids = tokenizer.encode(block)
            counts += np.bincount(ids, minlength=tokenizer.vocab_size)
            size += len(block.encode("utf-8"))
            file.write(ids.astype(dtype).tobytes())
        file.write(end.tobytes())
    counts[tokenizer.end_of_document] += len(documents)
    return SplitSize(len(documents), size, int(counts.sum())), counts
