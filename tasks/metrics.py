"""The one place where metrics are computed, from logits and a batch.

B examples, T positions, V vocabulary, N scored positions. Every metric is a ratio of sums, and
an accumulator holds the sums: over batches they add up, and over ranks too::

    total = metrics.state()
    torch.distributed.all_reduce(total)
    metrics.load_sum(total)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mneme.tasks.batch import IGNORE, Batch

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})

# Scored positions turned to fp32 at a time: 128 MiB at a vocabulary of 8192, whatever the batch.
ROWS = 4096

# Slices counted in ranges rather than value by value.
BUCKETED = frozenset({"gap", "position"})


class Scores(NamedTuple):
    """Per scored position, on the CPU in float64 where it is a number.

    Attributes:
        where: `[N]` index into the flattened `[B * T]` positions.
        nll: `[N]` negative log likelihood of the target, in nats.
        right: `[N]` whether the target had the largest logit.
    """

    where: Tensor
    nll: Tensor
    right: Tensor


@torch.no_grad()
def score(logits: Tensor, targets: Tensor) -> Scores:
    """Scores positions with a target, in fp32 or more, never copying all the logits at once.

    Args:
        logits: `[B, T, V]` in any floating-point type.
        targets: `[B, T]`, `IGNORE` where unscored.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} must be targets {tuple(targets.shape)} plus a "
            "vocabulary axis"
        )
    rows, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    where = (wanted != IGNORE).nonzero().squeeze(1)
    nll, right = [], []
    for part in where.split(ROWS):
        picked = rows[part] if rows.dtype == torch.float64 else rows[part].float()
        nll.append(F.cross_entropy(picked, wanted[part], reduction="none"))
        right.append(picked.argmax(-1) == wanted[part])
    return Scores(where.cpu(), torch.cat(nll).cpu().double(), torch.cat(right).cpu())


class Metrics(ABC):
    """Sums over scored positions, and the metrics that are their ratios.

    Attributes:
        totals: the sums, float64 of any shape, where one tensor holds them all.
    """

    totals: Tensor

    @abstractmethod
    def update(self, logits: Tensor, batch: Batch) -> None:
        """Counts one batch; `logits` is `[B, T, V]`."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The metrics of everything counted so far, by flat name."""

    def state(self) -> Tensor:
        """A copy of the sums: one float64 vector, laid out alike on every rank."""
        return self.totals.flatten().clone()

    def load_sum(self, total: Tensor) -> None:
        """Replaces the sums, by those of all ranks for example; `total` is as `state` gives it."""
        self.totals = total.detach().cpu().double().clone().view_as(self.totals)


