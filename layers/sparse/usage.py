"""How evenly layers use the rows of their tables: measured only while somebody asks.

    with metering() as meter:
        model(tokens)
    meter.by_layer(model)["blocks.1.parts.1.parts.0"].metrics()

All figures grow with the number of tokens read, so they are given with it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mneme.layers.parts.recorder import Slot
from mneme.layers.sparse.table import SharedTable, Table

SHARES = (50, 90, 99)  # percent of all weight, of which the rows that hold it are counted


class Usage:
    """What the reads of one layer came to, over N rows.

    Attributes:
        totals: `[3, N]` in float64: the absolute weight, the number of reads, and the number of
            reads as the best row of a head. Sums over batches and processes are sums of this.
        tokens: how many were read.
    """

    def __init__(self, totals: Float[Tensor, "3 n"], tokens: int) -> None:
        self.totals, self.tokens = totals, tokens

    @staticmethod
    def empty(rows: int) -> "Usage":
        """The usage of N rows that nobody has read."""
        return Usage(torch.zeros(3, rows, dtype=torch.float64), 0)

    def add(self, rows: Int[Tensor, "*t h k"], weights: Float[Tensor, "*t h k"]) -> None:
        """Counts the rows of some tokens, the best of each head first."""
        rows, weights = rows.detach().cpu(), weights.detach().cpu().double().abs()
        size = self.totals.shape[1]
        self.totals[0] += torch.bincount(rows.flatten(), weights.flatten(), minlength=size)
        self.totals[1] += torch.bincount(rows.flatten(), minlength=size)
        self.totals[2] += torch.bincount(rows[..., 0].flatten(), minlength=size)
        self.tokens += rows[..., 0, 0].numel()

    def metrics(self) -> dict[str, float]:
        """Figures of section 4.5 of arXiv 1907.05242, and others that show what those hide.

        Returns:
            `usage` and `usage_top1`, percent of rows with any weight, and of rows that were the
            best of a head; `kl` and `kl_reads`, nats by which the distribution of weight, and of
            reads, differs from even; `gini` of the weight; `rows_50`, `rows_90` and `rows_99`, how
            many rows hold that percentage of it; `tokens`. Rows all unused give zeros.
        """
        mass, reads, best = self.totals
        sorted_share = _shares(mass).sort(descending=True).values
        held = sorted_share.cumsum(0)
        return {
            "usage": _percent_used(mass),
            "usage_top1": _percent_used(best),
            "kl": _kl_from_even(mass),
            "kl_reads": _kl_from_even(reads),
            "gini": _gini(sorted_share),
            **{f"rows_{p}": _rows_that_hold(p / 100, held) for p in SHARES},
            "tokens": float(self.tokens),
        }

    def curve(self) -> Float[Tensor, " n"]:
        """Each row's share of the weight, the largest first."""
        return _shares(self.totals[0]).sort(descending=True).values


class UsageMeter:
    """The use of every layer that reported some.

    Attributes:
        counting: whether reads count; where not, a meter still notes which layers read, so that
            processes that are to add up their counts name the same layers.
    """

    def __init__(self) -> None:
        self.counting = True
        self._usage: dict[nn.Module, Usage] = {}

    def add(self, layer: nn.Module, rows: Tensor, weights: Tensor, size: int) -> None:
        """Counts the reads of one call."""
        usage = self._usage.setdefault(layer, Usage.empty(size))
        if self.counting:
            usage.add(rows, weights)

    def by_layer(self, model: nn.Module) -> dict[str, Usage]:
        """Name of the layer within `model` to its use."""
        return {n: self._usage[m] for n, m in model.named_modules() if m in self._usage}


def reads_tables(model: nn.Module) -> bool:
    """Whether a model has anything to meter: every layer with a table reports its reads."""
    return any(isinstance(module, Table | SharedTable) for module in model.modules())


def with_shared_tables(model: nn.Module, by_layer: Mapping[str, Usage]) -> dict[str, Usage]:
    """Adds the use of each shared table, `tables.NAME`: the sum over the layers that read it.

    Its tokens are those of the layer that read the most, as all of them usually read the same ones.
    A layer with several shared tables reads the same rows of each.
    Where layers cut the table's rows into values of several sizes, totals are of the largest pieces
    that no value cuts.
    """
    readers: dict[str, list[Usage]] = {}
    for layer, usage in by_layer.items():
        for part in model.get_submodule(layer).children():
            if isinstance(part, SharedTable):
                readers.setdefault(part.name, []).append(usage)
    return {**by_layer, **{name: _together(usages) for name, usages in readers.items()}}


def _together(usages: list[Usage]) -> Usage:
    sizes = [usage.totals.shape[1] for usage in usages]
    pieces = math.lcm(*sizes)
    totals = [
        usage.totals.repeat_interleave(pieces // size, 1)
        for usage, size in zip(usages, sizes, strict=True)
    ]
    return Usage(torch.stack(totals).sum(0), max(usage.tokens for usage in usages))


_meter: Slot[UsageMeter] = Slot("usage")


@contextmanager
def metering(meter: UsageMeter | None = None) -> Iterator[UsageMeter]:
    """Counts which rows are read inside the block, adding to a meter if one is given."""
    counting = UsageMeter() if meter is None else meter
    with _meter.holding(counting):
        yield counting


def observe_rows(layer: nn.Module, rows: Tensor, weights: Tensor, size: int) -> None:
    """Reports the rows, `[..., h, k]`, of N that a layer reads; nothing happens unless metered."""
    meter = _meter.get()
    if meter is not None:
        meter.add(layer, rows, weights, size)


def _shares(mass: Tensor) -> Tensor:
    total = mass.sum()
    return mass / total if total > 0 else mass


def _percent_used(mass: Tensor) -> float:
    return 100 * float((mass > 0).double().mean())


def _rows_that_hold(share: float, held: Tensor) -> float:
    """How many rows, the most used first, hold a share of the weight; `held` is its cumulation."""
    return float((held < share - 1e-9).sum() + 1) * bool(held[-1] > 0)


def _kl_from_even(mass: Tensor) -> float:
    """`log N + sum z log z` of the shares z, with 0 log 0 = 0."""
    share = _shares(mass)
    return float(math.log(len(share)) + torch.special.xlogy(share, share).sum()) * bool(mass.any())


def _gini(descending: Tensor) -> float:
    """Half the mean difference between two rows' shares, over their mean."""
    size = len(descending)
    rank = torch.arange(size, 0, -1, dtype=descending.dtype)  # of the ascending order
    total = float(descending.sum())
    return float((2 * rank - size - 1) @ descending) / size if total > 0 else 0.0
