"""The one protocol: what every layer takes, returns and promises.

A layer maps a sequence to a sequence and carries what it remembers in an explicit state:

* **Split rule.** Feeding a sequence in any pieces, down to one token at a time, with the state
  carried, gives the output of feeding it whole. One `forward` therefore serves training, prefill,
  decoding and segment recurrence, and causality follows from it.
* Nothing that belongs to a sequence lives on the module, so one layer serves many sequences.
* A state is a pytree of tensors whose first axis is the batch: it can be indexed, repeated,
  detached, moved and saved with the functions below. `None` is the state of a stateless layer.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mneme.layers.state_fit import Stateful
from mneme.ops.options import require_choice as require_choice

State = Any
"""A pytree of tensors (batch first), or None. Its structure is fixed for a given layer."""

NO_AUX: Mapping[str, Tensor] = {}


class Output(NamedTuple):
    """What a layer returns.

    Attributes:
        y: `[B, T, D]`, the transformed sequence.
        state: what the layer remembers after the last token; None for a stateless layer.
        aux: named scalars, empty by default. A name whose last part begins with `loss_` is added
            to the training loss; every other name is telemetry.
    """

    y: Tensor
    state: State = None
    aux: Mapping[str, Tensor] = NO_AUX


class ParamOptions(NamedTuple):
    """How the optimizer treats a parameter.

    Attributes:
        decays: whether weight decay applies, if it has two axes or more; vectors never decay.
        max_lr: largest learning rate, before the schedule; None for any.
        update: what one step writes. "dense" is the model's optimizer, on every entry. The others
            are for tables `[N, D]` and write only the rows that have a gradient: "lazy" is AdamW
            on them, "rowwise" is Adagrad with one accumulator a row (`models/optim.py`).
        lr_multiplier: times the optimizer's learning rate, before `max_lr` and the schedule.
        weight_decay: where it decays, its own weight decay; None for the optimizer's.
        clip_group: name of the gradients whose global norm this one is clipped with; None for the
            main group.
    """

    decays: bool = True
    max_lr: float | None = None
    update: Literal["dense", "lazy", "rowwise"] = "dense"
    lr_multiplier: float = 1.0
    weight_decay: float | None = None
    clip_group: str | None = None


NO_OPTIONS = ParamOptions()


class Layer(Stateful):
    """Base of all layers: `d_model` first in the constructor, then keyword-only arguments.

    A state that does not fit a call is a ValueError, from `forward`, `recall` and `forward_saving`
    alike (`layers/state_fit.py`). A layer whose state grows, or is that of other layers, says so in
    `state_spec`; for all others `init_state` tells what fits.

    The linear layer through which a layer writes to the residual stream, if it ends in one, is
    named `out_proj`, so that a model can scale it with depth.
    """

    param_options: ClassVar[Mapping[str, ParamOptions]] = {}
    """Names of the layer's own parameters that the optimizer is to treat differently."""

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Transforms `x`, continuing from `state` (None: the start of a sequence)."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def init_state(self, batch_size: int) -> State:
        """The state before the first token, on the device of the parameters."""
        return None

    def state_size(self, seq_len: int) -> int:
        """Scalars held per sequence after `seq_len` tokens."""
        return 0

    def active_parameters(self) -> int:
        """Parameters that one token touches; all of them unless a layer selects among its own.

        Layers inside count theirs.
        """
        inside = list(_layers_inside(self))
        held = sum(p.numel() for layer in inside for p in layer.parameters())
        own = sum(p.numel() for p in self.parameters()) - held
        return own + sum(layer.active_parameters() for layer in inside)

    def fixed_elements_read(self) -> int:
        """Elements of buffers, such as keys that are not trained, that one token reads.

        Layers inside count theirs. Constants of a few elements do not count.
        """
        return sum(layer.fixed_elements_read() for layer in _layers_inside(self))


