"""Inverse of a stack of unit lower triangular matrices, by blocks.

A library's triangular solve goes through the stack one matrix at a time on a CPU; here every step
is a product over the whole stack. Blocks of 4 are inverted by their power series, which ends at
N^3, then pairs of blocks are joined:

    [[A, 0], [-B, D]]^-1 = [[A^-1, 0], [D^-1 B A^-1, D^-1]].

The series is not used beyond 4 x 4: its terms grow like binomial coefficients when keys repeat,
and cancel only in exact arithmetic.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mneme.ops.contract import kept

_LEAF = 4  # side of the blocks inverted by power series
_BLOCK = 16  # joins up to this side are masked products of whole blocks: smaller ones are slow


@kept
def _level_masks(dtype: torch.dtype, device: torch.device, side: int) -> tuple[Tensor, ...]:
    """Masks [side, side] of the leaves' strict lower parts, then of what each join brings in."""
    row, column = torch.arange(side, device=device)[:, None], torch.arange(side, device=device)
    masks, done = [], row <= column
    width = _LEAF
    while width <= side:
        inside = row // width == column // width
        masks.append((inside & ~done).to(dtype))
        done = done | inside
        width *= 2
    return tuple(masks)


def _diagonal(x: Tensor, side: int) -> Tensor:
    """View [M, C / side, side, side] of the diagonal blocks of x [M, C, C]."""
    count = x.shape[-1] // side
    return x.view(-1, count, side, count, side).diagonal(0, 1, 3).movedim(-1, 1)


def _invert_blocks(n: Tensor) -> Tensor:
    """(I - N)^-1 for small blocks, N the part of n [M, c, c] below its diagonal."""
    leaves, *joins = _level_masks(n.dtype, n.device, n.shape[-1])
    leaf = n * leaves
    x = torch.bmm(leaf, leaf)
    x.diagonal(0, -2, -1).add_(1)
    x = torch.baddbmm(x, leaf, x)  # (I + N)(I + N^2), where N^4 = 0
    for join in joins:
        x = torch.baddbmm(x, torch.bmm(x, n * join), x)
    return x


def inverse_of_one_minus(n: Float[Tensor, "M C C"]) -> Float[Tensor, "M C C"]:
    """Compute (I - N)^-1 where N is the part of `n` strictly below its diagonal.

    Entries on and above the diagonal of `n` have no influence, provided they are finite.

    Args:
        n: Stack of square matrices whose side is a power of two, at least 4.

    Returns:
        Stack of unit lower triangular matrices.
    """
    side = n.shape[-1]
    block = min(_BLOCK, side)
    x = n.new_zeros(n.shape)
    leaves = _diagonal(n, block).flatten(0, 1)
    diagonal = _diagonal(x, block)
    diagonal.copy_(_invert_blocks(leaves).view(diagonal.shape))
    while block < side:
        for start in range(0, side, 2 * block):
            top, low = slice(start, start + block), slice(start + block, start + 2 * block)
            joint = torch.bmm(x[:, low, low], n[:, low, top])
            x[:, low, top] = torch.bmm(joint, x[:, top, top])
        block *= 2
    return x
