"""Memory as a layer: attention over a window of what a memory answered."""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.hybrid.memory_with_attention import WindowState, _MemoryWithWindow
from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.parts.norm import RMSNorm
from mneme.layers.protocol import LayerFactory, Output, join_aux
from mneme.layers.registry import register

PERSISTENT_STD = 0.1  # with 1, attention's own, a small model learnt to recall much more slowly


@register(
    default={"memory": partial(GatedDeltaNet, heads=2), "heads": 2, "window": 5, "persistent": 3},
    not_persistent={
        "memory": partial(GatedDeltaNet, heads=1, conv_size=1),
        "heads": 2,
        "window": 4,
        "persistent": 0,
    },
)
class MemoryAsLayer(_MemoryWithWindow):
    """The layer ("MAL") of Titans (arXiv 2501.00663, section 4.3): attention after a memory.

    With `x~ = [p_1 .. p_P ; x]`, persistent tokens p before the sequence,

        m = M(x~),    o = SW-Attn([p ; norm(m)])

    The memory condenses the past into each token before attention looks at the last `window` of
    them; what lies further back reaches the output through the memory alone.

    Args:
        d_model: width D.
        memory: recipe of the memory M; any layer will do.
        heads: of the attention; default 4.
        window: tokens that attention sees, the current one included; default 64.
        persistent: learned tokens P before the sequence; default 4.

    State: that of the memory, and of sliding-window attention (`SoftmaxAttention`).

    Where we differ: attention sees the persistent tokens themselves, where the paper's equations
    give it the memory's answers to them. Either is one learned vector per token, the same in every
    sequence, but the answers would have to be worked out again at every call. And an RMSNorm
    stands between memory and attention, so that the answers have unit scale whatever the memory's
    own output projection does. The layer ends in attention's `out_proj`.

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
        self.norm = RMSNorm(d_model)
        if self.attention.persistent is not None:
            nn.init.normal_(self.attention.persistent, std=PERSISTENT_STD)

    def forward(self, x: Float[Tensor, "b t d"], state: WindowState | None = None) -> Output:
        """Attends to what the memory answers."""
        state = self.init_state(len(x)) if state is None else state
        m, memory, aux = self.memory(x, state.memory)
        y, cache, _ = self.attention(self.norm(m.to(self.norm.weight.dtype)), state.attention)
        return Output(y, WindowState(memory, cache), join_aux({"memory": aux}))
