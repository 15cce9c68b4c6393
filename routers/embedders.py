"""Embedders: from texts to vectors of norm 1. They are fitted once and frozen.

N texts, F hashed features, E components of a vector.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mneme.routers.errors import RouterError
from mneme.routers.kmeans import Vectors

Arrays = dict[str, NDArray[Any]]

_SHORT = 1e-5  # a vector of this norm, where 1 is the most, is rounding and has no direction


class Embedder(Protocol):
    """What a router needs of an embedder. A vector depends on its own text alone.

    Attributes:
        name: of the kind of embedder.
    """

    name: ClassVar[str]

    def fit(self, texts: Sequence[str]) -> None:
        """Learns from texts; `arrays` then holds what was learnt."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors `[N, E]` of norm 1."""

    def options(self) -> dict[str, Any]:
        """The options of its constructor, as JSON can hold them."""

    def arrays(self) -> Arrays:
        """What `fit` has learnt, by name; of an embedder that learns nothing empty."""

    @classmethod
    def restore(cls, options: Mapping[str, Any], arrays: Arrays) -> Self:
        """The embedder that had these options and arrays."""


class _Fitted(NamedTuple):
    idf: Vectors  # [F], 0 for features of no text
    axes: Vectors  # [F, E]
    usual: Vectors  # [E], for texts that have no direction of their own


class HashedTfidf:
    """TF-IDF of hashed words, in the directions in which the fitted texts differ most (LSA).

    A word becomes one of F features by its hash; a text is its counts times
    `idf = ln((1 + N) / (1 + N with the feature)) + 1`, with norm 1. A randomized truncated SVD
    (arXiv 0909.4061) of all fitted texts gives the axes, and `embed` projects on them. Their
    number E is `components`, or less if the texts have not as many directions. No language model
    and no download: this is for small corpora and for tests.

    Words that no fitted text had count for nothing. A text without any other, the empty one for
    example, gets the direction of the mean of the fitted texts: a valid vector, the same each time.

    Args:
        features: F. Two words may share one, the less often the more there are.
        components: E at most.
        analyzer: features are of words, or of characters within words ("char_wb"), for languages
            without spaces.
        ngrams: how many words or characters a feature has, at least and at most.
        seed: of the SVD.
    """

    name: ClassVar[str] = "hashed_tfidf"

    def __init__(
        self,
        features: int = 2**14,
        *,
        components: int = 64,
        analyzer: Literal["word", "char_wb"] = "word",
        ngrams: tuple[int, int] = (1, 1),
        seed: int = 0,
    ) -> None:
        for name, value in (("features", features), ("components", components)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if analyzer not in ("word", "char_wb"):
            raise ValueError(f'analyzer must be "word" or "char_wb", got {analyzer!r}')
        if not 1 <= ngrams[0] <= ngrams[1]:
            raise ValueError(f"ngrams must be 1 <= first <= second, got {ngrams}")
        self.features, self.components, self.seed = features, components, seed
        self.analyzer, self.ngrams = analyzer, ngrams
        self._fitted: _Fitted | None = None

    def fit(self, texts: Sequence[str]) -> None:
        """Learns idf and axes.

        Raises:
            RouterError: no text has a word.
        """
        from sklearn.utils.extmath import randomized_svd  # type: ignore[import-untyped]

        counts = self._count(texts)
        having = np.bincount(counts.indices, minlength=self.features)
        if not having.any():
            raise RouterError(f"none of {len(texts)} texts has a word to learn from")
        idf = np.where(having > 0, np.log((1 + len(texts)) / (1 + having)) + 1, 0)
        weighted = _weigh(counts, idf.astype(np.float32)).astype(np.float64)
        most = min(self.components, *weighted.shape)
        _, sizes, axes = randomized_svd(weighted, most, n_iter=5, random_state=self.seed)
        axes = axes[sizes > _SHORT * sizes[0]]  # the others are arbitrary
        usual = np.asarray(weighted.mean(0)).reshape(-1) @ axes.T
        arrays = (idf, np.ascontiguousarray(axes.T), usual / np.linalg.norm(usual))
        self._fitted = _Fitted(*(array.astype(np.float32) for array in arrays))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors `[N, E]` of norm 1."""
        fitted = self._learnt()
        vectors = _weigh(self._count(texts), fitted.idf) @ fitted.axes
        return unit(vectors, fitted.usual)

    def options(self) -> dict[str, Any]:
        """The options of its constructor, as JSON can hold them."""
        return {
            "features": self.features,
            "components": self.components,
            "analyzer": self.analyzer,
            "ngrams": list(self.ngrams),
            "seed": self.seed,
        }

    def arrays(self) -> Arrays:
        """The idf `[F]`, the axes `[F, E]` and the usual direction `[E]`."""
        return self._learnt()._asdict()

    @classmethod
    def restore(cls, options: Mapping[str, Any], arrays: Arrays) -> Self:
        """The embedder that had these options and arrays."""
        embedder = cls(**{**options, "ngrams": tuple(options["ngrams"])})
        embedder._fitted = _Fitted(**arrays)
        return embedder

    def _learnt(self) -> _Fitted:
        if self._fitted is None:
            raise RouterError("this HashedTfidf has learnt nothing yet; call fit first")
        return self._fitted

    def _count(self, texts: Sequence[str]) -> Any:
        """Sparse counts `[N, F]`."""
        from sklearn.feature_extraction.text import (  # type: ignore[import-untyped]
            HashingVectorizer,  # imported late: it takes a second, and training needs none of it
        )

        vectorizer = HashingVectorizer(
            n_features=self.features,
            analyzer=self.analyzer,
            ngram_range=self.ngrams,
            token_pattern=r"(?u)\b\w+\b",  # also words of one character
            alternate_sign=False,
            norm=None,
            dtype=np.float32,
        )
        return vectorizer.transform(texts)


def _weigh(counts: Any, idf: Vectors) -> Any:
    """Sparse counts times idf, rows of norm 1 or 0."""
    from sklearn.preprocessing import normalize  # type: ignore[import-untyped]

    counts.data *= idf[counts.indices]
    return normalize(counts, copy=False)


def unit(vectors: Vectors, otherwise: Vectors) -> Vectors:
    """Rows divided by their norm, or another row where they have none."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(norms < _SHORT, otherwise, vectors / np.maximum(norms, _SHORT))
