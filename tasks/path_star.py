"""Path-star graphs: one choice at the start that only looking ahead can make.

B examples, d arms of l nodes that all begin at the root, T positions (arXiv 2510.26745).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, BatchSet, EvalSplit
from mneme.tasks.batch import cut
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.sampling import Ints, distinct, first_arrivals

MARKS = 4  # tokens that are no nodes: end of the edges, question, an edge, a path
EDGES, QUESTION, EDGE, PATH = range(MARKS)


def make_path_star(
    rng: np.random.Generator, n: int, *, nodes: int, arms: int, length: int
) -> Batch:
    """Makes `n` rows: a new graph's edges in random order, root and goal, then the path.

    A row is `u v` for each of the d (l - 1) edges, a mark, goal, root, a mark, and the path's nodes
    after the root but for the last, each of which is the target of the one before it. The first hop
    alone needs looking ahead, from the goal back to the root; all others copy an edge.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        nodes: labels that there are; those of a graph are drawn anew for each.
        arms: d.
        length: l, nodes of an arm with the root.

    Returns:
        A batch of T = 2 d (l - 1) + 2 + l with the slice `hop` `[B, T]`, from 1.
    """
    count = arms * (length - 1)
    labels = MARKS + distinct(rng, n, 1 + count, nodes)
    root, others = labels[:, :1], labels[:, 1:].reshape(n, arms, length - 1)
    paths = np.concatenate([np.broadcast_to(root[:, None], (n, arms, 1)), others], axis=2)
    edges = np.stack([paths[:, :, :-1], paths[:, :, 1:]], axis=3).reshape(n, count, 2)
    order = first_arrivals(rng.random((n, count)), count)
    shuffled = np.take_along_axis(edges, order[..., None], 1).reshape(n, -1)
    path = paths[np.arange(n), rng.integers(arms, size=n)]
    parts = [shuffled, np.full((n, 1), EDGES), path[:, -1:], root, np.full((n, 1), QUESTION)]
    return _path_batch(np.concatenate(parts, axis=1), path[:, 1:], first_hop=1)


def _path_batch(prompt: Ints, path: Ints, *, first_hop: int) -> Batch:
    """A prompt whose last position answers with the first node of a path, and so on."""
    inputs = np.concatenate([prompt, path[:, :-1]], axis=1)
    hops = np.zeros_like(inputs)
    targets = np.full_like(inputs, IGNORE)
    targets[:, prompt.shape[1] - 1 :] = path
    hops[:, prompt.shape[1] - 1 :] = np.arange(first_hop, first_hop + path.shape[1])
    slices = {"hop": torch.from_numpy(hops)}
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)


def solve_path_star(inputs: Tensor, edges: int) -> Tensor:
    """Walks back from the goal to the root by the edges of each row; `[B, T]`."""
    answers = torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs.tolist()):
        before = {tokens[2 * i + 1]: tokens[2 * i] for i in range(edges)}
        node, root = tokens[2 * edges + 1], tokens[2 * edges + 2]
        path = [node]
        while before[path[-1]] != root:
            path.append(before[path[-1]])
        answers[row, 2 * edges + 3 :] = torch.tensor(path[::-1])
    return answers


@dataclass(kw_only=True, eq=False)
class PathStar(RecallTask):
    """Paths in graphs that stand in the context: see `make_path_star`.

    Models that are trained on the next token with the true tokens before it stay at `1 / arms` at
    the first hop (`accuracy/hop=1`), as published. Other options are those of `RecallTask`.

    Args:
        arms: d; default 5.
        length: l; default 5.
        nodes: labels that there are; default 100.
    """

    name = "path_star"
    level = "length"
    test_length: ClassVar[None] = None

    arms: int = 5
    length: int = 5
    nodes: int = 100
    seq_len: int = field(init=False)
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options."""
        self.vocab_size = MARKS + self.nodes
        self.seq_len = max(2 * self.arms * (self.length - 1) + 2 + self.length, 2)
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError` if there is no choice to make, or there are not enough labels."""
        check_path_star(self.arms, level)
        if (needed := 1 + self.arms * (level - 1)) > self.nodes:
            raise ValueError(
                f"nodes ({self.nodes}) must be at least {needed}: {self.arms} arms of {level}"
            )

    @property
    def chance_level(self) -> float:
        """Of one who knows that the first hop is one of d, and copies edges from there on."""
        return (1 / self.arms + self.length - 2) / (self.length - 1)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples from `rng` alone."""
        return make_path_star(rng, n, nodes=self.nodes, arms=self.arms, length=level)

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The hops."""
        return {"hop": range(self.length)}


@dataclass(kw_only=True, eq=False)
class PathStarInWeights(RecallTask):
    """Paths in one graph that only training shows: edges and paths of most arms (arXiv 2510.26745).

    A training batch is, equally often, of edges `mark u v` in both directions, or of paths `mark
    leaf pause ... root ...` to the leaves of three in four arms; tests ask for paths to the others.
    So a path is never copied: its first hop follows from edges that are held in weights. There:
    up to 10,000 arms of 10 nodes. Other options are those of `RecallTask`.

    Args:
        arms: d; default 100.
        length: l; default 5.
        pauses: tokens between the leaf and the path; default 5.
        held_out: share of arms whose paths are not trained; default 0.25.
        test_examples: paths in each of the two evaluation sets, drawn with replacement from the
            arms that are held out, half of them for each set; default 200.
        seed: the graph, and all other randomness of the data, follows from it; default 0.
    """

    name = "path_star_in_weights"
    level = "kind"
    kind: ClassVar[list[int]] = [EDGE, PATH]
    test_kind: ClassVar[list[int]] = [PATH]

    arms: int = 100
    length: int = 5
    pauses: int = 5
    held_out: float = 0.25
    test_examples: int = 200
    seq_len: int = field(init=False)
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options, and draws the graph."""
        check_path_star(self.arms, self.length)
        self.trained = round(self.arms * (1 - self.held_out))
        if not 1 <= self.trained <= self.arms - 2:
            raise ValueError(
                f"held_out ({self.held_out}) of {self.arms} arms must leave one or more to train "
                "on and two to test with"
            )
        if self.pauses < 0:
            raise ValueError(f"pauses ({self.pauses}) must be 0 or more")
        nodes = 1 + self.arms * (self.length - 1)
        self.vocab_size, self.seq_len = MARKS + nodes, self.pauses + self.length + 2
        super().__post_init__()
        labels = MARKS + np.random.default_rng(self.seed).permutation(nodes)
        roots = np.full((self.arms, 1), labels[0])
        self.paths = np.concatenate([roots, labels[1:].reshape(self.arms, -1)], axis=1)  # [d, l]

    def check(self, level: int) -> None:
        """All was checked before."""

    @property
    def chance_level(self) -> float:
        """Of guessing among all nodes."""
        return 1 / (self.vocab_size - MARKS)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` training examples, edges or paths, from `rng` alone."""
        return self._edges(rng, n) if level == EDGE else self._paths(rng, n, 0, self.trained)

    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """Paths to leaves that training never asks for."""
        middle = (self.trained + len(self.paths)) // 2
        ends = (self.trained, middle) if split == "val" else (middle, len(self.paths))
        paths = self._paths(self.rng(split, 0), self.test_examples, *ends)
        return BatchSet(lambda: cut(paths, self.batch_size))

    def _edges(self, rng: np.random.Generator, n: int) -> Batch:
        starts = rng.integers(self.length - 1, size=n)
        ends = starts + 1
        turned = rng.integers(2, size=n, dtype=bool)
        starts, ends = np.where(turned, ends, starts), np.where(turned, starts, ends)
        arms = rng.integers(len(self.paths), size=n)
        prompt = np.stack([np.full(n, EDGE), self.paths[arms, starts]], axis=1)
        return _path_batch(prompt, self.paths[arms, ends][:, None], first_hop=0)

    def _paths(self, rng: np.random.Generator, n: int, first: int, end: int) -> Batch:
        paths = self.paths[rng.integers(first, end, size=n)]
        marks, pauses = np.full((n, 1), PATH), np.full((n, self.pauses), QUESTION)
        prompt = np.concatenate([marks, paths[:, -1:], pauses], axis=1)
        return _path_batch(prompt, paths, first_hop=0)

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The hops; 0 is the root, and the end of an edge."""
        return {"hop": range(self.length)}


def check_path_star(arms: int, length: int) -> None:
    """Raises ValueError where there is no choice to make."""
    if arms < 2 or length < 2:
        raise ValueError(f"arms ({arms}) and length ({length}) must be at least 2")
