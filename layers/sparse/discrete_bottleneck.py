"""Discrete key-value bottleneck: values under fixed keys, of which training writes the nearest."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.protocol import Layer, Output, State, require_at_least
from mneme.layers.registry import register
from mneme.layers.sparse.table import OWN, TableOptions, make_table
from mneme.layers.sparse.usage import observe_rows
from mneme.ops.contract import without_autocast

_BLOCK = 2**20  # distances held at a time, few enough for the cache
_SMOOTHING = 1e-5  # added to the size of every cluster, as in VQ-VAE (arXiv 1711.00937)

_SMALL = {"codebooks": 3, "keys": 5, "key_dim": 4, "table": TableOptions(update="dense")}


@register(default=_SMALL, narrow=_SMALL | {"value_dim": 6})
class DiscreteKeyValueBottleneck(Layer):
    """The discrete key-value bottleneck of arXiv 2207.11240, as a layer.

    Each codebook c of H sees its own random projection of the input, takes the nearest of its P
    keys, and the values under them are averaged:

        q_c = R_c x,    j_c = argmin_j |q_c - k_cj|^2,    z = 1/H sum_c V_c[j_c],    y = W_out z

    Projections and keys are buffers: no gradient changes them, and none passes to the input. So
    learning something new writes only the rows that its own inputs are nearest to, and what lies
    under other keys stays as it was. It takes two phases:

    1. Place the keys, before anything is known of the task: `update_keys`, called with batches of
       inputs, is k-means by moving averages. Without it keys are those of the start, N(0, 1), which
       suits inputs of unit variance in every direction.
    2. Train the values. `forward` and `read` never move a key, in training or not.

    For classification take `value_dim` as the number of classes: `read` gives the logits.

    Args:
        d_model: width D.
        codebooks: H; default 64.
        keys: P, of each codebook; default 256.
        key_dim: width of a key; default 8.
        value_dim: width of a value; default D, and then there is no W_out.
        table: how the optimizer writes the values; row c P + j is under key j of codebook c.

    Initialization: projections with rows of unit norm; values are zero, and so is the output.

    Where we differ: published settings are 256 codebooks of 4,096 keys of width 14, in front of a
    frozen encoder. Averages start empty, and the first batch seeds most of the keys.
    """

    projection: Tensor
    codebook: Tensor
    sizes: Tensor
    sums: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        codebooks: int = 64,
        keys: int = 256,
        key_dim: int = 8,
        value_dim: int | None = None,
        table: TableOptions = OWN,
    ) -> None:
        super().__init__()
        value_dim = d_model if value_dim is None else value_dim
        require_at_least(1, codebooks=codebooks, keys=keys, key_dim=key_dim, value_dim=value_dim)
        self.codebooks, self.keys, self.value_dim = codebooks, keys, value_dim
        projection = F.normalize(torch.randn(codebooks * key_dim, d_model), dim=-1)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", torch.randn(codebooks, keys, key_dim))
        self.register_buffer("sizes", torch.zeros(codebooks, keys))
        self.register_buffer("sums", torch.zeros(codebooks, keys, key_dim))
        self.values = make_table(codebooks * keys, value_dim, std=0.0, options=table)
        projects = value_dim != d_model
        self.out_proj = nn.Linear(value_dim, d_model, bias=False) if projects else nn.Identity()

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Reads each position's values."""
        y = self.out_proj(self.read(x).to(x.dtype))
        return Output(y + 0 * x)  # no gradient, but what is not a number in x is seen

    def read(self, x: Float[Tensor, "*t d"]) -> Float[Tensor, "*t v"]:
        """The mean over codebooks of the values under the nearest keys."""
        first = torch.arange(0, self.codebooks * self.keys, self.keys, device=x.device)
        rows = self.codes(x) + first
        weights = at_least_fp32(x).new_full(rows.shape, 1 / self.codebooks)
        observe_rows(self, rows[..., None], weights[..., None], self.codebooks * self.keys)
        return self.values.sum_rows(rows, weights)

    def codes(self, x: Float[Tensor, "*t d"]) -> Int[Tensor, "*t h"]:
        """The nearest key of each codebook."""
        queries = _queries(x.detach().flatten(0, -2), self.projection, self.codebooks)
        return _nearest(queries, self.codebook).mT.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def update_keys(
        self,
        x: Float[Tensor, "*t d"],
        *,
        decay: float = 0.95,
        reseed_below: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        """One step of k-means by moving averages, of the number and the sum of each key's queries.

        A key becomes the sum over the number, once it has had a query. A key whose number has
        fallen below `reseed_below` times its fair share of the batch is replaced by the query of a
        random token, with a number of just that: it stays if the next batch has enough queries near
        it.

        Args:
            x: a batch of inputs.
            decay: of the averages, per call.
            reseed_below: as a fraction of tokens / P; 0 never replaces a key.
            generator: of the tokens that replace keys, on the CPU.

        All is counted in at least fp32, but averages are kept in the dtype of the layer: cast it to
        a narrower one after this phase. An empty batch changes nothing.
        """
        if x.numel() == 0:
            return
        x = x.flatten(0, -2)
        sizes, sums = at_least_fp32(self.sizes), at_least_fp32(self.sums)
        queries = _queries(x, self.projection, self.codebooks).to(sums.dtype)
        code = _nearest(queries, self.codebook)
        counts = torch.zeros_like(sizes).scatter_add_(1, code, torch.ones_like(queries[..., 0]))
        totals = torch.zeros_like(sums)
        totals.scatter_add_(1, code[..., None].expand_as(queries), queries)
        sizes, sums = sizes.lerp(counts, 1 - decay), sums.lerp(totals, 1 - decay)
        moved = sums / _smoothed(sizes)[..., None]
        keys = torch.where(sizes[..., None] > 0, moved, self.codebook)
        least = reseed_below * len(x) / self.keys
        dead, seeds = sizes < least, self._tokens(queries, generator)
        self.codebook.copy_(torch.where(dead[..., None], seeds, keys))
        self.sums.copy_(torch.where(dead[..., None], least * seeds, sums))
        self.sizes.copy_(torch.where(dead, least, sizes))

    def active_parameters(self) -> int:
        """One row of each codebook's values, and the output map."""
        return self.codebooks * self.value_dim + sum(p.numel() for p in self.out_proj.parameters())

    def fixed_elements_read(self) -> int:
        """Projections and all keys."""
        return self.projection.numel() + self.codebook.numel()

    def _tokens(self, queries: Tensor, generator: torch.Generator | None) -> Tensor:
        """The query of a random token for each key."""
        drawn = torch.randint(queries.shape[1], self.sizes.shape, generator=generator)
        return queries.gather(1, drawn.to(queries.device)[..., None].expand_as(self.codebook))


@without_autocast
def _queries(x: Tensor, projection: Tensor, codebooks: int) -> Tensor:
    """Projections of tokens `[N, D]` for each codebook, `[H, N, K]`, in at least fp32."""
    x = at_least_fp32(x)
    return F.linear(x, projection.to(x.dtype)).unflatten(-1, (codebooks, -1)).transpose(0, 1)


@without_autocast
def _nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """The key of the least squared distance to each query, `[H, N]`, the first of equals."""
    keys = keys.to(queries.dtype)
    norms = keys.square().sum(-1, keepdim=True)
    keys, queries = torch.cat([-2 * keys, norms], -1), F.pad(queries, (0, 1), value=1.0)
    nearest = []
    for block in queries.split(max(1, _BLOCK // keys.shape[1]), dim=1):
        together = max(1, _BLOCK // max(1, block.shape[1] * keys.shape[1]))  # codebooks
        pairs = zip(block.split(together), keys.split(together), strict=True)
        # |k|^2 - 2 q k, which lacks only the query's own norm
        nearest.append(torch.cat([torch.bmm(q, k.mT).argmin(-1) for q, k in pairs]))
    return torch.cat(nearest, dim=1)


def _smoothed(sizes: Tensor) -> Tensor:
    """Sizes of clusters, kept above zero without a change of their sum."""
    total = sizes.sum(-1, keepdim=True)
    return (sizes + _SMOOTHING) * total / (total + sizes.shape[-1] * _SMOOTHING)
