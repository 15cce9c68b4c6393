"""The decays of a sequence, cut into chunks.

Shapes: B batch, T time, H heads, C chunk, N chunks, M = B * H memories.
"""

import math
from typing import NamedTuple

from torch import Tensor

from mneme.ops.tiling import Tiling


class Decay(NamedTuple):
    """Decays in tiles [N * M, C, 1]: powers of 2, as exp is slow where it underflows."""

    log: Tensor  # G, inclusive sum of the base-2 log decays since the chunk's first token
    since: Tensor  # 2^G, decay from before the chunk to each token
    until: Tensor  # 2^(G_C - G), decay from each token to the chunk's end
    whole: Tensor  # 2^(G_C), [N * M, 1, 1]

    @classmethod
    def of(cls, g: Tensor, tiling: Tiling) -> "Decay":
        """Decays of all chunks, from g [B, T, H]."""
        log = tiling.tiles(g[..., None], tiling.all).mul_(math.log2(math.e)).cumsum(1)
        last = log[:, -1:]
        return cls(log, log.exp2(), (last - log).exp2(), last.exp2())

    def part(self, part: slice, memories: int) -> "Decay":
        """Decays of some chunks."""
        rows = slice(part.start * memories, part.stop * memories)
        return Decay(*(x[rows] for x in self))

    def between(self) -> Tensor:
        """Decays [N * M, C, C] from token j to token i, 2^(G_i - G_j); 0 above the diagonal."""
        side = self.log.shape[1]
        future = self.log.new_full((side, side), -math.inf).triu_(1)
        return (self.log - self.log.mT).add_(future).exp2_()

    def gradient(self, read: Tensor, passed: Tensor, carried: Tensor, pairs: Tensor) -> Tensor:
        """Gradient [N * M, C, 1] of g from the shares of the result that its decays scale.

        Every use of token i as a reader carries 2^(G_i), every use as a writer 2^(-G_i) or, in the
        state handed on, 2^(G_C - G_i). The sums below add only terms that g_t scales, so that
        nothing larger than the result cancels, however strong the decay.

        Args:
            read: Share of what each token reads from before the chunk, [N * M, C, 1].
            passed: Share of what each token leaves in the state handed on, [N * M, C, 1].
            carried: Share of what passes through the chunk, [N * M, 1, 1].
            pairs: Share of what each token reads of each token, [N * M, C, C]; its diagonal, which
                no decay scales, is set to zero here.
        """
        pairs.diagonal(0, -2, -1).zero_()
        through = read + pairs.sum(2, keepdim=True) - pairs.sum(1)[..., None]
        dg = through.flip(1).cumsum(1).flip(1)
        dg[:, 1:] += passed[:, :-1].cumsum(1)
        return dg.add_(carried)
