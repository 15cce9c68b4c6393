"""The precision that gates, norms and states are computed in."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """fp32, or fp64 if `x` is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
