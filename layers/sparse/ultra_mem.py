"""UltraMem and UltraMemV2: tables of values that training writes, addressed by Tucker scores.

Two classes, as they read their tables in different ways; how rows are found is the same.
"""

from math import prod

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mneme.layers.protocol import Layer, Output, State, require_at_least
from mneme.layers.registry import register
from mneme.layers.sparse.product_keys import default_key_dim
from mneme.layers.sparse.table import OWN, Rows, SharedTable, Table, TableOptions, make_table
from mneme.layers.sparse.ultra_mem_keys import TuckerKeys, TuckerScores
from mneme.layers.sparse.usage import observe_rows

VALUE_STD = 0.02  # of UltraMem's values, in the authors' code for all sizes
SWIGLU_VARIANCE = 0.0111  # of what SwiGLU makes of unit inputs at its start: E[silu(g)^2] / 9
ONE_QUERY = TuckerScores(cores=2, tail_loss=0.001)
QUERY_PER_RANK = TuckerScores(query_per_rank=True)

_SMALL = {"top_k": 12, "sub_keys": 4, "table": TableOptions(update="dense")}


@register(
    default=_SMALL,
    plain=_SMALL
    | {
        "top_k": 6,
        "expansion": 1,
        "scoring": TuckerScores(rank=1, side_k=3, query_per_head=True),
    },
    balanced=_SMALL
    | {
        "key_dim": 10,
        "scoring": TuckerScores(rank=3, cores=4, query_per_head=True, balance_loss=0.1),
    },
)
class UltraMem(Layer):
    """Reads a table through Tucker keys and E virtual copies of it: UltraMem (arXiv 2411.12364).

        q = norm(W_q x),   I, s = the k best of E N slots by  rows C columns^T   (per head)
        z_p = sum over the slots of group p of  s * V[row]
        y = sum_p W_p z_p

    Scores weigh values as they are, without softmax. Core c scores the c-th slice of a value
    ("multi-core scoring"). A virtual table V W_p is never made: E groups cost E products of the
    width of a value ("implicit value expansion"), and a sum of k rows for each.

    Args:
        d_model: width D.
        heads: h; default 2. Their sums are added.
        top_k: k; default 32.
        sub_keys: n; the table has N = n^2 rows; default 128.
        key_dim: width of a query, both halves; default D/2 rounded to an even number.
        value_dim: width of a row; default D/2.
        expansion: E, a square; a side has sqrt(E) n sub-keys; default 4.
        scoring: default rank 2, 2 cores, one query for all heads, and the paper's loss on the
            cores' tail.
        table: how the optimizer writes the values, and whether layers share them. A row of the
            table is one slice of a value.

    Initialization: values N(0, 0.02^2), output N(0, 1 / (E value_dim)), keys as `TuckerKeys`.

    Where we differ: the paper reads a block's input and adds the output some blocks later; here
    a layer is a layer, and a pattern decides where it stands. Its convolution on queries is left
    out; compose it where it is wanted. Heads share the cores.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 2,
        top_k: int = 32,
        sub_keys: int = 128,
        key_dim: int | None = None,
        value_dim: int | None = None,
        expansion: int = 4,
        scoring: TuckerScores = ONE_QUERY,
        table: TableOptions = OWN,
    ) -> None:
        super().__init__()
        self.value_dim = max(1, d_model // 2) if value_dim is None else value_dim
        self.keys = TuckerKeys(
            d_model,
            heads=heads,
            top_k=top_k,
            sub_keys=sub_keys,
            expansion=expansion,
            key_dim=default_key_dim(d_model) if key_dim is None else key_dim,
            scoring=scoring,
        )
        self.values = sliced_table(
            sub_keys**2, self.value_dim, scoring.cores, std=VALUE_STD, options=table
        )
        pooled = expansion * self.value_dim
        self.out_proj = nn.Linear(pooled, d_model, bias=False)
        nn.init.normal_(self.out_proj.weight, std=pooled**-0.5)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Reads each position's rows."""
        scores, rows, groups, losses = self.keys(x)
        observe_rows(self, rows, scores.sum(-2), self.keys.slots.rows)
        weights = rearrange(scores, "b t h c k -> b t 1 c (h k)")
        group = torch.arange(self.keys.slots.groups, device=x.device)[:, None, None]
        member = rearrange(groups, "b t h k -> b t 1 1 (h k)") == group
        z = sum_slices(self.values, rows.flatten(2).unsqueeze(2), weights * member)
        return Output(self.out_proj(z.flatten(2).to(x.dtype)), aux=losses)

    def active_parameters(self) -> int:
        """All but the rows of the table that a token does not read."""
        own = sum(p.numel() for p in self.parameters())
        table = sum(p.numel() for p in self.values.parameters())
        return own - table + self.keys.heads * self.keys.top_k * self.value_dim


