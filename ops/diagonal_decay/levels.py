"""Inner products within a chunk that decay channel by channel, by joining blocks in pairs.

Where token i reads what token j wrote, the sum over channels of q_i k_j has a factor per channel,
the decay from j to i. Blocks of 1, 2, 4, ... tokens are joined in pairs. Every token of the later
block meets every token of the earlier one at the boundary between them: its decay is what is left
of the key at the boundary times what is left of the boundary at the query. Both factors are at most
1, and with them the pair is a product of two matrices, however strong the decay. The factors are
products of decays that grow with the blocks, so that no difference of logarithms is needed. After
the last level they reach to the end of the chunk, and back to its start.

Buffers, and the views of them that levels work on, are made once and used for every segment of a
sequence: a view costs as much as arithmetic on a tile, and fresh memory several times more.

Shapes: R chunks of all memories, C tokens a chunk, K key width, W tokens a block, P = R C / 2W
pairs of blocks.
"""

import torch
from torch import Tensor

# Tokens a block. Up to here multiplying and adding beats the overhead of products so small, ...
_ELEMENTWISE = 2
_ADDED = 4  # ... and adding rows one by one beats a sum over them.


def _pairs(x: Tensor, width: int) -> Tensor:
    """View [P, 2, W, K] of x [2, R, C, K]: x[0] in earlier blocks, x[1] in the later ones."""
    pairs = x.view(2, -1, 2, width, x.shape[-1])
    return pairs.diagonal(0, 0, 2).permute(0, 3, 1, 2)


def _blocks(scores: Tensor, width: int) -> Tensor:
    """View [R, C / 2W, W, W] of scores [R, C, C]: rows of later blocks, columns of earlier."""
    rows, chunk, _ = scores.shape
    count = chunk // (2 * width)
    blocks = scores.view(rows, count, 2, width, count, 2, width)[:, :, 1, :, :, 0]
    return blocks.diagonal(0, 1, 3).permute(0, 3, 1, 2)


class _Level:
    """Joins blocks of W tokens; views and buffers for it.

    Attributes:
        width: W.
        pairs: Keys of earlier blocks and queries of later ones [P, 2, W, K], in the ladder's `x`.
        keys: The first of them.
        queries: The second.
        kept: Copy of the pairs as this level found them; without a backward pass, the pairs.
        earlier: Decay of the whole of each earlier block [P, 1, K].
        later: Decay of the whole of each later block.
        joined: Decay of both.
        blocks: Where the inner products go, in the ladder's `scores`.
        products: Buffer for them [P, W, W], which `products_as_blocks` views like `blocks`.
        terms: Buffer [P, 2, W, K].
    """

    def __init__(self, ladder: "Ladder", whole: Tensor, width: int) -> None:
        rows, chunk, key = ladder.decay.shape
        count = rows * chunk // (2 * width)
        self.width = width
        self.pairs = _pairs(ladder.x, width)
        self.keys, self.queries = self.pairs.unbind(1)
        self.kept = ladder.x.new_empty(count, 2, width, key) if ladder.keep else self.pairs
        self.earlier, self.later = whole.view(count, 2, key).split(1, 1)
        self.joined = ladder.x.new_empty(count, 1, key)
        self.blocks = _blocks(ladder.scores, width)
        self.products = ladder.products[: self.blocks.numel()].view(count, width, width)
        self.products_as_blocks = self.products.view(self.blocks.shape)
        self.terms = ladder.terms[: count * 2 * width * key].view(count, 2, width, key)

    def join(self) -> None:
        """Write the products of this level, and take its keys and queries to the next boundary."""
        if self.kept is not self.pairs:
            self.kept.copy_(self.pairs)
        keys, queries = self.kept.unbind(1)
        if self.width > _ELEMENTWISE:
            torch.bmm(queries, keys.mT, out=self.products)
        else:
            torch.sum(queries[:, :, None] * keys[:, None], -1, out=self.products)
        self.blocks.copy_(self.products_as_blocks)
        self.keys.mul_(self.later)
        self.queries.mul_(self.earlier)
        torch.mul(self.earlier, self.later, out=self.joined)


