"""Product-key memory: a table of values that training writes, and of which a token reads a few."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.protocol import Layer, Output, State, require_at_least, require_choice
from mneme.layers.registry import register
from mneme.layers.sparse.product_keys import ProductKeys, QueryNorm, default_key_dim, half_width
from mneme.layers.sparse.table import OWN, TableOptions, make_table
from mneme.layers.sparse.usage import observe_rows

Scores = Literal["softmax", "relu"]
Gate = Literal["silu", "sigmoid", "none"]

CLOSED = -2.0  # where a sigmoid gate begins: a new memory adds an eighth of what it reads

_LAZY = {"heads": 2, "top_k": 3, "sub_keys": 4}
_SMALL = _LAZY | {"table": TableOptions(update="dense")}


@register(
    default=_SMALL,
    sparse_gradient=_LAZY,
    plain=_SMALL | {"gate": "none", "query_norm": "none", "scores": "relu", "top_k": 12},
    one_gate=_SMALL | {"gate": "sigmoid"},
    narrow=_SMALL | {"gate": "none", "value_dim": 6, "key_dim": 10},
)
class ProductKeyMemory(Layer):
    """Reads the k rows of a large table whose product keys match best, for each of h heads.

        q = norm(W_q x),   I, a = the k best of the n^2 sums  K1 q1 + K2 q2   (per head)
        z = sum_heads sum_j s_j V[I_j],   s = softmax(a)
        y = W_out (z * silu(W_gate x + b_gate)) + b_out

    Rows and keys are those of "Large Memory Layers with Product Keys" (arXiv 1907.05242), the
    gated output that of "Memory Layers at Scale" (Memory+, arXiv 2412.09764), where several layers
    also share one table: `table.share` gives its name. Training writes the table, through gradients
    of the rows that were read; its size changes neither the products nor the bytes of a step,
    except for the sub-keys, of which there are as many as the square root of its rows.

    Args:
        d_model: width D.
        heads: h; default 4. Their sums are added.
        top_k: k; default 32.
        sub_keys: n; the table has n^2 rows; default 256.
        key_dim: width of a query, both halves; default D/2 rounded to an even number.
        value_dim: width of a row; default D.
        query_norm: "layer" (default), "none", or "batch" as in the paper: see `ProductKeys` for
            what that costs.
        scores: "softmax" over the k scores kept (default), or "relu" of each (arXiv 2302.06461).
        gate: "silu", Memory+'s gated output (default); "sigmoid", one gate for all channels,
            `y = sigmoid(w . x + b) W_out z` with b = -2 at the start (the factual memory of Hydra,
            arXiv 2508.15099); "none" adds z itself to the stream, or W_out z where its width is
            not D.
        table: how the optimizer writes the values, and whether layers share them.

    Initialization: values N(0, 1/value_dim), queries as `ProductKeys`. Sub-keys are uniform within
    1/sqrt(key_dim) where the gate is Memory+'s, as in its code, and within sqrt(2) times that, as
    in the first paper's, elsewhere. Gate and output are of unit gain (N(0, 1/their input's width)).

    Where we differ: queries are normalized by LayerNorm by default. Both papers' code has no norm
    by default, with which a direction common to all inputs leaves most rows unused, and the batch
    norm that the first paper recommends mixes tokens. Memory+ has N(0, 1/D) for both maps of its
    gated output, whatever the width of a row, and starts their biases as `nn.Linear` does; ours
    start at zero, as a bias as large as what is read would not be divided by the model's depth.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        top_k: int = 32,
        sub_keys: int = 256,
        key_dim: int | None = None,
        value_dim: int | None = None,
        query_norm: QueryNorm = "layer",
        scores: Scores = "softmax",
        gate: Gate = "silu",
        table: TableOptions = OWN,
    ) -> None:
        super().__init__()
        require_choice(Scores, scores=scores)
        require_choice(Gate, gate=gate)
        value_dim = d_model if value_dim is None else value_dim
        require_at_least(1, value_dim=value_dim)
        self.scores: Scores = scores
        key_dim = default_key_dim(d_model) if key_dim is None else key_dim
        self.keys = ProductKeys(
            d_model,
            heads=heads,
            top_k=top_k,
            sub_keys=sub_keys,
            key_dim=key_dim,
            query_norm=query_norm,
            key_bound=(2 * half_width(key_dim)) ** -0.5 if gate == "silu" else None,
        )
        self.values = make_table(self.keys.rows, value_dim, std=value_dim**-0.5, options=table)
        self.value_dim = value_dim
        self.gate: Gate = gate
        self.gate_proj = _gate(gate, d_model, value_dim)
        mixes = gate != "none" or value_dim != d_model
        self.out_proj: nn.Module = nn.Identity()
        if mixes:
            self.out_proj = _linear(value_dim, d_model, bias=gate == "silu")

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Reads each position's rows."""
        scores, rows = self.keys(x)
        weights = F.relu(scores) if self.scores == "relu" else scores.softmax(-1)
        observe_rows(self, rows, weights, self.keys.rows)
        z = self.values.sum_rows(rows.flatten(2), weights.flatten(2)).to(x.dtype)
        if self.gate == "silu":
            return Output(self.out_proj(z * F.silu(self.gate_proj(x))))
        y = self.out_proj(z)
        return Output(y * self.gate_proj(x).sigmoid() if self.gate == "sigmoid" else y)

    def active_parameters(self) -> int:
        """All but the rows of the table that a token does not read."""
        own = sum(p.numel() for p in self.parameters())
        table = sum(p.numel() for p in self.values.parameters())
        return own - table + self.keys.heads * self.keys.top_k * self.value_dim


def _gate(kind: Gate, d_model: int, value_dim: int) -> nn.Module:
    """The map that a gate is made with."""
    if kind == "sigmoid":
        gate = nn.Linear(d_model, 1)
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, CLOSED)
        return gate
    return _linear(d_model, value_dim, bias=True) if kind == "silu" else nn.Identity()


def _linear(d_in: int, d_out: int, *, bias: bool) -> nn.Linear:
    """A map of unit gain, with a bias of zero if any."""
    linear = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(linear.weight, std=d_in**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
