"""Position-wise feed-forward layers: the memory that training writes and every token reads."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.protocol import Layer, Output, State, require_at_least
from mneme.layers.registry import register
from mneme.ops.options import scaled_width


@register(default={"expand": 2})
class MLP(Layer):
    """`y = W_out gelu(W_in x)`, the two-matrix feed-forward of the Transformer (arXiv 1706.03762).

    Args:
        d_model: width D.
        expand: hidden width over D; default 4.

    The original has ReLU and biases; like GPT-2's descendants we use GELU and none.
    """

    def __init__(self, d_model: int, *, expand: float = 4.0) -> None:
        super().__init__()
        hidden = scaled_width(d_model, expand)
        require_at_least(1, hidden_width=hidden)
        self.in_proj = nn.Linear(d_model, hidden, bias=False)
        self.out_proj = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Transforms each position on its own."""
        return Output(self.out_proj(F.gelu(self.in_proj(x))))


@register(default={"expand": 2})
class SwiGLU(Layer):
    """`y = W_out (silu(W_gate x) * W_in x)`, the gated feed-forward of arXiv 2002.05202.

    Args:
        d_model: width D.
        expand: hidden width over D; default 8/3, which has the parameters of an MLP with expand 4.
        multiple_of: the hidden width is rounded up to a multiple of this; default 8.
    """

    def __init__(self, d_model: int, *, expand: float = 8 / 3, multiple_of: int = 8) -> None:
        super().__init__()
        require_at_least(1, multiple_of=multiple_of)
        hidden = scaled_width(d_model, expand, multiple_of=multiple_of)
        require_at_least(1, hidden_width=hidden)
        self.in_proj = nn.Linear(d_model, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Transforms each position on its own."""
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        return Output(self.out_proj(F.silu(gate) * value))
