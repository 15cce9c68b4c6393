"""Models of the `sentence-transformers` package as embedders.

N texts, E components of a vector.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Self

import numpy as np

from mneme.routers.embedders import Arrays, unit
from mneme.routers.errors import RouterError
from mneme.routers.kmeans import Vectors

_POOLING = "mean of windows, weighted by word pieces"
_PROBE = "The harbour of Trondheim froze twice in 1709."


class SentenceTransformer:
    """A model of the `sentence-transformers` package, by name; HMB has all-MiniLM-L6-v2.

    Such a model reads the beginning of a text only, 256 word pieces of all-MiniLM-L6-v2. So a text
    is cut into windows at the ends of words, and its vector is the mean of theirs, weighted by
    their pieces, with norm 1. HMB does not say what it does. The empty text is one empty window.

    The name does not say which weights come with it. A router therefore keeps the vector of one
    fixed sentence, and refuses a model that gives another. Vectors are equal up to rounding between
    machines and batches, not to the bit: a text between two leaves may change sides.

    Args:
        model: its name or folder.
        window: word pieces of a window, without the special ones, of which BERT adds two.
    """

    name: ClassVar[str] = "sentence_transformer"

    def __init__(
        self, model: str = "sentence-transformers/all-MiniLM-L6-v2", *, window: int = 254
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.model, self.window = model, window
        self._loaded: Any = None
        self._probe: Vectors | None = None

    def fit(self, texts: Sequence[str]) -> None:
        """Learns nothing of the texts; keeps the vector of the fixed sentence."""
        self._loaded = self._loaded or self._load()
        self._probe = _encode(self._loaded, [_PROBE])[0]

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors `[N, E]` of norm 1.

        Raises:
            RouterError: the package or the model is not there, its windows are shorter than asked,
                or it is not the model that the router was fitted with.
        """
        probe = self._learnt()
        if self._loaded is None:
            self._loaded = self._checked(self._load(), probe)
        pieces = [self._windows(text) for text in texts]
        if not pieces:
            return np.empty((0, len(probe)), np.float32)
        windows, weights = zip(*(window for text in pieces for window in text), strict=True)
        vectors = _encode(self._loaded, windows) * np.array(weights, np.float32)[:, None]
        first = np.cumsum([0, *(len(text) for text in pieces[:-1])])
        return unit(np.add.reduceat(vectors, first), probe)

    def options(self) -> dict[str, Any]:
        """The options of its constructor, as JSON can hold them."""
        return {"model": self.model, "window": self.window, "pooling": _POOLING}

    def arrays(self) -> Arrays:
        """The vector of the fixed sentence, `[E]`."""
        return {"probe": self._learnt()}

    @classmethod
    def restore(cls, options: Mapping[str, Any], arrays: Arrays) -> Self:
        """The embedder that had these options and arrays; the model is loaded when it is needed."""
        if options["pooling"] != _POOLING:
            raise RouterError(f"pooling must be {_POOLING!r}, got {options['pooling']!r}")
        embedder = cls(options["model"], window=options["window"])
        embedder._probe = arrays["probe"]
        return embedder

    def _learnt(self) -> Vectors:
        if self._probe is None:
            raise RouterError("this SentenceTransformer is not fitted yet; call fit first")
        return self._probe

    def _load(self) -> Any:
        try:
            package = import_module("sentence_transformers")
        except ImportError as error:
            raise RouterError(
                f"{self.model} needs a package that is not installed: "
                "pip install sentence-transformers; or use HashedTfidf"
            ) from error
        try:
            model = package.SentenceTransformer(self.model)
        except (OSError, ValueError) as error:
            raise RouterError(f"cannot load the model {self.model}: {error}") from error
        if not model.tokenizer.is_fast:
            raise RouterError(f"{self.model} has a tokenizer that does not tell where words end")
        most = (model.max_seq_length or math.inf) - model.tokenizer.num_special_tokens_to_add()
        if self.window > most:
            raise RouterError(f"{self.model} reads {most} word pieces; window is {self.window}")
        return model

    def _checked(self, model: Any, probe: Vectors) -> Any:
        given = _encode(model, [_PROBE])[0]
        if given.shape != probe.shape or not np.allclose(given, probe, atol=1e-3):
            raise RouterError(
                f"{self.model} is not the model that this router was fitted with: it gives "
                "other vectors; use that one, or fit a new router and train its bank"
            )
        return model

    def _windows(self, text: str) -> list[tuple[str, int]]:
        """Windows of a text, each with its number of word pieces."""
        read = self._loaded.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = read["offset_mapping"]
        found = [
            (text[ends[start][0] : ends[stop - 1][1]], stop - start)
            for start, stop in cut(read.word_ids(), self.window)
        ]
        return found or [("", 1)]


def cut(words: Sequence[int], window: int) -> list[tuple[int, int]]:
    """Where windows of word pieces start and stop: as long as they may be without cutting a word.

    A word that is longer than a window is cut all the same.

    Args:
        words: for each piece, the number of its word.
        window: pieces of a window at most.
    """
    windows, start = [], 0
    while start < len(words):
        stop = min(start + window, len(words))
        while start < stop < len(words) and words[stop] == words[stop - 1]:
            stop -= 1
        if stop == start:
            stop = min(start + window, len(words))
        windows.append((start, stop))
        start = stop
    return windows


def _encode(model: Any, texts: Sequence[str]) -> Vectors:
    vectors = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, np.float32)
