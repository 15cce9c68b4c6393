"""Gradients of tables: sparse tensors `[N, D]` of the U rows that were touched."""

import torch
from torch import Tensor


def row_gradient(gradient: Tensor) -> Tensor:
    """The gradient of a table as a coalesced sparse tensor of the rows that were touched.

    A dense gradient does not say which rows were read: its rows that are all zero count as
    untouched. The update is then that of the sparse gradient, but for rows that were read and
    have a gradient of exactly zero.
    """
    if gradient.is_sparse:
        return coalesced(gradient)
    rows = gradient.ne(0).any(1).nonzero()[:, 0]
    return sparse_rows(rows, gradient[rows], gradient.shape, is_coalesced=True)


def sparse_rows(rows: Tensor, values: Tensor, shape: torch.Size, *, is_coalesced: bool) -> Tensor:
    """The sparse tensor `[N, D]` of some rows `[U]` with values `[U, D]`."""
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=is_coalesced, check_invariants=False
    )


def coalesced(gradient: Tensor) -> Tensor:
    """The same sparse gradient with each row once, in order.

    `backward` forgets that a leaf's gradient is so already, and sorting and copying it again would
    be a quarter of a training step.
    """
    rows = gradient._indices()[0]
    if not gradient.is_coalesced() and bool((rows[1:] > rows[:-1]).all()):
        return sparse_rows(rows, gradient._values(), gradient.shape, is_coalesced=True)
    return gradient.coalesce()
