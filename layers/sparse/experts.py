"""The experts that mixtures choose among: feed-forward layers whose weights are stacked."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.protocol import require_at_least
from mneme.ops.contract import uncompiled
from mneme.ops.grouped_linear import grouped_linear
from mneme.ops.routing import group, grouped, ungrouped

_TILE = 8  # rows of a tile of matrix products, or a multiple


class StackedLinear(nn.Module):
    """E linear layers without a bias, each for its own group of rows.

    Args:
        groups: E.
        inputs: width of the input.
        outputs: width of the output.
    """

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs))
        nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)  # as nn.Linear

    def forward(self, x: Float[Tensor, "n i"], rows: Sequence[int]) -> Float[Tensor, "n o"]:
        """Transforms consecutive rows, `rows[e]` of them by map e."""
        return grouped_linear(x, self.weight, rows)

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        groups, outputs, inputs = self.weight.shape
        return f"{groups} x ({inputs} -> {outputs})"


class Experts(nn.Module):
    """E feed-forward layers of hidden width F, of which each token goes to any.

    An expert is `W_out (silu(W_gate x) * W_in x)`, or `W_out silu(W_in x)` if not gated. None of
    them has a capacity: all copies of tokens are computed, in one product per expert and map.

    Args:
        d_model: width D.
        experts: E.
        hidden: F.
        gated: whether experts are gated.
    """

    def __init__(self, d_model: int, *, experts: int, hidden: int, gated: bool = True) -> None:
        super().__init__()
        require_at_least(1, experts=experts, hidden_width=hidden)
        self.experts, self.gated = experts, gated
        self.in_proj = StackedLinear(experts, d_model, (1 + gated) * hidden)
        self.out_proj = StackedLinear(experts, hidden, d_model)

    @uncompiled  # the sizes of groups are data
    def forward(
        self,
        x: Float[Tensor, "n d"],
        expert: Int[Tensor, " c"],
        copies: Int[Tensor, " n"],
        weight: Float[Tensor, " c"],
    ) -> Float[Tensor, "n d"]:
        """The weighted sum of what each token's experts give; zero for a token without any.

        Args:
            x: tokens.
            expert: of each copy of a token, the copies of a token next to each other.
            copies: of each token.
            weight: of each copy.
        """
        alone = len(x) == 1  # no other token whose routes could change the rounding of this one
        groups = group(expert, copies, self.experts, multiple=1 if alone else _TILE)
        hidden = self._activated(self.in_proj(grouped(x, groups), groups.rows))
        return ungrouped(self.out_proj(hidden, groups.rows), groups, weight)

    def parameters_of(self, experts: float) -> int:
        """Parameters of so many of the experts."""
        return round(experts * sum(p.numel() for p in self.parameters()) / self.experts)

    def _activated(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return F.silu(hidden)
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
