"""Memory as a gate: attention over a window beside a memory of everything."""

from functools import partial

from jaxtyping import Float
from torch import Tensor

from mneme.layers.hybrid.memory_with_attention import BranchGate, WindowState, _MemoryWithWindow
from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.protocol import LayerFactory, Output, join_aux
from mneme.layers.registry import register


@register(
    default={"memory": partial(GatedDeltaNet, heads=2), "heads": 2, "window": 5, "persistent": 3},
    not_persistent={
        "memory": partial(GatedDeltaNet, heads=1, conv_size=1),
        "heads": 2,
        "window": 4,
        "persistent": 0,
    },
)
class MemoryAsGate(_MemoryWithWindow):
    """The gate ("MAG") of Titans (arXiv 2501.00663, section 4.2): two readers of the same input.

    With `x~ = [p_1 .. p_P ; x]`, persistent tokens p before the sequence,

        y = SW-Attn(x~),    m = M(x~),    o = gate(y, m)

    * attention is precise about the last `window` tokens and sees p from everywhere;
    * the memory reads every token and, before the first, has read p: the same parameters.

    Args:
        d_model: width D.
        memory: recipe of the memory M; any layer will do.
        heads: of the attention; default 4.
        window: tokens that attention sees, the current one included; default 64.
        persistent: learned tokens P before the sequence; default 4.

    State: that of the memory, and of sliding-window attention (`SoftmaxAttention`).

    Where the paper is silent: the gate is that of `BranchGate`. Persistent tokens start with unit
    variance, the scale of the normalized input that they are put before, and carry no position.

    Raises:
        ValueError: sizes that attention or the memory refuses.
    """

    def __init__(
        self,
        d_model: int,
        *,
        memory: LayerFactory,
        heads: int = 4,
        window: int = 64,
        persistent: int = 4,
    ) -> None:
        super().__init__(d_model, memory=memory, heads=heads, window=window, persistent=persistent)
        self.gate = BranchGate(d_model)

    def forward(self, x: Float[Tensor, "b t d"], state: WindowState | None = None) -> Output:
        """Gates what attention sees in the window by what the memory answers."""
        state = self.init_state(len(x)) if state is None else state
        y, cache, _ = self.attention(x, state.attention)
        m, memory, aux = self.memory(x, state.memory)
        return Output(
            self.gate(y, m),
            WindowState(memory, cache),
            join_aux({"memory": aux}),
        )
