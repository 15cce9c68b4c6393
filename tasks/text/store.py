"""Tokens on disk: one flat file per split, read in place.

A store is a folder, named by the hash of its corpus and the settings of its tokenizer::

    <cache>/<first 16 digits of the corpus hash>/<tokenizer key>/
        train.bin  val.bin  test.bin    token ids, nothing else
        meta.json                       written last: without it the store does not exist

Every file is checked by its content whenever a store is opened, and one that is not as it was
written is made again. Preparation reads the corpus once, a block at a time, so a corpus of any
size fits in memory.
"""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from mneme.storage.files import replacing
from mneme.tasks.text.corpus import (
    BLOCK_BYTES,
    Document,
    Source,
    at_home,
    blocks,
    content_hash,
    split_documents,
)
from mneme.tasks.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT = 2  # raise when the meaning of the files changes; older stores are then made again

# Read in place: an array of uint16, or uint32 where the vocabulary needs it.
Stream = np.memmap[Any, np.dtype[Any]]


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Where prepared data are kept: the argument, else `$MNEME_CACHE`, else `~/.cache/mneme`.

    Raises:
        ValueError: it begins with `~`, and the user has no home.
    """
    return at_home(cache_dir or os.environ.get("MNEME_CACHE") or "~/.cache/mneme")


@dataclass(frozen=True)
class SplitSize:
    """How much text a split holds.

    Attributes:
        files: how many documents.
        bytes: of their text.
        tokens: with one end of document per file.
        checksum: XXH3-128 of the split's file.
    """

    files: int
    bytes: int
    tokens: int
    checksum: str


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
        loss: the first place where the ids stand for another text than the corpus's; None if there
            is none.
        format: version of this layout.
    """

    source: str
    corpus_hash: str
    tokenizer: str
    fingerprint: str
    dtype: str
    splits: dict[str, SplitSize]
    train_counts: list[int]
    loss: str | None = None
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

    Raises:
        ValueError: a document that cannot be read, or text that the tokenizer loses although it is
            not declared to be lossy.
    """
    documents = source.documents()
    corpus_hash = content_hash(documents)
    splits = split_documents(documents)
    folder = cache_root(cache_dir) / corpus_hash[:16] / tokenizer.key
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.prepare(splits["train"], folder)
    meta = _read_meta(folder)
    problem = "it is missing or damaged"
    if meta is not None:
        problem = _damage(folder, meta, corpus_hash, tokenizer)
    if meta is None or problem:
        logger.info("preparing %s because %s", folder, problem)
        meta = _write_store(folder, splits, tokenizer, source.name, corpus_hash)
    if meta.loss and not tokenizer.lossy:
        raise ValueError(_refusal(meta.loss, tokenizer))
    streams = {
        split: np.memmap(folder / f"{split}.bin", dtype=meta.dtype, mode="r") for split in splits
    }
    return TokenStore(meta, tokenizer.token_bytes, streams)


def _read_meta(folder: Path) -> StoreMeta | None:
    """The description of a finished store, or `None` if there is none as it was written."""
    try:
        fields = json.loads((folder / "meta.json").read_bytes())
        if fields.pop("checksum") != _checksum_of(fields):
            return None
        fields["splits"] = {split: SplitSize(**size) for split, size in fields["splits"].items()}
        return StoreMeta(**fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _damage(folder: Path, meta: StoreMeta, corpus_hash: str, tokenizer: Tokenizer) -> str:
    """Why a store cannot be used, empty if it can."""
    if meta.format != FORMAT:
        return f"its format is {meta.format}, not {FORMAT}"
    if meta.corpus_hash != corpus_hash:
        return "it is of another corpus"
    if meta.fingerprint != tokenizer.fingerprint:
        return "its tokenizer has changed"
    for split, size in meta.splits.items():
        path = folder / f"{split}.bin"
        if not path.is_file() or _checksum(path) != size.checksum:
            return f"{path.name} is not as it was written"
    return ""


def _checksum(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(BLOCK_BYTES):
            found.update(part)
    return found.hexdigest()


def _checksum_of(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())


def _write_store(
    folder: Path,
    splits: dict[str, list[Document]],
    tokenizer: Tokenizer,
    source_name: str,
    corpus_hash: str,
) -> StoreMeta:
    """Encodes all splits; the description comes last, so half a store is never taken for one."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    encoded: dict[str, _Encoded] = {}
    for split, documents in splits.items():
        with replacing(folder / f"{split}.bin") as file:
            encoded[split] = _Encoded(tokenizer, dtype)
            for document in documents:
                encoded[split].add(document, file)
    meta = StoreMeta(
        source=source_name,
        corpus_hash=corpus_hash,
        tokenizer=tokenizer.key,
        fingerprint=tokenizer.fingerprint,
        dtype=dtype.name,
        splits={split: found.size for split, found in encoded.items()},
        train_counts=encoded["train"].counts.tolist(),
        loss=next((found.loss for found in encoded.values() if found.loss), None),
    )
    fields = asdict(meta)
    with replacing(folder / "meta.json") as file:
        file.write(json.dumps({**fields, "checksum": _checksum_of(fields)}).encode())
    return meta


