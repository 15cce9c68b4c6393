"""Where a forward pass first went wrong."""

import torch
from torch import nn

from mneme.layers import DeltaNet
from mneme.models.diagnosis import first_nonfinite


class _Reader(nn.Module):
    """Numbers as tokens of width 8, read by a memory whose state no token may spoil backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = DeltaNet(8, heads=2)

    def forward(self, inputs, state=None):
        tokens = inputs[..., None].expand(-1, -1, 8)
        return self.memory(torch.where(tokens == 5, torch.inf, tokens.float()), state)


def test_the_first_bad_token_is_named():
    torch.manual_seed(0)
    inputs = torch.ones(2, 40, dtype=torch.long)
    inputs[1, 33] = 5
    assert first_nonfinite(_Reader(), inputs) == "memory.in_proj at sequence 1, token 33"
    assert first_nonfinite(_Reader(), inputs.clamp(max=4)).startswith("none")
