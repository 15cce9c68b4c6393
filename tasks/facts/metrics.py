"""How many of the facts a model knows, by how often training told each of them.

F facts, P phases of training, D decades of exposures.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mneme.tasks.batch import Batch
from mneme.tasks.metrics import Metrics, score

Sums = dict[str, float]

# What is summed over the facts of one phase and one decade, in this order.
SUMS = ("count", "right", "nll", "odds", "right_odds", "stored", "bits", "log_exposures")


class Exposures(NamedTuple):
    """How training tells each fact.

    Attributes:
        times: `[F]` int64.
        odds: `[F]` float64, the probability of being drawn while its phase lasts.
        phase: `[F]` int64, from 0: the part of training that it is told in.
    """

    times: Tensor
    odds: Tensor
    phase: Tensor


class FactMetrics(Metrics):
    """Accuracy over facts by exposures, and what the model has stored of them.

    `compute` gives

    - `loss`, in nats per fact, and `accuracy`: all facts count alike.
    - `accuracy_weighted`: each fact counts by how often it is drawn. A model that knows the
      frequent facts alone has a high figure here and a low one in `accuracy`.
    - `accuracy/exposures=10` over the facts told 10 to 99 times, and so for 0, 1, 100, ...
    - `accuracy/phase=0`, where there are several phases.
    - `facts_stored`: facts whose object has a probability above one half.
    - `stored_bits`: the sum over facts of G(o), the bits that the model has of object o,
      `G(x) = max(0, log2(O) - bits to name x)`, less the mean of G over all objects, which is what
      chance gives. Without that term, which is ours, a model that knows nothing and merely prefers
      some objects would be credited with up to half a bit per fact: more than it holds of most
      facts in the long tail.
    - `half_exposures`, where there is one phase: the exposures at which accuracy rises through one
      half, on a line over the logarithm of exposures between the means of two decades; absent if it
      does not.

    Each fact is asked for once. If only some are, evenly drawn, `facts_stored` and `stored_bits`
    are scaled up to all.

    Args:
        exposures: how often training tells the facts.
        objects: the O tokens that stand for objects.
    """

    def __init__(self, exposures: Exposures, objects: range) -> None:
        self.exposures = exposures
        self.objects = objects
        self.edges = torch.tensor(decades(int(exposures.times.max())))
        phases = int(exposures.phase.max()) + 1
        self.totals = torch.zeros(phases, len(self.edges), len(SUMS), dtype=torch.float64)

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Counts one batch; `logits` is `[B, T, V]`, the slice `fact` is `[B]`."""
        scores = score(logits, batch.targets)
        fact = batch.slices["fact"].cpu()[scores.where // batch.targets.shape[1]]
        exposures, odds, phase = (values[fact] for values in self.exposures)
        columns = {
            "count": torch.ones_like(odds),
            "right": scores.right.double(),
            "nll": scores.nll,
            "odds": odds,
            "right_odds": scores.right * odds,
            "stored": (scores.nll < math.log(2)).double(),
            "bits": self._gain(scores.nll) - self._gain_of_chance(logits, scores.where),
            "log_exposures": exposures.clamp(min=1).double().log(),
        }
        decade = torch.searchsorted(self.edges, exposures, right=True) - 1
        cell = phase * len(self.edges) + decade
        rows = torch.stack([columns[name] for name in SUMS], dim=1)  # [N, sums]
        self.totals.view(-1, len(SUMS)).index_add_(0, cell, rows)

    def _gain(self, nll: Tensor) -> Tensor:
        """The bits that a model has of objects to which it gives these negative log likelihoods."""
        return (math.log(len(self.objects)) - nll).clamp(min=0) / math.log(2)

    @torch.no_grad()
    def _gain_of_chance(self, logits: Tensor, where: Tensor) -> Tensor:
        """`[N]`, the mean gain over all objects."""
        nll = -logits.flatten(0, 1)[where.to(logits.device)].float().log_softmax(-1)
        return self._gain(nll[:, self.objects.start : self.objects.stop]).mean(1).cpu().double()

    def compute(self) -> dict[str, float]:
        """The metrics of everything counted so far, by flat name."""
        whole = _named(self.totals.sum((0, 1)))
        if not whole["count"]:
            raise ValueError("no fact was asked for, so there is nothing to average over")
        scale = len(self.exposures.times) / whole["count"]
        metrics = {
            "loss": whole["nll"] / whole["count"],
            "accuracy": _accuracy(whole),
            "accuracy_weighted": whole["right_odds"] / whole["odds"],
            "facts_stored": whole["stored"] * scale,
            "stored_bits": whole["bits"] * scale,
        }
        by_decade = _occurred(self.edges.tolist(), self.totals.sum(0))
        metrics |= {f"accuracy/exposures={edge}": _accuracy(d) for edge, d in by_decade.items()}
        if len(self.totals) > 1:
            by_phase = _occurred(range(len(self.totals)), self.totals.sum(1))
            return metrics | {
                f"accuracy/phase={phase}": _accuracy(p) for phase, p in by_phase.items()
            }
        half = _half_exposures([sums for edge, sums in by_decade.items() if edge])
        return metrics if half is None else metrics | {"half_exposures": half}


def decades(largest: int) -> list[int]:
    """The lower ends of the ranges 0, 1 to 9, 10 to 99, ... up to the one that holds `largest`."""
    return [0, *(10**power for power in range(len(str(largest)) if largest else 0))]


def _named(sums: Tensor) -> Sums:
    return dict(zip(SUMS, sums.tolist(), strict=True))


def _occurred(labels: Iterable[int], sums: Tensor) -> dict[int, Sums]:
    """Label to the sums of each group that counts a fact."""
    groups = zip(labels, map(_named, sums), strict=True)
    return {label: group for label, group in groups if group["count"]}


def _accuracy(sums: Sums) -> float:
    return sums["right"] / sums["count"]


def _half_exposures(decades: Sequence[Sums]) -> float | None:
    """Where accuracy first rises through one half from one decade to the next, if anywhere."""
    points = [(sums["log_exposures"] / sums["count"], _accuracy(sums)) for sums in decades]
    for (x, y), (next_x, next_y) in pairwise(points):
        if y < 0.5 <= next_y:
            return math.exp(x + (0.5 - y) / (next_y - y) * (next_x - x))
    return None