class _Encoded:
    """One split on its way to disk, and what is learnt of it on the way.

    Attributes:
        counts: how often each id occurs, `[V]`.
        loss: the first place where text is lost, None so far.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        self.tokenizer, self.dtype = tokenizer, dtype
        self.token_bytes = tokenizer.token_bytes.numpy()
        self.counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.loss: str | None = None
        self._files = self._bytes = 0
        self._checksum = xxhash.xxh3_128()

    @property
    def size(self) -> SplitSize:
        """What was added so far: files, bytes, tokens and a checksum of the ids."""
        tokens = int(self.counts.sum())
        return SplitSize(self._files, self._bytes, tokens, self._checksum.hexdigest())

    def add(self, document: Document, file: BinaryIO) -> None:
        """Appends the ids of a document and its end.

        Raises:
            ValueError: the document is not UTF-8, or loses text to a tokenizer that may not.
        """
        lines = 0
        for block in blocks(document):
            text, ids = block.encode("utf-8"), self.tokenizer.encode(block)
            if self.loss is None:
                self.loss = self._compare(document, lines, text, ids)
            self._write(ids, file)
            self._bytes += len(text)
            lines += text.count(b"\n")
        self._write(np.array([self.tokenizer.end_of_document]), file)
        self._files += 1

    def _write(self, ids: NDArray[np.int64], file: BinaryIO) -> None:
        self.counts += np.bincount(ids, minlength=self.tokenizer.vocab_size)
        data = ids.astype(self.dtype).tobytes()
        self._checksum.update(data)
        file.write(data)

    def _compare(
        self, document: Document, lines: int, text: bytes, ids: NDArray[np.int64]
    ) -> str | None:
        """Where the ids of a block stand for another text, or for another number of bytes."""
        found = self.tokenizer.decode_bytes(ids)
        if found == text and self.token_bytes[ids].sum() == len(text):
            return None
        pairs = enumerate(zip(text, found, strict=False))
        place = next((i for i, (one, other) in pairs if one != other), min(len(text), len(found)))
        line = lines + text.count(b"\n", 0, place) + 1
        loss = (
            f"line {line} of {document.name} holds {_excerpt(text, place)}, and comes back as "
            f"{_excerpt(found, place)}"
        )
        if not self.tokenizer.lossy:
            raise ValueError(_refusal(loss, self.tokenizer))
        return loss


def _excerpt(text: bytes, place: int) -> str:
    """The 24 bytes around a place of a text, quoted."""
    start = max(0, place - 12)
    return repr(text[start : place + 12].decode("utf-8", errors="replace"))


def _refusal(loss: str, tokenizer: Tokenizer) -> str:
    return f"the tokenizer changes the text: {loss}; {tokenizer.remedy}"
