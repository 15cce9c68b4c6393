"""The gated memory unit: a layer that reads what an earlier one read."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.norm import RMSNorm
from mneme.layers.protocol import require_at_least


class GatedMemoryUnit(nn.Module):
    """`y = W_out norm(m * silu(W_gate x))` of SambaY (arXiv 2507.06607).

    The current token's x chooses channels of m, which an earlier layer read from its memory at the
    same position (`SavingLayer`), so time is mixed at the price of a feed-forward layer, and
    nothing is carried. It is a part and no layer of its own, as m is not its to make; see
    `CrossDecoder`.

    Args:
        d_model: width D of x and y.
        saved_dim: width M of m.
        norm: RMSNorm of the product, needed where m is not normalized, as in matrix memories;
            default True. The paper has none after Mamba.
    """

    def __init__(self, d_model: int, *, saved_dim: int, norm: bool = True) -> None:
        super().__init__()
        require_at_least(1, saved_dim=saved_dim)
        self.gate_proj = nn.Linear(d_model, saved_dim, bias=False)
        self.norm = RMSNorm(saved_dim) if norm else None
        self.out_proj = nn.Linear(saved_dim, d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "b t d"], saved: Float[Tensor, "b t m"]
    ) -> Float[Tensor, "b t d"]:
        """Gates what was saved by each token."""
        y = (saved * F.silu(self.gate_proj(x))).to(self.out_proj.weight.dtype)
        return self.out_proj(y if self.norm is None else self.norm(y))
