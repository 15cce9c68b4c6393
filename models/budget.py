"""What a model costs, known before it is trained: the figures at which runs are compared."""

import itertools
from dataclasses import asdict, dataclass

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from layers import state_tensors
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Budget:
    """Costs of a model at one sequence length.

    Attributes:
        seq_len: the length T at which the figures hold.
        parameters: all parameters.
        active_parameters: those that one token touches.
        state_bytes: state per sequence after T tokens, in the dtypes the model carries it in.
        flops_per_token: forward, matrix products only (1 multiply-add = 2), averaged over T.
            Softmax attention is charged for all T x T scores, twice the causal half.
        decode_bytes_per_token: memory read to decode one token after T: active parameters and
            state.
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
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, state, _ = functional_call(model, weights, (tokens,))
    state_bytes = sum(t.numel() * t.element_size() for t in state_tensors(state))
    active = model.active_parameters()
    return Budget(
        seq_len=seq_len,
        parameters=sum(p.numel() for p in model.parameters()),
        active_parameters=active,
        state_bytes=state_bytes,
        flops_per_token=counter.get_total_flops() / seq_len,
        decode_bytes_per_token=active * next(model.parameters()).element_size() + state_bytes,
    )
