"""How the state space of S4D and the long convolution end: GELU, then a gated linear unit."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class GatedOutput(nn.Module):
    """`(W_o g + b_o) * sigmoid(W_g g + b_g)` with `g = GELU(y)`: it mixes channels, not tokens.

    The papers have one map to 2 D and a GLU of its halves, which is the same function. Here the
    half that writes is a map of its own, by the name that models scale with depth.

    Args:
        d_model: width D.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(d_model, d_model)
        self.gate_proj = nn.Linear(d_model, d_model)

    def forward(self, y: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Mixes the channels of each token."""
        y = F.gelu(y)
        return self.out_proj(y) * torch.sigmoid(self.gate_proj(y))
