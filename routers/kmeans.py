"""Balanced k-means: one node of the tree.

N vectors, E components of each, k clusters. After HMB, "Pretraining with hierarchical memories"
(arXiv 2510.02375), which has k = 16, 20 steps, 6,400 vectors a step and a limit of 0.094.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Clustering:
    """How the k-means of each node runs.

    Attributes:
        steps: of expectation and maximization.
        sample: vectors of a step at most, drawn anew for each.
        limit: share of a step's vectors above which a cluster is split. None: 1.5 / k, as HMB has
            it. 1: never.
    """

    steps: int = 20
    sample: int = 6400
    limit: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, value in (("steps", self.steps), ("sample", self.sample)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def limit_of(self, k: int) -> float:
        """The limit for k clusters.

        Raises:
            ValueError: it is not above 1 / k, so that even equal clusters would be split for ever.
        """
        limit = 1.5 / k if self.limit is None else self.limit
        if not 1 / k < limit <= 1:
            raise ValueError(
                f"limit must be above 1 / {k} (equal shares) and at most 1, got {limit}"
            )
        return limit


def balanced_kmeans(
    vectors: Vectors, k: int, rng: np.random.Generator, clustering: Clustering
) -> Vectors:
    """Centroids `[k, E]` of vectors `[N, E]`, N >= 1.

    Starts with k-means++. Each step assigns a new sample, balances it (see `balance`) and moves
    each centroid to the mean of its vectors; a centroid without any stays where it is. The paper
    does not say whether centroids are averaged over steps. Here they are not.

    With fewer than k distinct vectors some centroids are equal. The first of them gets all that is
    nearest to them, the others nothing.
    """
    limit = clustering.limit_of(k)
    centroids = _spread(_draw(vectors, clustering.sample, rng), k, rng)
    for _ in range(clustering.steps):
        batch = _draw(vectors, clustering.sample, rng)
        scores = (centroids**2).sum(1) - 2 * batch @ centroids.T  # distance^2 - |x|^2, [n, k]
        assigned = balance(scores.argmin(1), k, limit, rng)
        members = assigned == np.arange(k)[:, None]  # [k, n]
        counts = members.sum(1)
        filled = counts > 0
        sums = members[filled].astype(np.float32) @ batch
        centroids[filled] = sums / counts[filled, None]
    return centroids


def balance(assigned: Ids, k: int, limit: float, rng: np.random.Generator) -> Ids:
    """Splits every cluster that has more than a share `limit` of the assignments `[n]`.

    Half of its assignments, drawn at random, go to the cluster that is then the smallest. The
    largest is split first, and each at most once: the clusters that grew wait for the next step.
    """
    assigned = assigned.copy()
    counts = np.bincount(assigned, minlength=k)
    by_size = np.argsort(-counts, kind="stable")
    for cluster in by_size[counts[by_size] > limit * len(assigned)]:
        members = np.flatnonzero(assigned == cluster)
        moved = rng.permutation(members)[: len(members) // 2]
        assigned[moved] = counts.argmin()
        counts = np.bincount(assigned, minlength=k)
    return assigned


def _draw(vectors: Vectors, size: int, rng: np.random.Generator) -> Vectors:
    if len(vectors) <= size:
        return vectors
    return vectors[rng.choice(len(vectors), size, replace=False)]


def _spread(vectors: Vectors, k: int, rng: np.random.Generator) -> Vectors:
    """Centroids by k-means++: each next one is drawn by its squared distance to those before."""
    centers = [vectors[rng.integers(len(vectors))]]
    apart = np.full(len(vectors), np.inf)
    while len(centers) < k:
        apart = np.minimum(apart, ((vectors - centers[-1]).astype(np.float64) ** 2).sum(1))
        total = apart.sum()  # 0: all of them are centers already
        odds = apart / total if total > 0 else None
        centers.append(vectors[rng.choice(len(vectors), p=odds)])
    return np.stack(centers)
