"""Which rows of a large table a token reads, found by Tucker-decomposed keys.

B batch, T time, h heads, n sub-keys of a side, r rank, K query width, c cores, k slots of a head.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.protocol import require_at_least
from mneme.layers.sparse.product_keys import half_width
from mneme.ops.contract import without_autocast
from mneme.ops.tucker import Leading, leading_vectors, tail_penalty, tucker_topk


@dataclass(frozen=True)
class TuckerScores:
    """How pairs of row and column keys are scored.

    Args:
        rank: r, scores of a query with each key; default 2.
        cores: c; each scores one of c equal slices of a value, and their sum selects; default 1.
        side_k: most rows, and most columns, of which all pairs are scored; default 128.
        query_per_head: heads make queries of their own; default False.
        query_per_rank: each of the r scores has a query of its own; default False.
        tail_loss: factor alpha of the loss on singular values of the cores' sum but the first, on
            which selection relies; default 0.
        tail_threshold: tau, up to which they cost nothing; default 0.15.
        balance_loss: factor beta of the loss on row and column keys in uneven use; default 0.
    """

    rank: int = 2
    cores: int = 1
    side_k: int = 128
    query_per_head: bool = False
    query_per_rank: bool = False
    tail_loss: float = 0.0
    tail_threshold: float = 0.15
    balance_loss: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for options out of range."""
        require_at_least(1, rank=self.rank, cores=self.cores, side_k=self.side_k)
        require_at_least(0, tail_loss=self.tail_loss, balance_loss=self.balance_loss)


class SelectedSlots(NamedTuple):
    """What each token and head reads, the largest sum of scores first.

    Attributes:
        scores: of each core, `[B, T, h, c, k]`, in fp32 or more.
        rows: of the table, `[B, T, h, k]`.
        groups: the virtual table of each, `[B, T, h, k]`.
        losses: of the call, by name.
    """

    scores: Float[Tensor, "b t h c k"]
    rows: Int[Tensor, "b t h k"]
    groups: Int[Tensor, "b t h k"]
    losses: dict[str, Tensor]


class TuckerKeys(nn.Module):
    """The k of E n^2 slots with the largest Tucker scores, for each of h heads.

    With queries and keys normalized over their width, by LayerNorm with a learned scale,

        rows[i, a] = K_row[i, a] . q_row,   columns[j, a] = K_column[j, a] . q_column,
        score(i, j) = rows[i] C columns[j]^T,   C = C_1 + ... + C_c,   i, j < sqrt(E) n.

    `mneme.ops.tucker` says how the best of them are found by the leading singular vectors of C. In
    training each call takes these from the cores as they are, without gradient and signed like
    those before, and leaves them in the buffer `leading`, which is part of a checkpoint; in
    evaluation the buffer is used as it is, in bf16 if the layer was cast to that.
    `VirtualSlots` says which row a slot is.

    Args:
        d_model: width D of what queries are made of.
        heads: h; each has keys of its own, and all have the same cores.
        top_k: k.
        sub_keys: n; the table has n^2 rows.
        expansion: E, a square.
        key_dim: width of a query, both halves, even.
        scoring: the rest.

    Initialization: queries N(0, 2 / key_dim), keys likewise; cores uniform in (0, 1), scaled so
    that the leading singular value of their sum is c; the scales of both norms are equal, and such
    that the scores that are selected have mean square 1. At UltraMem's sizes (arXiv 2411.12364) the
    last two rules give what its code has at all sizes: cores that need little scaling for r = 2,
    and norms of (key_dim / 2)^-0.33.
    """

    leading: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        top_k: int,
        sub_keys: int,
        expansion: int,
        key_dim: int,
        scoring: TuckerScores,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads, top_k=top_k, sub_keys=sub_keys)
        half = half_width(key_dim)
        self.heads, self.top_k, self.scoring = heads, top_k, scoring
        self.side = sub_keys * _root(expansion)
        survivors = min(top_k, self.side, scoring.side_k)
        if top_k > survivors**2:
            raise ValueError(
                f"top_k ({top_k}) must be at most {survivors**2}, the pairs of the {survivors} "
                f"rows and columns that survive: the least of top_k, {self.side} sub-keys of a "
                f"side, and side_k ({scoring.side_k})"
            )
        self.slots = VirtualSlots(sub_keys**2, expansion)
        rank = scoring.rank
        self.queries = heads if scoring.query_per_head else 1, rank if scoring.query_per_rank else 1
        self.query_proj = nn.Linear(d_model, prod(self.queries) * key_dim, bias=False)
        self.keys = nn.Parameter(torch.randn(heads, 2, rank, self.side, half) * half**-0.5)
        self.query_norm = nn.LayerNorm(half, bias=False)
        self.key_norm = nn.LayerNorm(half, bias=False)
        self.cores = nn.Parameter(_even_cores(scoring.cores, rank))
        self.register_buffer("leading", torch.stack(leading_vectors(self.cores.sum(0))))
        nn.init.normal_(self.query_proj.weight, std=half**-0.5)
        size = selected_size(self.side, top_k, scoring.side_k)
        for norm in (self.query_norm, self.key_norm):
            nn.init.constant_(norm.weight, (half * size) ** -0.25)

    def forward(self, x: Float[Tensor, "b t d"]) -> SelectedSlots:
        """The rows of each token, under autocast those of the same tokens without it."""
        rows, columns = _scores(x, self)
        leading = self._leading()
        scores, slots = tucker_topk(
            rows, columns, self.cores, self.top_k, leading=leading, side_k=self.scoring.side_k
        )
        losses = _losses(rows, columns, leading, slots, self)
        by_token, slots = (t.unflatten(1, x.shape[:2]).movedim(0, 2) for t in (scores, slots))
        table_rows, groups = self.slots(slots)
        return SelectedSlots(by_token, table_rows, groups, losses)

    def _leading(self) -> Leading:
        saved = Leading(*self.leading.clone().unbind(0))
        if not self.training:
            return saved
        fresh = leading_vectors(self.cores.detach().sum(0), saved)
        with torch.no_grad():
            self.leading.copy_(torch.stack(fresh))
        return fresh


