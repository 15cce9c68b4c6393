"""Balanced k-means, the descent, and ids of nodes."""

import numpy as np
import pytest

from mneme.routers import Clustering, Tree, nodes
from mneme.routers.kmeans import balance, balanced_kmeans

UNBALANCED = Clustering(limit=1)


def blobs(centers, sizes, noise, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [c + noise * rng.normal(size=(n, len(c))) for c, n in zip(centers, sizes, strict=True)]
    ).astype(np.float32)


@pytest.mark.parametrize("sample", [6400, 60], ids=["all vectors a step", "a few"])
def test_separate_clusters_are_found(sample):
    centers = 5 * np.eye(4)
    vectors = blobs(centers, [300] * 4, 0.3)
    rng = np.random.default_rng(1)
    found = balanced_kmeans(vectors, 4, rng, Clustering(sample=sample))
    apart = np.linalg.norm(centers[:, None] - found, axis=2)  # [true, found]
    assert sorted(apart.argmin(1)) == [0, 1, 2, 3]
    assert apart.min(1).max() < 0.3


def test_balancing_keeps_the_largest_cluster_small():
    centers = np.random.default_rng(0).normal(size=(9, 8))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    vectors = blobs(centers, [1200] + [100] * 8, 0.2)

    def largest(clustering):
        trees = [
            Tree.fit(vectors, branching=4, depth=1, seed=seed, clustering=clustering)
            for seed in range(5)
        ]
        return np.mean([np.bincount(tree.descend(vectors)).max() / 2000 for tree in trees])

    assert largest(UNBALANCED) > 0.55
    assert largest(None) < 0.45


def test_half_of_a_cluster_above_the_limit_goes_to_the_smallest():
    assigned = np.repeat([0, 1, 2, 3], [10, 3, 1, 2])
    split = balance(assigned, 4, 0.375, np.random.default_rng(0))
    assert np.bincount(split).tolist() == [5, 3, 6, 2]
    changed = split != assigned
    assert (assigned[changed] == 0).all()
    assert (split[changed] == 2).all()
    assert not np.array_equal(split, balance(assigned, 4, 0.375, np.random.default_rng(1)))


def test_a_cluster_at_the_limit_stays():
    assigned = np.repeat([0, 1, 2, 3], [6, 5, 5, 0])
    assert np.array_equal(balance(assigned, 4, 6 / 16, np.random.default_rng(0)), assigned)


def test_two_clusters_above_the_limit_are_both_split():
    assigned = np.repeat([0, 1, 2, 3], [8, 7, 1, 0])
    split = balance(assigned, 4, 0.375, np.random.default_rng(0))
    assert np.bincount(split).tolist() == [4, 4, 4, 4]


def test_descent_is_the_naive_loop():
    rng = np.random.default_rng(0)
    k, depth, dim = 3, 3, 5
    levels = [rng.normal(size=(k**i, k, dim)).astype(np.float32) for i in range(depth)]
    levels[1][:, 2] = levels[1][:, 0]  # a tie: the first must win
    tree = Tree(tuple(levels))
    vectors = rng.normal(size=(3000, dim)).astype(np.float32)
    expected = []
    for vector in vectors:
        node = 0
        for level in levels:
            distances = [float(((vector - c) ** 2).sum()) for c in level[node]]
            node = node * k + distances.index(min(distances))
        expected.append(node)
    leaves = tree.descend(vectors)
    assert leaves.dtype == np.int64
    assert leaves.tolist() == expected
    assert (nodes(leaves, 2, depth, k) % k != 2).all()
    assert (tree.branching, tree.depth, tree.leaves) == (3, 3, 27)


def test_each_node_clusters_what_reached_it():
    outer = blobs(100 * np.eye(2, 4), [60, 60], 0)
    inner = blobs(np.eye(4), [30] * 4, 0.01)[[*range(0, 120, 2), *range(1, 120, 2)]]
    vectors = outer + inner
    tree = Tree.fit(vectors, branching=2, depth=2, clustering=UNBALANCED)
    leaves = tree.descend(vectors)
    for level in (1, 2):
        centroids = tree.levels[level - 1].reshape(2**level, 4)
        for node in range(2**level):
            mean = vectors[nodes(leaves, level, 2, 2) == node].mean(0)
            np.testing.assert_allclose(centroids[node], mean, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_vectors_than_children_are_fine(count):
    vectors = np.eye(3, 6, dtype=np.float32)[:count]
    tree = Tree.fit(vectors, branching=4, depth=2)
    assert all(np.isfinite(level).all() for level in tree.levels)
    leaves = tree.descend(vectors)
    assert len(set(leaves.tolist())) == count
    for node in set(range(4)) - set((leaves // 4).tolist()):
        assert (tree.levels[1][node] == tree.levels[0][0, node]).all()


def test_equal_vectors_take_the_first_way():
    vectors = np.ones((50, 3), np.float32)
    tree = Tree.fit(vectors, branching=3, depth=2)
    assert np.unique(tree.levels[1]).tolist() == [1]
    assert tree.descend(vectors).tolist() == [0] * 50


def test_nodes_are_integer_divisions():
    leaves = np.array([0, 5, 37, 63, -1])
    assert nodes(leaves, 3, 3, 4).tolist() == [0, 5, 37, 63, -1]
    assert nodes(leaves, 2, 3, 4).tolist() == [0, 1, 9, 15, -1]
    assert nodes(leaves, 1, 3, 4).tolist() == [0, 0, 2, 3, -1]


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"level must be in 1..3, got 0"):
        nodes(np.zeros(1, np.int64), 0, 3, 4)
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="branching must be at least 2, got 1"):
        Tree.fit(vectors, branching=1, depth=2)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Tree.fit(vectors, branching=2, depth=0)
    with pytest.raises(ValueError, match=r"limit must be above 1 / 4 .* got 0.2"):
        Tree.fit(vectors, branching=4, depth=2, clustering=Clustering(limit=0.2))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Clustering(steps=0)
