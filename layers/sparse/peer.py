"""PEER: a million experts of one neuron each, of which a token uses a few."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.protocol import Layer, Output, State, require_choice
from mneme.layers.registry import register
from mneme.layers.sparse.product_keys import ProductKeys, QueryNorm, default_key_dim
from mneme.layers.sparse.table import OWN, TableOptions, make_table
from mneme.layers.sparse.usage import observe_rows

Scores = Literal["softmax", "sigmoid", "relu"]
Activation = Literal["gelu", "relu", "identity"]

_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(F.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}
_ACTIVATIONS = {"gelu": nn.GELU(), "relu": nn.ReLU(), "identity": nn.Identity()}
_SMALL = {"heads": 2, "top_k": 3, "sub_keys": 4, "table": TableOptions(update="dense")}


@register(
    default=_SMALL,
    sigmoid=_SMALL | {"scores": "sigmoid", "activation": "relu", "query_norm": "none", "top_k": 12},
    own_keys=_SMALL | {"scores": "relu", "shared_keys": False, "top_k": 1},
)
class PEER(Layer):
    """Parameter-efficient expert retrieval: "Mixture of A Million Experts" (arXiv 2407.04153).

    Expert i is one hidden neuron, a row of each of two tables:

        q = norm(W_q x),   I, a = the k best of the n^2 product keys   (per head)
        y = sum_heads sum_j s_j act(U[I_j] . x) V[I_j],   s = softmax(a)

    Heads search the same sub-keys with queries of their own. With k = 1 and s = 1 the layer is an
    MLP of h neurons that is put together for each token.

    Args:
        d_model: width D.
        heads: h; default 8.
        top_k: experts of a head, k; default 16.
        sub_keys: n; there are n^2 experts; default 256.
        key_dim: width of a query, both halves; default D/2 rounded to an even number, as the paper
            does not give it.
        query_norm: "layer" (default), "none", or "batch" as in the paper: see `ProductKeys` for
            what that costs.
        shared_keys: whether heads search the same sub-keys, as in the paper (default), or each its
            own, as in PEER-pytorch.
        scores: "softmax" over the k scores kept (default), or "sigmoid" or "relu" of each. A head
            whose experts all have scores below zero is silent with the last, and learns nothing.
        activation: of the neuron, "gelu" (default), "relu" or "identity".
        table: how the optimizer writes the experts. Layers that share a name share experts.

    Initialization: U is N(0, 1/D), so that a neuron's input has the variance of x; V is
    N(0, 1/(h k)), so that h k neurons add up to it. The paper does not give its own.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 8,
        top_k: int = 16,
        sub_keys: int = 256,
        key_dim: int | None = None,
        query_norm: QueryNorm = "layer",
        shared_keys: bool = True,
        scores: Scores = "softmax",
        activation: Activation = "gelu",
        table: TableOptions = OWN,
    ) -> None:
        super().__init__()
        require_choice(Scores, scores=scores)
        require_choice(Activation, activation=activation)
        self.d_model = d_model
        self.scores: Scores = scores
        self.activation: Activation = activation
        self.keys = ProductKeys(
            d_model,
            heads=heads,
            top_k=top_k,
            sub_keys=sub_keys,
            key_dim=default_key_dim(d_model) if key_dim is None else key_dim,
            query_norm=query_norm,
            shared=shared_keys,
        )
        rows = self.keys.rows
        self.down = make_table(rows, d_model, std=d_model**-0.5, options=table.named("down"))
        self.up = make_table(rows, d_model, std=(heads * top_k) ** -0.5, options=table.named("up"))

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Builds and applies each position's neurons."""
        scores, rows = self.keys(x)
        weights = _WEIGHTS[self.scores](scores)
        observe_rows(self, rows, weights, self.keys.rows)
        rows, weights = rows.flatten(2), weights.flatten(2)
        hidden = _ACTIVATIONS[self.activation](self.down.dot_rows(rows, x))
        return Output(self.up.sum_rows(rows, weights * hidden).to(x.dtype))

    def active_parameters(self) -> int:
        """All but the experts that a token does not use."""
        own = sum(p.numel() for p in self.parameters())
        tables = [*self.down.parameters(), *self.up.parameters()]
        used = 2 * self.keys.heads * self.keys.top_k * self.d_model
        return own - sum(p.numel() for p in tables) + used
