"""What a model costs, known before it is trained: the figures at which runs are compared."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mneme.layers import state_tensors
from mneme.models.language_model import LanguageModel


@dataclass(frozen=True)
class Budget:
    """Costs of a model at one sequence length.

    Attributes:
        seq_len: the length T at which the figures hold.
        parameters: all parameters.
        active_parameters: those that one token touches.
        state_bytes: state per sequence after T tokens, in the dtypes the model carries it in.
        flops_per_token: forward, matrix products and weighted reads of rows (1 multiply-add = 2),
            averaged over T. Rows are those of tables, and the copies of a token that its experts
            or memories answered. Softmax attention is charged for all T x T scores, twice the
            causal half.
        decode_bytes_per_token: memory read to decode one token after T: active parameters, fixed
            numbers such as keys that are buffers, in the dtype of the parameters, and state.
    """

    seq_len: int
    parameters: int
    active_parameters: int
    state_bytes: int
    flops_per_token: float
    decode_bytes_per_token: int

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, for tables and files."""
        return asdict(self)


def budget(model: LanguageModel, seq_len: int) -> Budget:
    """Measures a model's costs on the meta device: nothing is computed and nothing allocated.

    Args:
        model: on any device, the meta device included; it is left as it is.
        seq_len: the length T.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    weights = {name: tensor.detach().to("meta") for name, tensor in tensors}
    tokens = torch.zeros(1, seq_len, dtype=torch.long, device="meta")
    counting = FlopCounterMode(display=False, custom_mapping=_READS)
    with torch.no_grad(), counting as counter:
        _, state, _ = functional_call(model, weights, (tokens,))
    state_bytes = sum(t.numel() * t.element_size() for t in state_tensors(state))
    active = model.active_parameters()
    read = active + sum(block.fixed_elements_read() for block in model.blocks)
    return Budget(
        seq_len=seq_len,
        parameters=sum(p.numel() for p in model.parameters()),
        active_parameters=active,
        state_bytes=state_bytes,
        flops_per_token=counter.get_total_flops() / seq_len,
        decode_bytes_per_token=read * next(model.parameters()).element_size() + state_bytes,
    )


def _bag_flops(
    table: Sequence[int],
    rows: Sequence[int],
    offsets: Sequence[int],
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: Sequence[int] | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """A multiply-add for each number of each weighted row; rows without weights are only moved."""
    return 0 if weights is None else 2 * prod(rows) * table[1]


def _product_flops(
    x: Sequence[int], table: Sequence[int], rows: Sequence[int], *_: Any, **__: Any
) -> int:
    """A multiply-add for each number of each row that is multiplied with a token."""
    return 2 * prod(rows) * table[1]


# Formulas by library call, from the shapes of its arguments: what reads in `mneme.ops.table_read`,
# and sums of the copies of tokens in `mneme.ops.routing`, are on the meta device, one such call
# each.
_READS = {
    torch.ops.aten._embedding_bag: _bag_flops,
    torch.ops.aten._embedding_bag_forward_only: _bag_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _product_flops,
}
