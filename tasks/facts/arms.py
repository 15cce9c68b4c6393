"""Metrics of the same facts, asked for under several routes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mneme.tasks.batch import IGNORE, Batch
from mneme.tasks.facts.metrics import Exposures, FactMetrics
from mneme.tasks.metrics import Metrics


class ArmMetrics(Metrics):
    """`FactMetrics` of each arm of an evaluation, which asks the same facts under another route.

    `compute` gives all metrics of the first arm under their own names, `accuracy` among them, and
    of every arm

    - `accuracy/arm=question` and `loss/arm=question`,
    - `accuracy/arm=question/exposures=10` over the facts told 10 to 99 times, and so for 0, 1, ...

    Args:
        exposures: how often training tells the facts.
        objects: the O tokens that stand for objects.
        arms: names; the slice `arm` holds indices of them.
    """

    def __init__(self, exposures: Exposures, objects: range, arms: Iterable[str]) -> None:
        self.arms = {arm: FactMetrics(exposures, objects) for arm in arms}

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Counts one batch; `logits` is `[B, T, V]`, the slices `fact` and `arm` are `[B]`."""
        arm_of = batch.slices["arm"].to(batch.targets.device)[:, None]
        for arm, metrics in enumerate(self.arms.values()):
            targets = batch.targets.where(arm_of == arm, IGNORE)
            metrics.update(logits, batch._replace(targets=targets))

    def compute(self) -> dict[str, float]:
        """The metrics of everything counted so far, by flat name."""
        by_arm = {arm: metrics.compute() for arm, metrics in self.arms.items()}
        found = dict(next(iter(by_arm.values())))
        for arm, values in by_arm.items():
            for name, value in values.items():
                kind, slash, group = name.partition("/")
                if kind in ("accuracy", "loss"):
                    found[f"{kind}/arm={arm}{slash}{group}"] = value
        return found

    def state(self) -> Tensor:
        """A copy of the sums: one float64 vector, laid out alike on every rank."""
        return torch.cat([metrics.state() for metrics in self.arms.values()])

    def load_sum(self, total: Tensor) -> None:
        """Replaces the sums, by those of all ranks for example."""
        for metrics, part in zip(self.arms.values(), total.chunk(len(self.arms)), strict=True):
            metrics.load_sum(part)
