"""Inner products within a chunk that decay channel by channel, by joining blocks in pairs.

Where token i reads what token j wrote, the sum over channels of q_i k_j has a factor per channel,
the decay from j to i. Blocks of 1, 2, 4, ... tokens are joined in pairs. Every token of the later
block meets every token of the earlier one at the boundary between them: its decay is what is left
of the key at the boundary times what is left of the boundary at the query. Both factors are at most
1, and with them the pair is a product of two matrices, however strong the decay. The factors are
products of decays that grow with the blocks, so that no difference of logarithms is needed. After
the last level they reach to the end of the chunk, and back to its start.

Tokens are the outermost axis: a block of all chunks lies together, and arithmetic on it runs over
long rows, however narrow a key is. Buffers, and the views of them that levels work on, are made
once and used for every segment of a sequence: a view costs as much as arithmetic on a tile, and
fresh memory several times more.

Shapes: R chunks of all memories, C tokens a chunk, K key width, W tokens a block, P = C / 2W pairs
of blocks in a chunk.
"""

import torch
from torch import Tensor

_ELEMENTWISE = 2  # tokens a block up to which multiplying and adding beats products so small


def _blocks(scores: Tensor, width: int) -> Tensor:
    """View [R, P, W, W] of scores [R, C, C]: rows of later blocks, columns of earlier."""
    rows, chunk, _ = scores.shape
    count = chunk // (2 * width)
    blocks = scores.view(rows, count, 2, width, count, 2, width)[:, :, 1, :, :, 0]
    return blocks.diagonal(0, 1, 3).permute(0, 3, 1, 2)


class _Level:
    """Joins blocks of W tokens; views and buffers for it.

    Attributes:
        width: W.
        keys: Keys of the earlier blocks [P, W, R, K], in the ladder's `x`.
        queries: Queries of the later blocks, there.
        found: Copies of both as this level found them; without a backward pass, they themselves.
        earlier: Decay of the whole of each earlier block [P, 1, R, K].
        later: Decay of the whole of each later block.
        joined: Decay of both.
        products: Buffer for inner products, with a view of it as [R, P, W, W].
    """

    def __init__(self, ladder: "Ladder", whole: Tensor, width: int) -> None:
        chunk, rows, key = ladder.decay.shape
        count = chunk // (2 * width)
        self.width, self.buffer = width, ladder.terms
        halves = ladder.x.view(2, count, 2, width, rows, key)
        self.keys, self.queries = halves[0, :, 0], halves[1, :, 1]
        self.found = self.keys, self.queries
        if ladder.keep:
            kept, other = ladder.x.new_empty(2, count, width, rows, key)
            self.found = kept, other
        self.earlier, self.later = whole.view(count, 2, 1, rows, key).unbind(1)
        self.joined = ladder.x.new_empty(count, 1, rows, key)
        products = ladder.products[: count * width * width * rows]
        if width > _ELEMENTWISE:
            self.products = products.view(count, rows, width, width)
            self.as_blocks = self.products.transpose(0, 1)
        else:
            self.products = products.view(count, width, width, rows)
            self.as_blocks = self.products.permute(3, 0, 1, 2)

    def write(self, scores: Tensor) -> None:
        """Write the inner products of this level's queries with its keys."""
        if self.width > _ELEMENTWISE:
            for queries, keys, out in zip(self.queries, self.keys, self.products, strict=True):
                torch.bmm(queries.transpose(0, 1), keys.permute(1, 2, 0), out=out)
        else:
            count, width, rows, key = self.keys.shape
            terms = self.buffer[: count * width * width * rows * key]
            terms = terms.view(count, width, width, rows, key)
            torch.mul(self.queries[:, :, None], self.keys[:, None], out=terms)
            torch.sum(terms, -1, out=self.products)
        _blocks(scores, self.width).copy_(self.as_blocks)

    def join(self) -> None:
        """Take this level's keys and queries to the next boundary."""
        if self.found[0] is not self.keys:
            self.found[0].copy_(self.keys)
            self.found[1].copy_(self.queries)
        self.keys.mul_(self.later)
        self.queries.mul_(self.earlier)
        torch.mul(self.earlier, self.later, out=self.joined)


