"""The feed-forwards of a pretrained language model that blocks of a bank can widen."""

from collections.abc import Sequence
from typing import Any

from torch import nn

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def gated_feed_forwards(
    model: nn.Module, layers: Sequence[int] | None = None
) -> dict[int, nn.Module]:
    """The gated feed-forward of each layer, `down_proj(act_fn(gate_proj x) * (up_proj x))`.

    Layers are those of the decoder, so a vision tower beside it has none. Feed-forwards are known
    by the names of their parts, which Llama, Mistral, Qwen, Gemma and models after them share.

    Args:
        model: of transformers.
        layers: which, from 0; None for all.

    Returns:
        By layer, the first one first.

    Raises:
        ValueError: there are no such layers, or a layer has no gated feed-forward, has several, or
            is a mixture of experts: tokens of other sequences share an expert's input.
    """
    found = decoder_layers(model)
    wanted = sorted(range(len(found)) if layers is None else layers)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(len(found))):
        raise ValueError(f"layers must be from 0 to {len(found) - 1}, each once; got {wanted}")
    gated = {layer: _gated(found[layer]) for layer in wanted}
    refused = [layer for layer, inside in gated.items() if len(inside) != 1]
    if refused:
        raise ValueError(
            f"a bank widens one gated feed-forward ({', '.join(_PARTS)}) in a layer. In "
            f"{type(model).__name__}, layer {refused[0]} {_why(found[refused[0]])}; layers that "
            f"cannot be widened: {refused}. Name others with layers=[...]"
        )
    return {layer: inside[0] for layer, inside in gated.items()}


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a language model.

    Raises:
        ValueError: it is none, or its decoder names them otherwise.
    """
    found = getattr(getattr(model, "get_decoder", lambda: None)(), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} is no language model of transformers whose decoder has a list "
            "of layers, as Llama, Qwen and Gemma have: a bank cannot tell what to widen"
        )
    return found


def common_width(feed_forwards: dict[int, nn.Module]) -> int:
    """D: what the feed-forwards read.

    Raises:
        ValueError: they read different widths.
    """
    gates: dict[int, Any] = {i: f.get_submodule("gate_proj") for i, f in feed_forwards.items()}
    widths = {i: gate.in_features for i, gate in gates.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"a bank widens layers of one width; these have, by layer: {widths}")
    return next(iter(widths.values()))


def _gated(layer: nn.Module) -> list[nn.Module]:
    """Those in a layer that every token of a sequence goes through."""
    inside = [m for m in layer.modules() if all(hasattr(m, part) for part in _PARTS)]
    experts = {m for mixture in _mixtures(layer) for m in mixture.modules()}
    return [m for m in inside if m not in experts]


def _mixtures(layer: nn.Module) -> list[nn.Module]:
    return [m for m in layer.modules() if hasattr(m, "experts")]


def _why(layer: nn.Module) -> str:
    """Why a layer cannot be widened."""
    if _mixtures(layer):
        return "is a mixture of experts"
    return "has several" if _gated(layer) else "has none"