class Memory(Layer):
    """A layer whose memory can also be read without being written."""

    def recall(self, x: Float[Tensor, "b t d"], state: State = None) -> Float[Tensor, "b t d"]:
        """What `x` reads from the memory of `state` (None: the initial memory).

        Every token reads the same memory, through the layer's own query projection, feature map
        and output, as in `forward`. Tokens are read alone: a short convolution over several is left
        out, since what is asked is no part of the stream that is written.
        """
        raise TypeError(f"{type(self).__name__} does not define recall")


class RoutedLayer(Layer):
    """A layer that reads blocks fetched for each sequence, or that may hold such layers."""

    def init_state(self, batch_size: int, route: Any = None) -> State:
        """The state before the first token.

        Args:
            batch_size: B.
            route: `[B]` leaves of a memory bank's tree, or what was fetched for them; None where
                nobody knows. Layers that read no bank pass it on.
        """
        return None


def start_state(layer: Layer, batch_size: int, route: Any = None) -> State:
    """A layer's state before the first token, with the route if it is one that can use it."""
    if isinstance(layer, RoutedLayer):
        return layer.init_state(batch_size, route)
    return layer.init_state(batch_size)


@runtime_checkable
class SavingLayer(Protocol):
    """A layer that can hand on what it read, before its own gate and output projection.

    Later layers read it at the same positions (`GatedMemoryUnit`), so it is no part of the state.
    """

    @property
    def saved_dim(self) -> int:
        """Width M of what is handed on."""

    def forward_saving(
        self, x: Float[Tensor, "b t d"], state: State = None
    ) -> tuple[Output, Float[Tensor, "b t m"]]:
        """What `forward` returns, and what was read, with its gradient."""


def _layers_inside(module: nn.Module) -> Iterator[Layer]:
    """The nearest layers below a module, without those inside them."""
    for child in module.children():
        if isinstance(child, Layer):
            yield child
        else:
            yield from _layers_inside(child)


class LayerList(nn.ModuleList):
    """A module list whose items are known to be layers."""

    def __iter__(self) -> Iterator[Layer]:
        """The layers in order."""
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Layer:  # type: ignore[override]
        """One layer."""
        layer = super().__getitem__(index)
        assert isinstance(layer, Layer)
        return layer


LayerFactory = Callable[[int], Layer]
"""A layer still waiting for its `d_model`: what a model or a combinator is given to build."""


def require_at_least(minimum: float, **options: float) -> None:
    """Raises ValueError for the first option below the minimum, by its name."""
    for name, value in options.items():
        if value < minimum:
            raise ValueError(f"{name} must be {minimum} or more, got {value}")


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Applies `function` to every tensor of a state."""
    return pytree.tree_map_only(Tensor, function, state)


def state_tensors(state: State) -> list[Tensor]:
    """The tensors of a state, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def detach_state(state: State) -> State:
    """The same memory without its history: cuts back-propagation through time."""
    return map_state(Tensor.detach, state)


def select_state(state: State, rows: Tensor) -> State:
    """The states of the given batch rows: reorders beams, repeats a prompt, drops sequences."""
    return map_state(lambda t: t.index_select(0, rows), state)


def save_state(state: State, path: str | Path) -> None:
    """Writes a state's tensors; `load_state` reads them back."""
    torch.save(state_tensors(state), path)


def load_state(path: str | Path, like: State) -> State:
    """Reads a saved state into the structure of `like`, a state of the same layer.

    Raises:
        ValueError: the file holds another number of tensors than `like`.
    """
    saved = torch.load(path, weights_only=True)
    leaves, spec = pytree.tree_flatten(like)
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(saved) != len(slots):
        raise ValueError(f"{path} holds {len(saved)} tensors; this layer's state has {len(slots)}")
    for slot, tensor in zip(slots, saved, strict=True):
        leaves[slot] = tensor.to(leaves[slot].device)
    return pytree.tree_unflatten(leaves, spec)


def is_loss(name: str) -> bool:
    """Whether an entry of `Output.aux` is a loss (`loss_...`) rather than telemetry."""
    return name.rsplit("/", 1)[-1].startswith("loss_")


def join_aux(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merges the `aux` of several layers, each under its own prefix."""
    return {f"{prefix}/{name}": v for prefix, aux in parts.items() for name, v in aux.items()}