@without_autocast
def _scores(
    x: Float[Tensor, "b t d"], to: TuckerKeys
) -> tuple[Float[Tensor, "h n s r"], Float[Tensor, "h n s r"]]:
    """All r scores of n tokens with the row and column keys of a side.

    One query may serve all heads and ranks. In bf16 some of the best scores would be ties.
    """
    heads, ranks = to.queries
    query = to.query_proj(x.to(to.keys.dtype))
    query = rearrange(query, "b t (h s r k) -> h s r (b t) k", h=heads, s=2, r=ranks)
    query, keys = to.query_norm(query), to.key_norm(to.keys)
    scores = at_least_fp32(query) @ at_least_fp32(keys).mT
    rows, columns = scores.movedim(2, -1).unbind(1)
    return rows, columns


@without_autocast
def _losses(
    rows: Tensor, columns: Tensor, leading: Leading, slots: Tensor, of: TuckerKeys
) -> dict[str, Tensor]:
    """The losses that are on, in at least fp32; that on the cores' tail is the same for any x."""
    options = of.scoring
    losses: dict[str, Tensor] = {}
    if options.tail_loss > 0 and options.rank > 1:
        penalty = tail_penalty(at_least_fp32(of.cores).sum(0), options.tail_threshold)
        losses["loss_tail"] = options.tail_loss * penalty
    if options.balance_loss > 0:
        chosen = slots.div(of.side, rounding_mode="floor"), slots % of.side
        sides = zip((rows, columns), leading, chosen, strict=True)
        uneven = [unevenness(side @ v.to(side), index) for side, v, index in sides]
        losses["loss_balance"] = options.balance_loss * torch.stack(uneven).sum()
    return losses


def unevenness(merged: Float[Tensor, "h t n"], chosen: Int[Tensor, "h t k"]) -> Tensor:
    """`n sum_i f_i p_i`, f the share of choices and p the mean softmax of scores; 1 when even."""
    heads, tokens, n = merged.shape
    counts = merged.new_zeros(heads, n).scatter_add(
        1, chosen.flatten(1), merged.new_ones(1).expand(heads, chosen[0].numel())
    )
    share, probability = counts / max(1, chosen[0].numel()), merged.softmax(-1).sum(1)
    return n * (share * probability).sum(-1).mean() / max(1, tokens)


def _even_cores(cores: int, rank: int) -> Tensor:
    """Cores uniform in (0, 1), whose scale does not depend on what was drawn."""
    drawn = torch.rand(cores, rank, rank)
    return drawn * (cores / torch.linalg.matrix_norm(drawn.sum(0), ord=2))


@lru_cache(maxsize=64)
def selected_size(sub_keys: int, top_k: int, side_k: int) -> float:
    """Root mean square of the selected products of two normal scores, by simulation."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 64, sub_keys, 1)
    rows, columns = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    scores, _ = tucker_topk(
        rows, columns, one.view(1, 1, 1), top_k, leading=Leading(one, one), side_k=side_k
    )
    return scores.square().mean().sqrt().item()


class VirtualSlots(nn.Module):
    """A map of E N virtual slots to N rows and E groups: implicit value expansion.

    A slot v is first permuted, by a permutation that is the same everywhere; then its row is
    v mod N and its group v div N. The permutation keeps the slots of one row in all groups from
    sharing their sub-keys. It is a buffer and part of a checkpoint.

    Args:
        rows: N.
        groups: E; with one there is nothing to map.
    """

    permutation: Tensor | None

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.rows, self.groups = rows, groups
        generator = torch.Generator().manual_seed(0)
        slots = None
        if groups > 1:
            slots = torch.randperm(rows * groups, generator=generator, device="cpu")
            slots = slots.to(torch.get_default_device())
        self.register_buffer("permutation", slots)

    def forward(
        self, slots: Int[Tensor, "*t k"]
    ) -> tuple[Int[Tensor, "*t k"], Int[Tensor, "*t k"]]:
        """The row and the group of each slot."""
        if self.permutation is not None:
            slots = self.permutation[slots]
        return slots % self.rows, slots.div(self.rows, rounding_mode="floor")


def _root(expansion: int) -> int:
    """How many times more sub-keys a side has, for E times the slots."""
    root = isqrt(max(0, expansion))
    if expansion < 1 or root**2 != expansion:
        raise ValueError(f"expansion must be a square such as 1, 4 or 9, got {expansion}")
    return root