@register(
    default=_SMALL,
    shared_keys=_SMALL
    | {
        "heads": 2,
        "expansion": 4,
        "pre_dim": 3,
        "scoring": TuckerScores(cores=3, balance_loss=0.1),
    },
)
class UltraMemV2(Layer):
    """Rank-one experts without activation, read through Tucker keys: arXiv 2508.18756.

        q = norm(W_q x),   I, s = the k best of E N slots by  rows C columns^T   (per head)
        z = sum_j s_j (P[I_j] . W_pre x) V[I_j]
        y = W_out z

    Selecting the best k is all there is of a nonlinearity. Expansion is sharing of keys here, as in
    the released code: sqrt(E) sub-keys of each side for every one of the table make E virtual slots
    of each row, all with the same projection.

    Args:
        d_model: width D.
        heads: h; default 1. Their sums are added.
        top_k: k; default 32.
        sub_keys: n; the tables have N = n^2 rows; default 128.
        key_dim: width of a query, both halves; default D/2 rounded to an even number.
        pre_dim: width of a row of P; default D/8.
        value_dim: width of a row of V; default 3D/8.
        expansion: E, a square; default 1.
        scoring: default rank 2 with a query for each rank, one core, and no losses.
        table: how the optimizer writes P and V. Layers that share a name share both.

    Initialization: W_pre and W_out N(0, 2 / (5D)), as in the paper, keys as `TuckerKeys`, and P and
    V such that the output has the variance of that of a `SwiGLU` (`matched_std`).

    Where we differ: the paper's feed-forward starts with other variances than `SwiGLU`, and its
    division by the depth is left to the model, which divides every `out_proj`. Layers share their
    tables or none, where the paper's blocks read those of their neighbors on a ring. The released
    code matches no variances: there P and V are N(0, 0.02^2), W_pre N(0, 1/D), W_out N(0,
    1/value_dim), and the scales of both norms (key_dim / 2)^-0.4. It has two cores for each head,
    and its balance loss counts the k best rows and columns by themselves, ours those of the k best
    pairs.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        top_k: int = 32,
        sub_keys: int = 128,
        key_dim: int | None = None,
        pre_dim: int | None = None,
        value_dim: int | None = None,
        expansion: int = 1,
        scoring: TuckerScores = QUERY_PER_RANK,
        table: TableOptions = OWN,
    ) -> None:
        super().__init__()
        pre_dim = max(1, d_model // 8) if pre_dim is None else pre_dim
        value_dim = max(1, 3 * d_model // 8) if value_dim is None else value_dim
        require_at_least(1, heads=heads, top_k=top_k, pre_dim=pre_dim, value_dim=value_dim)
        self.keys = TuckerKeys(
            d_model,
            heads=heads,
            top_k=top_k,
            sub_keys=sub_keys,
            expansion=expansion,
            key_dim=default_key_dim(d_model) if key_dim is None else key_dim,
            scoring=scoring,
        )
        sizes = (d_model, pre_dim, value_dim)
        std = matched_std(SWIGLU_VARIANCE, lookups=heads * top_k, widths=sizes)
        pre, values = table.named("pre"), table.named("values")
        self.pre_values = make_table(sub_keys**2, pre_dim, std=std, options=pre)
        self.values = sliced_table(sub_keys**2, value_dim, scoring.cores, std=std, options=values)
        self.read_width = pre_dim + value_dim
        self.pre_proj = nn.Linear(d_model, pre_dim, bias=False)
        self.out_proj = nn.Linear(value_dim, d_model, bias=False)
        for linear in (self.pre_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=(0.4 / d_model) ** 0.5)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Builds and applies each position's experts."""
        scores, rows, _, losses = self.keys(x)
        observe_rows(self, rows, scores.sum(-2), self.keys.slots.rows)
        rows = rows.flatten(2)
        hidden = self.pre_values.dot_rows(rows, self.pre_proj(x))
        weights = rearrange(scores, "b t h c k -> b t c (h k)") * hidden.unsqueeze(2)
        z = sum_slices(self.values, rows, weights)
        return Output(self.out_proj(z.to(x.dtype)), aux=losses)

    def active_parameters(self) -> int:
        """All but the rows of both tables that a token does not read."""
        own = sum(p.numel() for p in self.parameters())
        tables = [*self.pre_values.parameters(), *self.values.parameters()]
        used = self.keys.heads * self.keys.top_k * self.read_width
        return own - sum(p.numel() for p in tables) + used


def sliced_table(
    rows: int, dim: int, slices: int, *, std: float, options: TableOptions
) -> Table | SharedTable:
    """A table of values cut into slices that have weights of their own: each slice is a row."""
    if dim < 1 or dim % slices:
        raise ValueError(f"cores ({slices}) must divide value_dim ({dim}) into slices")
    return make_table(rows * slices, dim // slices, std=std, options=options)


def sum_slices(
    table: Rows, rows: Int[Tensor, "*t m"], weights: Float[Tensor, "*w c m"]
) -> Float[Tensor, "*w d"]:
    """Weighted sums of values, of which slice i of c has weights of its own.

    The slices of value v are rows c v to c v + c - 1 of the table. `rows` may have axes of 1 where
    several sums are made of the same ones.
    """
    cores = weights.shape[-2]
    slices = rows.unsqueeze(-2) * cores + torch.arange(cores, device=rows.device)[:, None]
    return table.sum_rows(slices.expand_as(weights), weights).flatten(-2)


def matched_std(variance: float, *, lookups: int, widths: tuple[int, int, int]) -> float:
    """Standard deviation of pre-values and values with which outputs have a variance.

    With linear layers N(0, 2 / (5D)) and scores of mean square 1, an output of unit inputs has the
    variance `0.16 lookups std^4 pre_dim value_dim / D`. The paper's feed-forward, to which it
    equates that, has `0.064 k_inner / 2L`, k_inner its inner width over D and L the layers.

    Args:
        variance: of the outputs.
        lookups: rows that a token reads.
        widths: D, pre_dim and value_dim.
    """
    d_model, *rows = widths
    return float((variance * d_model / (0.16 * lookups * prod(rows))) ** 0.25)
