"""How a sequence is cut at absolute positions: chunks as tiles, one row of tiles per memory.

Shapes: B batch, T time, H heads, D width, C chunk, N chunks, M = B * H memories.
"""

from torch import Tensor


def to_tiles(x: Tensor, chunks: int) -> Tensor:
    """`[B, N * C, H, D]` to contiguous tiles `[N, M, C, D]`."""
    return x.unflatten(1, (chunks, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def to_overlapping_tiles(x: Tensor, chunks: int, tail: int) -> Tensor:
    """`[B, tail + N * C, H, D]` to `[N, M, tail + C, D]`: each chunk after the tail before it."""
    if not tail:
        return to_tiles(x, chunks)
    step = (x.shape[1] - tail) // chunks
    return x.unfold(1, tail + step, step).permute(1, 0, 2, 4, 3).flatten(1, 2).contiguous()


def from_tiles(tiles: Tensor, batch: int) -> Tensor:
    """Tiles `[N, M, C, D]` to `[B, N * C, H, D]`."""
    return tiles.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def memories_of(x: Tensor, batch: int) -> Tensor:
    """One per head, `[H, ...]`, to one per memory, `[M, ...]`."""
    return x.expand(batch, *x.shape).flatten(0, 1)


def pieces(tokens: int, offset: int, chunk: int, most: int) -> list[tuple[int, int]]:
    """How to process T tokens of which the first stands at `offset` in its chunk.

    Args:
        tokens: T.
        offset: tokens of the first chunk that came before.
        chunk: C.
        most: tokens to process together, if that is a chunk or more.

    Returns:
        (number of chunks, tokens in each) of consecutive runs: the rest of a chunk that was begun,
        all whole chunks, and what is left over; runs of nothing are left out.
    """
    rest = min(tokens, -offset % chunk)
    whole, left = divmod(tokens - rest, chunk)
    together = max(1, most // chunk)
    groups = [(min(together, whole - i), chunk) for i in range(0, whole, together)]
    return [(n, c) for n, c in [(1, rest), *groups, (1, left)] if c]
