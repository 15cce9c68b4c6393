"""The hash that ties a bank to the model it was trained with."""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn


def model_hash(module: nn.Module, leave_out: Collection[str] = ("bank",)) -> str:
    """SHA-256 of a model's weights: names, dtypes, shapes and bytes, in the order of names.

    It is the same after saving and loading, on any device. Another name of the same module gives
    another hash, so hash what is saved: the model, not a module around it.

    Args:
        module: its parameters and persistent buffers count, and no other state.
        leave_out: parts of dotted names. What has one of them is left out: the bank, above all,
            which is what the base model is the rest of.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor) or not set(name.split(".")).isdisjoint(leave_out):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        numbers = tensor.cpu().contiguous().view(-1)  # state_dict has detached it
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()
