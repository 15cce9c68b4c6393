"""Reads of a large table, of which a token touches a few rows: weighted sums, and products."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mneme.ops.registry import Draw, Op, drawn
from mneme.ops.table_read.naive import dot_rows_naive, sum_rows_naive
from mneme.ops.table_read.read import dot_rows, sum_rows

__all__ = ["OP", "dot_rows", "dot_rows_naive", "sum_rows", "sum_rows_naive"]


@dataclass(frozen=True)
class Lookups:
    """Which rows are read; not a bare tensor, for only tensors of real numbers have gradients.

    Attributes:
        rows: of each token, `[B, T, m]`.
    """

    rows: Tensor


def _both_naive(
    table: Tensor, lookups: Lookups, weights: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    rows = lookups.rows
    return sum_rows_naive(table, rows, weights), dot_rows_naive(table, rows, x)


def _both(table: Tensor, lookups: Lookups, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = lookups.rows
    return sum_rows(table, rows, weights), dot_rows(table, rows, x)


@drawn()
def _inputs(
    draw: Draw,
    batch: int,
    length: int,
    regime: str,
    width: int = 256,
    lookups: int = 32,
    rows: int = 4096,
) -> dict[str, Any]:
    """Normal draws; "one_row" looks the same row up always, "all_unique" none of them twice."""
    shape = (batch, length, lookups)
    if regime == "one_row":
        index = torch.full(shape, rows // 2)
    elif regime == "all_unique":
        count = batch * length * lookups
        rows = max(rows, count)
        index = torch.randperm(rows, generator=draw.generator)[:count].view(shape)
    else:
        index = torch.randint(rows, shape, generator=draw.generator)
    return {
        "table": draw.normal(rows, width),
        "lookups": Lookups(index),
        "weights": draw.normal(*shape),
        "x": draw.normal(batch, length, width),
    }


def _flops(inputs: dict[str, Any]) -> float:
    """Operations of both reads: 4 m D a token."""
    return 4.0 * inputs["weights"].numel() * inputs["table"].shape[1]


OP = Op(
    name="table_read",
    naive=_both_naive,
    forms={"bags": _both},
    inputs=_inputs,
    regimes=("typical", "one_row", "all_unique"),
    odd_sizes={"width": 7, "lookups": 5, "rows": 37},
    flops=_flops,
    timed=("weights", "x"),
    stateful=False,
)