class Ladder:
    """Decayed inner products of queries with keys of earlier tokens in their chunk.

    Attributes:
        decay: Decay of each token [C, R, K]; to be written before `climb`.
        x: Keys, and queries times their own token's decay [2, C, R, K]; to be written before
            `climb`, which leaves keys decayed to the end of the chunk and queries decayed since
            its start.
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
        self.decay = like.new_empty(chunk, rows, key)
        self.x = like.new_empty(2, chunk, rows, key)
        self.products = like.new_empty(rows * chunk * chunk // 4)
        self.terms = like.new_empty(rows * chunk * key)
        self.levels: list[_Level] = []
        whole = self.decay
        for exponent in range(chunk.bit_length() - 1):
            self.levels.append(_Level(self, whole, 2**exponent))
            whole = self.levels[-1].joined
        self.whole = whole.view(rows, key)

    def climb(self, scores: Tensor | None) -> None:
        """Join single tokens, then pairs, then fours, up to the whole chunk.

        Args:
            scores: Where inner products go [R, C, C], below the diagonal; None if nowhere.
        """
        for level in self.levels:
            if scores is not None:
                level.write(scores)
            level.join()


class _LevelGradient:
    """The backward pass of one level; gradients of keys and queries take their place.

    Gradients of decays are those of their logarithms.
    """

    def __init__(self, descent: "Descent", level: _Level, dlog: Tensor) -> None:
        count, width, rows, key = level.keys.shape
        self.level = level
        self.dearlier, self.dlater = dlog.view(count, 2, 1, rows, key).unbind(1)
        self.djoined = dlog.new_empty(count, 1, rows, key)
        self.terms = level.buffer[: count * width * rows * key].view(level.keys.shape)
        self.total = self.terms if width == 1 else dlog.new_empty(count, 1, rows, key)
        self.blocks = _blocks(descent.dscores, width)
        if width > _ELEMENTWISE:
            self.dproduct = descent.products[: self.terms.numel()].view(count, rows, width, key)

    def _decay_gradient(self, found: Tensor, grad: Tensor, decay: Tensor, out: Tensor) -> None:
        """Of the logarithm of one block's decay: through the other block's keys or queries."""
        torch.mul(found, grad, out=self.terms)
        if self.level.width > 1:
            torch.sum(self.terms, 1, keepdim=True, out=self.total)
        torch.addcmul(self.djoined, self.total, decay, out=out)

    def _operand_gradient(
        self, grad: Tensor, decay: Tensor, products: Tensor, other: Tensor
    ) -> None:
        """Of keys or queries, from that after the join, in its place.

        Args:
            grad: [P, W, R, K].
            decay: Factor of the join [P, 1, R, K].
            products: Gradient of the inner products, the operand's own axis first.
            other: The other operand, as it was found [P, W, R, K].
        """
        if self.level.width > _ELEMENTWISE:
            for of_products, tokens, out in zip(products, other, self.dproduct, strict=True):
                torch.bmm(of_products, tokens.transpose(0, 1), out=out)
            torch.addcmul(self.dproduct.transpose(1, 2), grad, decay, out=grad)
            return
        grad.mul_(decay)
        for weights, tokens in zip(products.unbind(2), other.split(1, 1), strict=True):
            grad.addcmul_(weights[..., None], tokens)

    def part(self) -> None:
        """From gradients of what this level's `join` left to those of what it found."""
        level = self.level
        keys, queries = level.found
        self._decay_gradient(keys, level.keys, level.later, self.dlater)
        self._decay_gradient(queries, level.queries, level.earlier, self.dearlier)
        level.as_blocks.copy_(self.blocks)
        d = level.products
        transposed = d.mT if level.width > _ELEMENTWISE else d.transpose(1, 2)
        self._operand_gradient(level.keys, level.later, transposed, queries)
        self._operand_gradient(level.queries, level.earlier, d, keys)


class Descent:
    """The backward pass of a `Ladder` that has been climbed.

    Attributes:
        dx: Gradient of the ladder's `x` [2, C, R, K], in the same memory: that of `x` as it was
            left is to be written once `x` is not needed any more, and `descend` leaves that of
            `x` as it was given.
        dscores: Gradient of the scores [R, C, C], to be written; only what is below the diagonal
            is read.
        dwhole: Gradient of the logarithm of `whole` [R, K], to be written.
        dlog: Gradient of the logarithm of each token's decay [C, R, K], without its part in the
            queries given. Every term of its sums is one that this decay scales, so that none
            cancels another.
    """

    def __init__(self, ladder: Ladder) -> None:
        self.dx = ladder.x
        chunk, rows, _ = ladder.decay.shape
        self.dscores = ladder.decay.new_empty(rows, chunk, chunk)
        self.products = ladder.terms.new_empty(ladder.terms.numel() // 2)
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
