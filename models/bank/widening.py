"""How blocks that were fetched for a call reach feed-forwards that know nothing of them.

N rows of a batch, B sequences, T tokens, D width, R units of a fetched path, W = 3 D.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mneme.layers.bank.bank_blocks import feed_forward_block


class Widening(NamedTuple):
    """The blocks of a call.

    Attributes:
        places: of each widened layer, `[B, R, W]`.
        repeats: successive rows of the batch may be of the same sequence, as many of each.
    """

    places: Sequence[Tensor]
    repeats: bool


Widenings = Mapping[object, Widening]
"""By bank, as a model may have several."""

# What runs in a context: threads and asynchronous tasks each have their own.
_READ: ContextVar[Widenings] = ContextVar("widenings", default=MappingProxyType({}))


class _Reading(AbstractContextManager[None]):
    """Lets hooks read these blocks, inside of a `with`; may be entered again."""

    def __init__(self, widenings: Widenings) -> None:
        self._widenings = widenings
        self._tokens: list[Token[Widenings]] = []

    def __enter__(self) -> None:
        self._tokens.append(_READ.set(self._widenings))

    def __exit__(self, *error: object) -> None:
        _READ.reset(self._tokens.pop())


def install_hooks(bank: object, feed_forwards: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Lets feed-forwards, in the order of places, add what `reading` gives this bank.

    Args:
        bank: stands for the bank. A copy of the model gets a copy of it, and thus no blocks.
        feed_forwards: with an `act_fn`, called on `[N, T, D]`.
    """
    hooks = enumerate(feed_forwards)
    return [f.register_forward_hook(partial(_widen, bank, place)) for place, f in hooks]


def reading(bank: object, widening: Widening) -> AbstractContextManager[None]:
    """Widens the feed-forwards of a bank by these blocks, inside of a `with`."""
    return _Reading({**_READ.get(), bank: widening})


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of torch's checkpoint: recomputing reads what the forward pass has read."""
    return nullcontext(), _Reading(_READ.get())


def require_checkpoints_read_blocks(layers: nn.ModuleList) -> None:
    """Raises ValueError if layers of transformers recompute without `checkpoint_contexts`."""
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            function: Any = layer._gradient_checkpointing_func
            if getattr(function, "keywords", {}).get("context_fn") is not checkpoint_contexts:
                raise ValueError(
                    "the model recomputes activations in backward, where it would have no blocks; "
                    "call enable_checkpointing of the attached bank, which recomputes with them"
                )


def _widen(
    bank: object, place: int, feed_forward: Any, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """The hook of a feed-forward."""
    widening = _READ.get().get(bank)
    if widening is None:
        return output
    units, repeats = widening.places[place], widening.repeats
    return output + _added(inputs[0], units, repeats, feed_forward.act_fn)


def _added(
    x: Float[Tensor, "n t d"],
    units: Float[Tensor, "b r w"],
    repeats: bool,
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "n t d"]:
    rows, sequences = len(x), len(units)
    if rows != sequences and not (repeats and rows % sequences == 0):
        raise ValueError(
            f"the model was called on {rows} sequences, with routes for {sequences}; give each one "
            "its route. For beams, or several samples of a prompt, call generate of the attached "
            "bank"
        )
    grouped = x.reshape(sequences, -1, x.shape[-1])  # rows of a sequence follow each other
    return feed_forward_block(grouped, units.to(x), activation).view_as(x)
