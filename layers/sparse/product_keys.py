"""Which rows of a large table a token reads, found by product keys.

B batch, T time, h heads, n sub-keys of a half, K query width, k rows of a head.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.protocol import require_at_least, require_choice
from mneme.ops.contract import without_autocast
from mneme.ops.product_key import product_key_topk

QueryNorm = Literal["none", "layer", "batch"]


class SelectedRows(NamedTuple):
    """Rows of each token and head, the best first.

    Attributes:
        scores: `[B, T, h, k]`, in fp32 or more.
        rows: `[B, T, h, k]`.
    """

    scores: Float[Tensor, "b t h k"]
    rows: Int[Tensor, "b t h k"]


class ProductKeys(nn.Module):
    """The k rows of n^2 whose keys match a query best, at the cost of comparing with 2n sub-keys.

    A row's key is a pair of sub-keys, one of each half, and its score the sum of the two halves'
    (section 3 of "Large Memory Layers with Product Keys", arXiv 1907.05242).

    Args:
        d_model: width D of what queries are made of.
        heads: h; each makes a query of its own.
        top_k: k.
        sub_keys: n.
        key_dim: K, even: both halves together.
        query_norm: "layer" normalizes each half of a query alone, with a learned scale and bias.
            "batch" is the paper's batch normalization: it keeps rows in use from the start even if
            inputs have a common direction, but in training a token then depends on all others of
            the batch, later ones too. "none" leaves queries as they are.
        shared: heads search the same sub-keys, as in PEER; otherwise each has its own.
        key_bound: sub-keys start uniform within it; default 1/sqrt(K/2), as in the paper's code.

    Initialization: the query map Xavier-uniform, its bias uniform within 1/sqrt(D).
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        top_k: int,
        sub_keys: int,
        key_dim: int,
        query_norm: QueryNorm,
        shared: bool = False,
        key_bound: float | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads, top_k=top_k, sub_keys=sub_keys)
        half = half_width(key_dim)
        if top_k > sub_keys**2:
            raise ValueError(
                f"top_k ({top_k}) must be at most the rows there are, sub_keys^2 = {sub_keys**2}"
            )
        self.heads, self.top_k, self.sub_keys = heads, top_k, sub_keys
        self.query_proj = nn.Linear(d_model, heads * key_dim)
        self.norm = _query_norm(query_norm, heads, half)
        self.keys = nn.Parameter(torch.empty(1 if shared else heads, 2, sub_keys, half))
        nn.init.xavier_uniform_(self.query_proj.weight)
        bound = half**-0.5 if key_bound is None else key_bound
        nn.init.uniform_(self.keys, -bound, bound)

    def forward(self, x: Float[Tensor, "b t d"]) -> SelectedRows:
        """The rows of each token, under autocast those of the same tokens without it."""
        scores, rows = product_key_topk(_scores(x.flatten(0, 1), self), self.top_k)
        return SelectedRows(scores.unflatten(0, x.shape[:2]), rows.unflatten(0, x.shape[:2]))

    @property
    def rows(self) -> int:
        """Rows that can be addressed, n^2."""
        return self.sub_keys**2


def default_key_dim(d_model: int) -> int:
    """K where none is given: half the model's width, as Memory+ has it, made even."""
    return 2 * -(-d_model // 4)


def half_width(key_dim: int) -> int:
    """Width of one half of a query, K/2.

    Raises:
        ValueError: K cannot be halved.
    """
    if key_dim < 2 or key_dim % 2:
        raise ValueError(f"key_dim must be even and 2 or more, for two halves; got {key_dim}")
    return key_dim // 2


@without_autocast
def _scores(x: Float[Tensor, "n d"], to: ProductKeys) -> Float[Tensor, "n h s m"]:
    """Each half of each query against its sub-keys: in bf16 some of the best would be ties."""
    query = to.norm(to.query_proj(x.to(to.keys.dtype)))
    query = rearrange(query, "n (h s k) -> h s n k", h=to.heads, s=2)
    scores = at_least_fp32(query) @ at_least_fp32(to.keys).mT
    return rearrange(scores, "h s n m -> n h s m")


class _HalvesNorm(nn.Module):
    """LayerNorm of each half of each head's query alone, `[N, h 2 K/2]`."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(half)

    def forward(self, query: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return self.norm(query.unflatten(-1, (-1, self.norm.normalized_shape[0]))).flatten(-2)


def _query_norm(kind: QueryNorm, heads: int, half: int) -> nn.Module:
    require_choice(QueryNorm, query_norm=kind)
    if kind == "layer":
        return _HalvesNorm(half)
    return nn.BatchNorm1d(2 * heads * half) if kind == "batch" else nn.Identity()
