"""The gated short convolution that "Zoology" puts before the mixer under test."""

from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.parts.short_convolution import ConvState, ShortConvolution
from mneme.layers.protocol import Layer, Output
from mneme.layers.registry import register


@register(default={"conv_size": 3})
class GatedConvolution(Layer):
    """`y = (conv(x) + c) * (W x + b) + x`: BaseConv of "Zoology" (arXiv 2312.04927), short.

    As the first layer of a recall model it moves each key next to its value, so that what follows
    is compared on recall rather than on learning to shift. As in the public code, the layer adds
    its own input, so inside a `Residual` the stream also receives its normalized self.

    Args:
        d_model: width D.
        conv_size: taps of the causal depthwise convolution; default 3.
    """

    def __init__(self, d_model: int, *, conv_size: int = 3) -> None:
        super().__init__()
        self.conv = ShortConvolution(d_model, conv_size=conv_size, bias=True)
        self.gate_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "b t d"], state: ConvState | None = None) -> Output:
        """Gates the convolved input by a projection of the current token."""
        y, state, _ = self.conv(x, state)
        return Output(y * self.gate_proj(x) + x, state)

    def init_state(self, batch_size: int) -> ConvState:
        """Zeros before the first token."""
        return self.conv.init_state(batch_size)

    def state_size(self, seq_len: int) -> int:
        """That of the convolution."""
        return self.conv.state_size(seq_len)
