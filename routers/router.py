"""A router: an embedder, and the tree of its vectors."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mneme.routers import saved
from mneme.routers.embedders import Arrays, Embedder, HashedTfidf
from mneme.routers.errors import RouterError
from mneme.routers.kmeans import Clustering, Ids
from mneme.routers.sentences import SentenceTransformer
from mneme.routers.tree import Tree, check_shape

EMBEDDERS: dict[str, type[Embedder]] = {
    embedder.name: embedder for embedder in (HashedTfidf, SentenceTransformer)
}


class Router:
    """Says which leaf of a tree a text belongs to. `fit` and `load` make one; it never changes.

    Documents, prompts and questions take the same way, so that a question finds the leaf of what
    it is about if their words are alike.

    Args:
        embedder: fitted.
        tree: of its vectors.
        options: what the tree was made with, as JSON.
    """

    def __init__(self, embedder: Embedder, tree: Tree, options: Mapping[str, Any]) -> None:
        self.embedder, self.tree, self.options = embedder, tree, dict(options)

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        *,
        embedder: Embedder,
        branching: int = 4,
        depth: int = 3,
        seed: int = 0,
        clustering: Clustering | None = None,
    ) -> "Router":
        """Fits a copy of an embedder to texts, and a tree to their vectors.

        Equal arguments give equal routers, with an equal hash on one machine: products run in one
        thread, as their rounding depends on how many there are.

        Args:
            texts: of training, one or more; a question or a test text has no place here.
            embedder: not fitted yet, and not changed.
            branching: children of each node, k; default 4.
            depth: levels, p; default 3. HMB has k = 16 and p = 4.
            seed: of the tree; default 0.
            clustering: of each node; None: the defaults of `Clustering`.

        Raises:
            RouterError: there are no texts, or none with a word.
            ValueError: an option is out of its range.
        """
        _check_texts(texts)
        if not len(texts):
            raise RouterError("a router needs at least one text, got none")
        check_shape(branching, depth)  # also this before the embedder takes its time
        clustering = clustering or Clustering()
        embedder = copy.copy(embedder)
        with threadpool_limits(1):
            embedder.fit(texts)
            tree = Tree.fit(
                embedder.embed(texts),
                branching=branching,
                depth=depth,
                seed=seed,
                clustering=clustering,
            )
        options = {"branching": branching, "depth": depth, "seed": seed, "texts": len(texts)}
        return cls(embedder, tree, options | asdict(clustering))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Router":
        """The router that was saved in a folder.

        Raises:
            RouterError: there is none, a file of it was changed, or its embedder is not known.
        """
        description, arrays = saved.read(Path(folder))
        name = description["embedder"]
        if name not in EMBEDDERS:
            raise RouterError(
                f"{Path(folder) / saved.NAME} names the embedder {name!r}; "
                f"this version knows {', '.join(EMBEDDERS)}"
            )
        learnt = {key.partition(".")[2]: a for key, a in arrays.items() if "." in key}
        embedder = EMBEDDERS[name].restore(description["embedder_options"], learnt)
        options = description["tree_options"]
        levels = tuple(arrays[f"level{level}"] for level in range(1, options["depth"] + 1))
        return cls(embedder, Tree(levels), options)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the router to a folder of its own, in place of the one that is there.

        Raises:
            RouterError: the folder cannot be written.
        """
        saved.write(Path(folder), self._description(), self._arrays())

    def route(self, texts: Sequence[str]) -> Ids:
        """Leaf ids `[N]` of texts, int64 in [0, k^p). Every text has one, also the empty one."""
        _check_texts(texts)
        if not len(texts):
            return np.empty(0, np.int64)
        return self.tree.descend(self.embedder.embed(texts))

    @property
    def branching(self) -> int:
        """Children of a node, k."""
        return self.tree.branching

    @property
    def depth(self) -> int:
        """Levels of the tree, p."""
        return self.tree.depth

    @property
    def leaves(self) -> int:
        """Leaf ids, k^p."""
        return self.tree.leaves

    @cached_property
    def hash(self) -> str:
        """A sha256 over all options and arrays, in hex: equal hashes give equal routes."""
        return saved.digest(self._description(), self._arrays())

    def _description(self) -> dict[str, Any]:
        return {
            "embedder": self.embedder.name,
            "embedder_options": self.embedder.options(),
            "tree_options": self.options,
        }

    def _arrays(self) -> Arrays:
        levels = {f"level{i}": level for i, level in enumerate(self.tree.levels, start=1)}
        learnt = {f"embedder.{name}": array for name, array in self.embedder.arrays().items()}
        return levels | learnt


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise RouterError(f"texts must be a list of texts, got one text: {texts[:40]!r}")