class Ladder:
    """Decayed inner products of queries with keys of earlier tokens in their chunk.

    Attributes:
        decay: Decay of each token [R, C, K]; to be written before `climb`.
        x: Keys, and queries times their own token's decay [2, R, C, K]; to be written before
            `climb`, which leaves keys decayed to the end of the chunk and queries decayed since
            its start.
        scores: Inner products [R, C, C]; `climb` writes what is below the diagonal, and nothing
            is ever written above it, where it is 0.
        whole: Decay of the whole chunk [R, K], written by `climb`.
    """

    def __init__(self, like: Tensor, rows: int, chunk: int, key: int, *, keep: bool) -> None:
        """Memory for R chunks, of the dtype and on the device of `like`.

        Args:
            like: Any tensor of that dtype on that device.
            rows: R.
            chunk: C, a power of two.
            key: K.
            keep: Whether to keep what a `Descent` needs.
        """
        self.keep = keep
        self.decay = like.new_empty(rows, chunk, key)
        self.x = like.new_empty(2, rows, chunk, key)
        self.scores = like.new_zeros(rows, chunk, chunk)
        self.products = like.new_empty(rows * chunk * chunk // 4)
        self.terms = like.new_empty(rows * chunk * key)
        self.levels: list[_Level] = []
        whole = self.decay
        for exponent in range(chunk.bit_length() - 1):
            self.levels.append(_Level(self, whole, 2**exponent))
            whole = self.levels[-1].joined
        self.whole = whole.view(rows, key)

    def climb(self) -> None:
        """Join single tokens, then pairs, then fours, up to the whole chunk."""
        for level in self.levels:
            level.join()


class _LevelGradient:
    """The backward pass of one level; gradients of keys and queries take their place.

    Gradients of decays are those of their logarithms.
    """

    def __init__(self, descent: "Descent", level: _Level, dlog: Tensor) -> None:
        count, _, width, key = level.kept.shape
        self.level = level
        self.blocks = _blocks(descent.dscores, width)
        self.dearlier, self.dlater = dlog.view(count, 2, key).split(1, 1)
        self.djoined = dlog.new_empty(count, 1, key)
        self.dkeys, self.dqueries = descent.products.view(2, count, width, key)

    def _passed(self) -> tuple[Tensor, Tensor]:
        """Shares of the result that passed all of the later block, and all of the earlier one.

        Both [P, 1, K], before that block's decay.
        """
        terms = torch.mul(self.level.kept, self.level.pairs, out=self.level.terms)
        if self.level.width > _ADDED:
            total = terms.sum(2, keepdim=True)
        else:
            total, *rows = terms.split(1, 2)
            for row in rows:
                total.add_(row)
        return total[:, 0], total[:, 1]

    def _write_product_gradients(self) -> None:
        """Gradients of the level's keys and queries from that of their inner products."""
        d, dkeys, dqueries = self.level.products, self.dkeys, self.dqueries
        keys, queries = self.level.kept.unbind(1)
        if self.level.width > _ELEMENTWISE:
            torch.bmm(d.mT, queries, out=dkeys)
            torch.bmm(d, keys, out=dqueries)
            return
        torch.mul(d.mT[..., :1], queries[:, :1], out=dkeys)
        torch.mul(d[..., :1], keys[:, :1], out=dqueries)
        for row in range(1, self.level.width):
            dkeys.addcmul_(d.mT[..., row : row + 1], queries[:, row : row + 1])
            dqueries.addcmul_(d[..., row : row + 1], keys[:, row : row + 1])

    def part(self) -> None:
        """From gradients of what this level's `join` left to those of what it found."""
        level = self.level
        later, earlier = self._passed()
        torch.addcmul(self.djoined, earlier, level.earlier, out=self.dearlier)
        torch.addcmul(self.djoined, later, level.later, out=self.dlater)
        level.products_as_blocks.copy_(self.blocks)
        self._write_product_gradients()
        torch.addcmul(self.dkeys, level.keys, level.later, out=level.keys)
        torch.addcmul(self.dqueries, level.queries, level.earlier, out=level.queries)


class Descent:
    """The backward pass of a `Ladder` that has been climbed.

    Attributes:
        dx: Gradient of the ladder's `x` [2, R, C, K], in the same memory: that of `x` as it was
            left is to be written once `x` is not needed any more, and `descend` leaves that of
            `x` as it was given.
        dscores: Gradient of the scores [R, C, C], to be written; only what is below the diagonal
            is read.
        dwhole: Gradient of the logarithm of `whole` [R, K], to be written.
        dlog: Gradient of the logarithm of each token's decay [R, C, K], without its part in the
            queries given. Every term of its sums is one that this decay scales, so that none
            cancels another.
    """

    def __init__(self, ladder: Ladder) -> None:
        self.dx = ladder.x
        self.dscores = torch.empty_like(ladder.scores)
        self.products = torch.empty_like(ladder.terms)
        self.dlog = torch.empty_like(ladder.decay)
        self.levels: list[_LevelGradient] = []
        dlog = self.dlog
        for level in ladder.levels:
            self.levels.append(_LevelGradient(self, level, dlog))
            dlog = self.levels[-1].djoined
        self.dwhole = dlog.view(ladder.whole.shape)

    def descend(self) -> None:
        """Part the chunk into halves, then quarters, down to single tokens."""
        for level in reversed(self.levels):
            level.part()
