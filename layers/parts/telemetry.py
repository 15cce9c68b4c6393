"""Telemetry of what happens inside layers, token by token: off unless somebody is recording.

    with recording() as record:
        model(tokens)
    record.by_layer(model)["blocks.1.parts.0.parts.0"]["surprise"]  # [B, T, H]

A report has one row per token, NaN where a layer has no value for it. What a layer reads before the
first token (persistent tokens, in `init_state`) is no part of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mneme.layers.parts.recorder import Slot


class Record:
    """What layers reported, by layer and name, in the order of the calls."""

    def __init__(self) -> None:
        self._parts: dict[nn.Module, dict[str, list[Tensor]]] = {}

    def add(self, layer: nn.Module, name: str, value: Tensor) -> None:
        """Keeps one report: `[B, T, ...]`, detached, on the CPU in fp32."""
        named = self._parts.setdefault(layer, {})
        named.setdefault(name, []).append(value.detach().float().cpu())

    def by_layer(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Name of the layer within `model` to name of the report to `[B, T, ...]`.

        Reports of one layer are joined along time, as calls on pieces of a sequence make them.
        """
        return {
            name: {what: torch.cat(parts, 1) for what, parts in self._parts[layer].items()}
            for name, layer in model.named_modules()
            if layer in self._parts
        }


_record: Slot[Record] = Slot("telemetry")


@contextmanager
def unrecorded() -> Iterator[None]:
    """Leaves what happens inside the block out of any record: it is no part of the sequence."""
    with _record.holding(None):
        yield


@contextmanager
def recording() -> Iterator[Record]:
    """Collects what layers report inside the block."""
    record = Record()
    with _record.holding(record):
        yield record


def observing() -> bool:
    """Whether somebody is recording, for reports that cost something to make."""
    return _record.get() is not None


def observe(layer: nn.Module, name: str, value: Tensor) -> None:
    """Reports `[B, T, ...]` of a layer; nothing happens unless somebody is recording."""
    record = _record.get()
    if record is not None:
        record.add(layer, name, value)
