"""The one shape in which every task hands out data.

B examples, T positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # the default `ignore_index` of torch's cross entropy, so no loss needs telling
NO_ROUTE = -1  # the route of an example without a trustworthy one: the generic block


class Batch(NamedTuple):
    """Token sequences, what the model must say at each position, and how scores are grouped.

    The output at position t must be `targets[:, t]`: a label that belongs to the next token is
    already moved one step to the left, so a model never shifts anything.

    Attributes:
        inputs: `[B, T]` int64, token ids.
        targets: `[B, T]` int64, token ids, `IGNORE` where nothing is scored.
        slices: name to `[B]` (one value per example) or `[B, T]` (one per position) int64:
            the groups a scored target is counted in.
        route: `[B]` int64, which leaf of a memory bank each example reads: from 0, or `NO_ROUTE`
            for the generic block; None for a task that gives no routes.
    """

    inputs: Tensor
    targets: Tensor
    slices: dict[str, Tensor]
    route: Tensor | None = None


@dataclass(frozen=True)
class BatchSet:
    """A fixed series of batches that is made again each time it is iterated.

    Attributes:
        make: starts the series from its first batch.
    """

    make: Callable[[], Iterator[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        return self.make()


def select(examples: Batch, rows: slice | Tensor) -> Batch:
    """Some examples of a batch, by a slice or by their indices."""
    slices = {name: values[rows] for name, values in examples.slices.items()}
    route = None if examples.route is None else examples.route[rows]
    return Batch(examples.inputs[rows], examples.targets[rows], slices, route)


def cut(examples: Batch, size: int) -> Iterator[Batch]:
    """Cuts one large batch into batches of `size` examples; the last may be smaller."""
    for start in range(0, len(examples.inputs), size):
        yield select(examples, slice(start, start + size))


def unscored(batch: Batch) -> Batch:
    """The same inputs with nothing to score: it passes through a model and counts for nothing."""
    return batch._replace(targets=torch.full_like(batch.targets, IGNORE))


def deal(batches: BatchSet, rank: int, world_size: int) -> Iterator[Batch]:
    """Deals batches round-robin, the same number to every rank.

    A model that is sharded over ranks communicates in its forward pass, so a rank with one batch
    fewer would leave the others waiting for ever. Ranks that the last round does not reach
    therefore receive an unscored copy of the last batch.

    Args:
        batches: the whole series, the same on every rank.
        rank: whose share to yield, from 0.
        world_size: the number of ranks.

    Yields:
        Batches `rank`, `rank + world_size`, ... of the series.
    """
    dealt, last = 0, None
    for last in batches:
        if dealt % world_size == rank:
            yield last
        dealt += 1
    remainder = dealt % world_size
    if last is not None and 0 < remainder <= rank:
        yield unscored(last)
