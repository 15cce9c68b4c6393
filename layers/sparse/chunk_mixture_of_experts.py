"""Experts chosen for a chunk of tokens at a time, by what the chunk before it was like."""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.protocol import Layer, LayerFactory, Output, require_at_least
from mneme.layers.registry import register
from mneme.layers.sparse.block_ffn import BlockFFN
from mneme.layers.sparse.mixture_of_experts import MixtureOfExperts


class ChunkState(NamedTuple):
    """What is known of the chunks so far.

    Attributes:
        mean: `[B, D]`, of the last complete chunk; the learned start before the first is complete.
        total: `[B, D]`, sum over the tokens of the current chunk.
        place: `[B]`, number of them.
    """

    mean: Tensor
    total: Tensor
    place: Tensor


@register(
    default={"mixture": partial(MixtureOfExperts, experts=4, expand=1), "chunk": 4},
    relu={"mixture": partial(BlockFFN, experts=6, expert_dim=4), "chunk": 3},
    each_token={"mixture": partial(MixtureOfExperts, experts=3, expand=1), "chunk": 1},
)
class ChunkMixtureOfExperts(Layer):
    """A mixture of experts whose router sees one vector for a whole chunk, as in Hydra's proposal.

    All tokens of chunk c go to the same experts, with the same weights:

        seen_c = mean of the inputs of chunk c - 1,    y_t = mixture(x_t) routed by W_r seen_{c(t)}

    so that few experts are in use at a time. For chunk 0, seen is a learned vector.

    Args:
        d_model: width D.
        mixture: layer factory of the experts and their router: `MixtureOfExperts` or `BlockFFN`.
        chunk: tokens of a chunk; default 32.

    State: 2 D + 1 scalars.

    Where we differ: "Hydra" (arXiv 2508.15099) routes a chunk by its own mean, which tells each of
    its tokens of those that follow. The chunk before is as close as a causal layer can come.

    Raises:
        ValueError: a mixture that is neither.
    """

    def __init__(self, d_model: int, *, mixture: LayerFactory, chunk: int = 32) -> None:
        super().__init__()
        require_at_least(1, chunk=chunk)
        experts = mixture(d_model)
        if not isinstance(experts, MixtureOfExperts | BlockFFN):
            raise ValueError(
                "mixture must be MixtureOfExperts or BlockFFN; "
                f"{type(experts).__name__} has no router"
            )
        self.mixture, self.chunk = experts, chunk
        self.start = nn.Parameter(torch.randn(d_model) * chunk**-0.5)  # as a mean of normal tokens

    def forward(self, x: Float[Tensor, "b t d"], state: ChunkState | None = None) -> Output:
        """Transforms each position by the experts of its chunk."""
        state = self.init_state(len(x)) if state is None else state
        places = state.place[:, None] + torch.arange(x.shape[1], device=x.device)
        chunk = places // self.chunk  # of each token, the current one being 0
        more = (self.chunk - 1 + x.shape[1]) // self.chunk  # chunks that may begin
        empty = state.total.new_zeros(len(x), more, x.shape[-1])
        totals = torch.cat([state.total[:, None], empty], 1)
        totals = totals.scatter_add(1, _rows(chunk, x), x.to(totals.dtype))
        means = torch.cat([state.mean[:, None], totals[:, :-1] / self.chunk], 1)  # chunks before
        y, _, aux = self.mixture.routed(x, means.gather(1, _rows(chunk, x)))
        end = state.place + x.shape[1]
        last = _rows((end // self.chunk)[:, None], x)
        mean, total = (t.gather(1, last)[:, 0] for t in (means, totals))
        return Output(y, ChunkState(mean, total, end % self.chunk), aux)

    def init_state(self, batch_size: int) -> ChunkState:
        """Nothing seen: the learned start."""
        mean = at_least_fp32(self.start).expand(batch_size, -1)
        place = torch.zeros(batch_size, dtype=torch.long, device=mean.device)
        return ChunkState(mean, torch.zeros_like(mean), place)

    def state_size(self, seq_len: int) -> int:
        """Two vectors and a place, whatever the length."""
        return 2 * len(self.start) + 1


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """An index `[B, N]` of chunks, for vectors as wide as those of `x`."""
    return index[..., None].expand(-1, -1, x.shape[-1])
