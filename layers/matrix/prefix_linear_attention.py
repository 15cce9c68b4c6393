"""Prefix linear attention: the first tokens are written a second time, by an encoder."""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mneme.layers.matrix.linear_attention import EPS, TAYLOR_KEY, elu_map, taylor_map, taylor_size
from mneme.layers.matrix.matrix_memory import head_size
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.protocol import Layer, Output, require_at_least
from mneme.layers.registry import register
from mneme.ops.contract import without_autocast
from mneme.ops.scalar_decay import scalar_decay


class PrefixState(NamedTuple):
    """What the layer carries: sums of outer products `phi(k) [v, 1]^T`, fp32 (fp64 in fp64).

    Attributes:
        memory: over all tokens so far, `[B, H, F, V + 1]`; the last column is z.
        encoded: over the prefix so far, with the encoder's keys and values, alike.
        position: `[B]`, tokens seen.
    """

    memory: Tensor
    encoded: Tensor
    position: Int[Tensor, " b"]


@register(
    taylor={"heads": 2, "key_dim": 3, "prefix": 4, "chunk_size": 4},
    elu={"heads": 2, "feature_map": "elu", "prefix": 9},
    one_token={"heads": 1, "head_dim": 6, "key_dim": 2, "prefix": 1},
)
class PrefixLinearAttention(Layer):
    """The prefix linear attention of JRT-RNN (arXiv 2407.05483), made causal.

    A second pair of projections, the encoder, makes keys and values `ke, ve` of the first M tokens.
    Per head, counting tokens from 1, the paper's output is

        S_t = sum_{j <= t} phi(k_j) v_j^T + sum_{j <= M} phi(ke_j) ve_j^T    (z_t without the v)
        o_t = S_t^T phi(q_t) / (z_t . phi(q_t))

    so that a memory too small for a long document is written twice with it, the second time
    by projections that may choose differently what to hold.

    Where we differ: tokens inside the prefix do not see its end. Before token M the second sums are
    left out; from token M on, the outputs are the paper's. In the paper the earlier tokens read
    their own future, so that next-token losses on them mean nothing and they cannot be run one by
    one. Its second loss, on masked tokens of the prefix, belongs to training and is not here.

    Args:
        d_model: width D.
        heads: H; default 4.
        head_dim: width V of a head's values; default D / H.
        key_dim: width K of a head's queries and keys before the map; default 16 for "taylor", as in
            the paper, and V for "elu".
        feature_map: "taylor" (default), the exponential to second order, or "elu", `elu(x) + 1`.
        prefix: tokens M at the start of each sequence that the encoder reads.
        chunk_size: tokens per tile of the chunked form; changes speed, not the function. Default
            64.

    State: with F features (K, or `1 + K + K (K + 1) / 2` for "taylor"), `2 H F (V + 1)` scalars and
    the position. A sequence shorter than M is ordinary linear attention.

    Raises:
        ValueError: heads that do not divide the width, or sizes below one.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        key_dim: int | None = None,
        feature_map: Literal["taylor", "elu"] = "taylor",
        prefix: int,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        self.taylor = feature_map == "taylor"
        self.value_dim = head_size(d_model, heads) if head_dim is None else head_dim
        default_key = TAYLOR_KEY if self.taylor else self.value_dim
        self.key_dim = default_key if key_dim is None else key_dim
        require_at_least(1, head_dim=self.value_dim, key_dim=self.key_dim, prefix=prefix)
        self.heads, self.prefix, self.chunk_size = heads, prefix, chunk_size
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.in_proj = nn.Linear(d_model, 2 * keys + values, bias=False)
        self.encoder_proj = nn.Linear(d_model, keys + values, bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], state: PrefixState | None = None) -> Output:
        """Writes each token, one of the prefix twice, and reads what its place may see."""
        state = self.init_state(len(x)) if state is None else state
        tokens = x.shape[1]
        position = state.position[:, None] + torch.arange(tokens, device=x.device)
        (q, k), v = self.split(self.in_proj(x))
        first = slice(self.prefix)  # later tokens of a call are never inside the prefix
        encoded = self.encode(x[:, first], position[:, first] < self.prefix, state.encoded)
        complete = position >= self.prefix - 1
        y, memory = attend(q, k, v, state.memory, encoded, complete, self.chunk_size)
        y = rearrange(y.to(self.out_proj.weight.dtype), "b t h v -> b t (h v)")
        return Output(self.out_proj(y), PrefixState(memory, encoded, state.position + tokens))

    def split(self, x: Float[Tensor, "b t n"]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Features of all that is not values (queries, keys), and values; `[B, T, H, .]` each."""
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        x, v = x.tensor_split([x.shape[-1] - values], dim=-1)
        phi = taylor_map if self.taylor else elu_map
        features = (
            phi(rearrange(t, "b t (h k) -> b t h k", h=self.heads)) for t in x.split(keys, -1)
        )
        return tuple(features), rearrange(v, "b t (h v) -> b t h v", h=self.heads)

    def encode(
        self,
        x: Float[Tensor, "b t d"],
        inside: Bool[Tensor, "b t"],
        encoded: Float[Tensor, "b h f v1"],
    ) -> Float[Tensor, "b h f v1"]:
        """The encoder's sums with the tokens that are inside the prefix added."""
        (k,), v = self.split(self.encoder_proj(x))
        return encoded + outer_products(torch.where(inside[..., None, None], k, 0.0), v)

    def init_state(self, batch_size: int) -> PrefixState:
        """Empty sums, at the first position."""
        features = taylor_size(self.key_dim) if self.taylor else self.key_dim
        weight = self.out_proj.weight
        zeros = at_least_fp32(
            weight.new_zeros(batch_size, self.heads, features, self.value_dim + 1)
        )
        start = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return PrefixState(zeros, zeros.clone(), start)

    def state_size(self, seq_len: int) -> int:
        """Both sums and the position, whatever the length."""
        features = taylor_size(self.key_dim) if self.taylor else self.key_dim
        return 2 * self.heads * features * (self.value_dim + 1) + 1


def widened(v: Float[Tensor, "b t h v"]) -> Float[Tensor, "b t h v1"]:
    """Values with a column of ones, which makes z a column of the memory."""
    return torch.nn.functional.pad(at_least_fp32(v), (0, 1), value=1.0)


@without_autocast
def outer_products(
    k: Float[Tensor, "b t h f"], v: Float[Tensor, "b t h v"]
) -> Float[Tensor, "b h f v1"]:
    """`sum_t k_t [v_t, 1]^T`."""
    return torch.einsum("bthf,bthv->bhfv", at_least_fp32(k), widened(v))


@without_autocast
def attend(
    q: Float[Tensor, "b t h f"],
    k: Float[Tensor, "b t h f"],
    v: Float[Tensor, "b t h v"],
    memory: Float[Tensor, "b h f v1"],
    encoded: Float[Tensor, "b h f v1"],
    complete: Bool[Tensor, "b t"],
    chunk_size: int,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h f v1"]]:
    """Normalized reads of the tokens' sums, and of the encoder's too where the prefix is complete.

    With the sum of weights as a column, both are one matrix memory without decay; the division
    comes after they are added.
    """
    sums, memory = scalar_decay(q, k, widened(v), None, memory, scale=1.0, chunk_size=chunk_size)
    again = torch.einsum("bthf,bhfv->bthv", q.to(encoded.dtype), encoded)
    sums = sums + torch.where(complete[..., None, None], again, 0.0)
    return sums[..., :-1] / (sums[..., -1:] + EPS), memory
