"""Layers made of layers: options are composed rather than branched on.

Each takes layer factories (layers that still wait for their width) and hands them its own
`d_model`. The state of a combinator is the tuple of its parts' states, in order.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.feed_forward import MLP
from mneme.layers.parts.norm import RMSNorm
from mneme.layers.protocol import (
    Layer,
    LayerFactory,
    LayerList,
    Output,
    RoutedLayer,
    State,
    join_aux,
    start_state,
)
from mneme.layers.recurrent.gated_convolution import GatedConvolution
from mneme.layers.registry import register


class _Composite(RoutedLayer):
    """What combinators share: parts, and a state and a size that are those of the parts."""

    def __init__(self, parts: Sequence[Layer]) -> None:
        super().__init__()
        self.parts = LayerList(parts)

    def init_state(self, batch_size: int, route: Any = None) -> State:
        """A tuple of the parts' first states, in order."""
        return tuple(start_state(part, batch_size, route) for part in self.parts)

    def state_spec(self) -> Any:
        """The parts, whose states fit, in order."""
        return tuple(self.parts)

    def state_size(self, seq_len: int) -> int:
        """The sum over the parts."""
        return sum(part.state_size(seq_len) for part in self.parts)

    def _states(self, state: State) -> Sequence[State]:
        return (None,) * len(self.parts) if state is None else state


@register(
    stateless={"layer": partial(MLP, expand=2)},
    stateful={"layer": partial(GatedConvolution, conv_size=3)},
)
class Residual(_Composite):
    """`y = x + layer(norm(x))`, the pre-norm residual step (arXiv 2002.04745), with RMSNorm.

    Args:
        d_model: width D.
        layer: layer factory of the layer inside.
        dropout: probability of zeroing an element of the layer's output in training; default 0.0.
    """

    def __init__(self, d_model: int, *, layer: LayerFactory, dropout: float = 0.0) -> None:
        super().__init__([layer(d_model)])
        self.norm = RMSNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Adds what the layer makes of the normalized input."""
        (inner,) = self._states(state)
        y, inner, aux = self.parts[0](self.norm(x), inner)
        return Output(x + self.dropout(y), (inner,), aux)


@register(two={"layers": [partial(GatedConvolution, conv_size=3), partial(MLP, expand=2)]})
class Sequential(_Composite):
    """`y = layer_n(... layer_1(x))`, without norms or residual paths of its own.

    Args:
        d_model: width D of every part.
        layers: layer factories, first applied first.
    """

    def __init__(self, d_model: int, *, layers: Sequence[LayerFactory]) -> None:
        super().__init__([layer(d_model) for layer in layers])

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Applies the parts in order."""
        states, auxes = [], {}
        for i, (part, inner) in enumerate(zip(self.parts, self._states(state), strict=True)):
            x, inner, auxes[str(i)] = part(x, inner)
            states.append(inner)
        return Output(x, tuple(states), join_aux(auxes))


@register(two={"layers": [partial(GatedConvolution, conv_size=3), partial(MLP, expand=2)]})
class Parallel(_Composite):
    """`y = sum_i layer_i(x)`: several layers read the same input, such as an FFN and a memory.

    Args:
        d_model: width D of every part.
        layers: layer factories of the parts.
    """

    def __init__(self, d_model: int, *, layers: Sequence[LayerFactory]) -> None:
        super().__init__([layer(d_model) for layer in layers])

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Sums what the parts make of the same input."""
        states = self._states(state)
        outputs = [part(x, inner) for part, inner in zip(self.parts, states, strict=True)]
        y = sum((out.y for out in outputs[1:]), start=outputs[0].y)
        aux = join_aux({str(i): out.aux for i, out in enumerate(outputs)})
        return Output(y, tuple(out.state for out in outputs), aux)
