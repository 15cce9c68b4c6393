"""How texts spread over a tree, and how often two sets of routes meet.

N routes, k children of a node, p levels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mneme.routers.kmeans import Ids
from mneme.routers.tree import nodes


@dataclass(frozen=True, eq=False)
class Occupancy:
    """How texts spread over the nodes of one level.

    Attributes:
        shares: `[k^l]`, of all texts, by node.
    """

    shares: NDArray[np.float64]

    @property
    def used(self) -> int:
        """Nodes that have a text."""
        return int(np.count_nonzero(self.shares))

    @property
    def largest(self) -> float:
        """The share of the node that has most."""
        return float(self.shares.max())

    @property
    def smallest(self) -> float:
        """The share of the node that has least."""
        return float(self.shares.min())

    @property
    def effective(self) -> float:
        """The exponential of the entropy of the shares: k^l if all are equal, 1 if one has all."""
        some = self.shares[self.shares > 0]
        return float(np.exp(-(some * np.log(some)).sum()))


@dataclass(frozen=True)
class Report:
    """What `report` found.

    Attributes:
        levels: occupancy of levels 1..p.
        agreement: by level, the share of texts whose other route has the same node; None if there
            were no other routes.
    """

    levels: tuple[Occupancy, ...]
    agreement: tuple[float, ...] | None = None


def report(routes: Ids, *, branching: int, depth: int, others: Ids | None = None) -> Report:
    """Occupancy of each level, and agreement with other routes.

    Agreement is what bounds a bank's use: a fact that was learnt in the blocks of its document is
    read from those of its question.

    Args:
        routes: leaf ids `[N]`, of documents for example.
        branching: k.
        depth: p.
        others: leaf ids `[N]` to compare them with, of a question on each document for example.

    Raises:
        ValueError: no routes, ids that are not leaves, or another number of others.
    """
    _check(routes, branching**depth)
    if others is not None:
        _check(others, branching**depth)
        if len(others) != len(routes):
            raise ValueError(f"{len(routes)} routes have {len(others)} others; they must be pairs")
    levels, agreement = [], []
    for level in range(1, depth + 1):
        here = nodes(routes, level, depth, branching)
        levels.append(Occupancy(np.bincount(here, minlength=branching**level) / len(routes)))
        if others is not None:
            agreement.append(float((here == nodes(others, level, depth, branching)).mean()))
    return Report(tuple(levels), None if others is None else tuple(agreement))


def markdown(found: Report) -> str:
    """A table with a row per level."""
    columns = ["level", "nodes", "used", "largest share", "smallest share", "effective nodes"]
    rows = [
        [
            f"{level}",
            f"{len(here.shares)}",
            f"{here.used}",
            f"{here.largest:.2%}",
            f"{here.smallest:.2%}",
            f"{here.effective:.1f}",
        ]
        for level, here in enumerate(found.levels, start=1)
    ]
    if found.agreement is not None:
        columns.append("agreement")
        for row, share in zip(rows, found.agreement, strict=True):
            row.append(f"{share:.1%}")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _check(routes: Ids, leaves: int) -> None:
    if not len(routes):
        raise ValueError("a report needs at least one route, got none")
    low, high = int(routes.min()), int(routes.max())
    if low < 0 or high >= leaves:
        raise ValueError(f"routes must be leaf ids in 0..{leaves - 1}, got {low}..{high}")