class RecallMetrics(Metrics):
    """Accuracy over scored positions, whole and by slice.

    `compute` gives `loss` (nats per scored token), `accuracy` (over scored tokens),
    `accuracy_by_example` (each example counts once however many of its tokens are scored: what
    the code of the MQAR papers averages), `exact_sequence_accuracy` (the share of examples all
    of whose scored tokens are right) and, for each group that occurred, `accuracy/pairs=8` or,
    in ranges that double, `accuracy/gap=33-64`. A slice is counted over the batches that have
    it: in a mixture of tasks, each has slices of its own.

    Args:
        slices: the values each slice of a batch can take; for a bucketed slice (`gap`)
            the largest alone. Known beforehand, so that ranks agree on the layout of the sums.
    """

    def __init__(self, slices: Mapping[str, Sequence[int]]) -> None:
        self.groups = [_Groups(name, values) for name, values in slices.items()]
        # tokens, right, nll, examples, sum of the examples' accuracies, examples all right
        self.totals = torch.zeros(6, dtype=torch.float64)

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Counts one batch; `logits` is `[B, T, V]`."""
        scores = score(logits, batch.targets)
        length = batch.targets.shape[1]
        example = scores.where // length
        scored = example.bincount(minlength=len(batch.targets))
        hits = example[scores.right].bincount(minlength=len(batch.targets))
        sums = [
            len(scores.where),
            int(scores.right.sum()),
            float(scores.nll.sum()),
            int((scored > 0).sum()),
            float((hits.double() / scored.clamp(min=1)).sum()),
            int(((scored > 0) & (hits == scored)).sum()),
        ]
        self.totals += torch.tensor(sums, dtype=torch.float64)
        for group in (group for group in self.groups if group.name in batch.slices):
            values = batch.slices[group.name].cpu()
            per_example = values.dim() == 1
            picked = values[example] if per_example else values.reshape(-1)[scores.where]
            group.count(picked, scores.right)

    def compute(self) -> dict[str, float]:
        """The metrics of everything counted so far, by flat name."""
        tokens, right, nll, examples, shares, exact = self.totals.tolist()
        _require_tokens(tokens)
        metrics = {
            "loss": nll / tokens,
            "accuracy": right / tokens,
            "accuracy_by_example": shares / examples,
            "exact_sequence_accuracy": exact / examples,
        }
        for group in self.groups:
            metrics |= group.accuracies()
        return metrics

    def state(self) -> Tensor:
        """A copy of the sums: one float64 vector, laid out alike on every rank."""
        return torch.cat([self.totals, *(group.sums.flatten() for group in self.groups)])

    def load_sum(self, total: Tensor) -> None:
        """Replaces the sums, by those of all ranks for example."""
        sizes = [len(self.totals), *(group.sums.numel() for group in self.groups)]
        totals, *sums = total.detach().cpu().double().clone().split(sizes)
        self.totals = totals
        for group, values in zip(self.groups, sums, strict=True):
            group.sums = values.view(-1, 2)


class _Groups:
    """How many targets fell in each group of one slice, and how many of them were right."""

    def __init__(self, name: str, values: Sequence[int]) -> None:
        self.name = name
        self.bucketed = name in BUCKETED
        edges = doubling_edges(max(values)) if self.bucketed else sorted(set(values))
        self.edges = torch.tensor(edges)  # [G], the largest value of each group
        self.sums = torch.zeros(len(edges), 2, dtype=torch.float64)  # [G, (scored, right)]

    def count(self, values: Tensor, right: Tensor) -> None:
        """Counts scored positions; `values` and `right` are `[N]`."""
        group = torch.searchsorted(self.edges, values)
        last = len(self.edges) - 1
        known = group <= last
        if not self.bucketed:
            known &= self.edges[group.clamp(max=last)] == values
        if not known.all():
            raise ValueError(
                f"slice '{self.name}' holds {int(values[~known][0])}, but these metrics were "
                f"built for {self.edges.tolist()}: build them with every value that can occur"
            )
        scored = group.bincount(minlength=last + 1)
        hits = group[right].bincount(minlength=last + 1)
        self.sums += torch.stack([scored, hits], dim=1)

    def accuracies(self) -> dict[str, float]:
        """Accuracy by flat name, for the groups that occurred."""
        return {
            f"accuracy/{self.name}={self._label(group)}": right / scored
            for group, (scored, right) in enumerate(self.sums.tolist())
            if scored
        }

    def _label(self, group: int) -> str:
        edges = self.edges.tolist()
        first = edges[group - 1] + 1 if self.bucketed and group else edges[group]
        return str(first) if first == edges[group] else f"{first}-{edges[group]}"


def doubling_edges(largest: int) -> list[int]:
    """The upper ends of the ranges 1, 2, 3-4, 5-8, ... up to the one that holds `largest`."""
    return [2**power for power in range((largest - 1).bit_length() + 1)]


class TextMetrics(Metrics):
    """How many bits a model needs per byte of text.

    `compute` gives `loss` (nats per token), `perplexity` (per token: comparable only between
    models with the same tokenizer), `bits_per_byte` (comparable between any), `tokens` and
    `bytes`. The end-of-document token is charged for like any other and stands for no byte.

    Args:
        lossless: whether the bytes of tokens are those of the text. If not, `bits_per_byte` and
            `bytes` are left out.
    """

    def __init__(self, *, lossless: bool = True) -> None:
        self.lossless = lossless
        self.totals = torch.zeros(3, dtype=torch.float64)  # nll, tokens, bytes

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Counts one batch; `logits` is `[B, T, V]`, the slice `bytes` is `[B, T]`."""
        scores = score(logits, batch.targets)
        size = int(batch.slices["bytes"].cpu().reshape(-1)[scores.where].sum())
        sums = [float(scores.nll.sum()), len(scores.where), size]
        self.totals += torch.tensor(sums, dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """The metrics of everything counted so far, by flat name."""
        nll, tokens, size = self.totals.tolist()
        _require_tokens(tokens)
        metrics = {
            "loss": nll / tokens,
            "perplexity": torch.tensor(nll / tokens).exp().item(),  # inf, not an error, if large
            "bits_per_byte": nll / (math.log(2) * size) if size else math.inf,
            "tokens": tokens,
            "bytes": size,
        }
        withheld = () if self.lossless else ("bits_per_byte", "bytes")
        return {name: value for name, value in metrics.items() if name not in withheld}


def _require_tokens(tokens: float) -> None:
    if not tokens:
        raise ValueError("no scored target was counted, so there is nothing to average over")
