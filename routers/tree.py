"""The tree: a centroid for each node, and the greedy way from the root to a leaf.

N vectors, E components of each, k children of a node, p levels. Level l = 1..p has k^l nodes, and
the children of node i are the nodes k i .. k i + k - 1 of the next level. A leaf is a node of
level p.
"""

from dataclasses import dataclass

import numpy as np

from mneme.routers.kmeans import Clustering, Ids, Vectors, balanced_kmeans

_CHUNK = 1024  # vectors that descend together: k E components of each are in memory


@dataclass(frozen=True, eq=False)
class Tree:
    """Centroids of all nodes.

    Attributes:
        levels: `[k^(l-1), k, E]` for l = 1..p: of the children of each node of level l - 1.
    """

    levels: tuple[Vectors, ...]

    @classmethod
    def fit(
        cls,
        vectors: Vectors,
        *,
        branching: int,
        depth: int,
        seed: int = 0,
        clustering: Clustering | None = None,
    ) -> "Tree":
        """Clusters vectors, then those of each cluster, and so on, from the root to the leaves.

        The children of a node that no vector reached are all where the node itself is.

        Args:
            vectors: `[N, E]`, at least one, finite.
            branching: k, at least 2.
            depth: p, at least 1.
            seed: each node draws from a generator of (seed, level, node).
            clustering: of each node; None: the defaults.
        """
        check_shape(branching, depth)
        clustering = clustering or Clustering()
        levels: list[Vectors] = []
        reached = np.zeros(len(vectors), np.int64)
        for level in range(depth):
            centroids = np.empty((branching**level, branching, vectors.shape[1]), np.float32)
            for node, members in enumerate(_members(reached, branching**level)):
                if len(members):
                    rng = np.random.default_rng([seed, level, node])
                    here = balanced_kmeans(vectors[members], branching, rng, clustering)
                else:
                    here = levels[-1].reshape(-1, vectors.shape[1])[node]
                centroids[node] = here
            levels.append(centroids)
            reached = _step(vectors, centroids, reached)
        return cls(tuple(levels))

    @property
    def branching(self) -> int:
        """Children of a node, k."""
        return self.levels[0].shape[1]

    @property
    def depth(self) -> int:
        """Levels, p."""
        return len(self.levels)

    @property
    def leaves(self) -> int:
        """Nodes of the last level, k^p."""
        return self.branching**self.depth

    def descend(self, vectors: Vectors) -> Ids:
        """Leaf ids `[N]` of vectors `[N, E]`: at each node on to the nearest child, never back.

        Distances are Euclidean, p k of them per vector, and of equally near children the first is
        taken. A leaf depends on its own vector alone, not on the others of the call.
        """
        reached = np.zeros(len(vectors), np.int64)
        for level in self.levels:
            reached = _step(vectors, level, reached)
        return reached


def nodes(route: Ids, level: int, depth: int, branching: int) -> Ids:
    """Nodes at a level, 1..depth, of leaf ids: `leaf // k^(p - l)`. The id -1, no route, stays."""
    check_shape(branching, depth)
    if not 1 <= level <= depth:
        raise ValueError(f"level must be in 1..{depth}, got {level}")
    return route // branching ** (depth - level)


def check_shape(branching: int, depth: int) -> None:
    """Raises ValueError for what is no tree."""
    if branching < 2:
        raise ValueError(f"branching must be at least 2, got {branching}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")


def _members(reached: Ids, count: int) -> list[Ids]:
    """For each of `count` nodes, which vectors reached it."""
    order = np.argsort(reached, kind="stable")
    return np.split(order, np.searchsorted(reached[order], np.arange(1, count)))


def _step(vectors: Vectors, centroids: Vectors, reached: Ids) -> Ids:
    """Nodes of the next level `[N]`, from those of this one.

    Differences, not a matrix product: how BLAS rounds depends on the number of rows.
    """
    found = np.empty_like(reached)
    for start in range(0, len(vectors), _CHUNK):
        piece = slice(start, start + _CHUNK)
        apart = vectors[piece, None] - centroids[reached[piece]]  # [n, k, E]
        found[piece] = (apart**2).sum(2).argmin(1)
    return reached * centroids.shape[1] + found
