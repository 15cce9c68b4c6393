"""What matrix memories share: projections, convolution, and a state of one matrix per head.

A layer of the family says how keys and queries look (`features`), what its gates are (`gates`) and
which op writes and reads (`rule`). A call goes from `forward` through `read_written` (projection,
convolution, `operands`) to `rule`, and back through `readout`. They are methods of their own,
because a mixture of memories runs them for many memories at once: `operands` and `rule` on tokens
sorted by memory, everything else on the text.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.parts.norm import NORM_EPS, RMSNorm
from mneme.layers.parts.short_convolution import ConvState, ShortConvolution
from mneme.layers.protocol import Memory, Output, require_at_least, state_tensors
from mneme.ops.contract import without_autocast


class MatrixState(NamedTuple):
    """What a matrix memory carries.

    Attributes:
        memory: `[B, H, K, V]`, fp32 (fp64 in fp64): one row per key feature; or a tuple of tensors
            of a rule that holds more.
        conv: the convolution's tail, `[B, conv_size - 1, 2 G K + H V]`.
        position: `[B]`, tokens seen; empty without rotary positions.
    """

    memory: Any
    conv: ConvState
    position: tuple[Int[Tensor, " b"], ...] = ()


class Operands(NamedTuple):
    """What a rule works with, `[B, T, ...]`.

    Attributes:
        q: queries `[B, T, G, K]`, with G = H unless heads share them.
        k: keys, alike.
        v: values `[B, T, H, V]`.
        log_decay: `[B, T, H]`, or `[B, T, H, K]` per key feature; None for a memory that keeps all.
        beta: the delta rule's learning rate of each write, `[B, T, H]`; None for one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None

    def masked(self, present: Bool[Tensor, "b t"]) -> "Operands":
        """The same with tokens that leave the memory as it is where `present` is false."""
        k = self.k * present[..., None, None]
        g = self.log_decay
        if g is not None:
            g = torch.where(present.view(*present.shape, *[1] * (g.ndim - 2)), g, 0.0)
        return self._replace(k=k, log_decay=g)


class MatrixMemory(Memory):
    """Base of the layers whose state is a matrix `S [K, V]` per head.

    One linear layer gives queries, keys, values and what the gates need; the rule writes and reads;
    what is read is normalized per head, multiplied by `silu(W_g x)` and projected.

    Args:
        d_model: width D.
        heads: H.
        key_dim: width of a head's queries and keys.
        value_dim: width V of a head's values.
        groups: G, heads of queries and keys; default H.
        gates: outputs of the linear layer that the gates need of each token.
        conv_size: taps of the short convolution over q, k and v; 1 for none.
        conv_bias: a bias of that convolution.
        bias: biases of the linear layers.
        norm_eps: epsilon of the RMSNorm of what is read, per head; None for no norm.
        output_gate: multiply what is read by `silu(W_g x)`.

    Raises:
        ValueError: sizes below one.
    """

    rotary_base: float | None = None
    """Wavelength base if keys and queries are rotated to their positions."""

    chunk_size: int = 64
    """Tokens per tile of the rule's chunked form, which changes speed, not the function."""

    silu: bool = False
    """SiLU on q, k and v after the convolution."""

    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        key_dim: int,
        value_dim: int,
        groups: int | None = None,
        gates: int = 0,
        conv_size: int = 1,
        conv_bias: bool = False,
        bias: bool = False,
        norm_eps: float | None = NORM_EPS,
        output_gate: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads, key_size_of_a_head=key_dim, value_size_of_a_head=value_dim)
        self.heads, self.groups = heads, heads if groups is None else groups
        self.key_dim, self.value_dim = key_dim, value_dim
        keys, values = self.groups * key_dim, heads * value_dim
        self.widths = keys, keys, values
        self.in_proj = nn.Linear(d_model, 2 * keys + values + gates, bias=bias)
        self.conv = None
        if conv_size != 1:
            self.conv = ShortConvolution(2 * keys + values, conv_size=conv_size, bias=conv_bias)
        self.gate_proj = nn.Linear(d_model, values, bias=bias) if output_gate else None
        self.norm = None if norm_eps is None else RMSNorm(value_dim, norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=bias)

    # What a layer of the family defines.

    def features(
        self, x: Float[Tensor, "b t g k"], positions: Tensor | None
    ) -> Float[Tensor, "b t g f"]:
        """The feature map of queries and keys; the identity here."""
        return x

    def gates(self, raw: Float[Tensor, "b t n"]) -> dict[str, Tensor]:
        """`log_decay` and `beta`, whichever the rule has, from the gates' part of `in_proj(x)`."""
        return {}

    def rule(self, operands: Operands, memory: Any) -> tuple[Float[Tensor, "b t h v"], Any]:
        """What each token reads after it has written, and the memory after the last."""
        raise TypeError(f"{type(self).__name__} does not define rule")

    def read(self, q: Float[Tensor, "b t g f"], memory: Any) -> Float[Tensor, "b t h v"]:
        """Every query against the same memory: `q S / sqrt(K)`."""
        return read_matrix(q, memory)

    def empty(self, batch_size: int) -> Any:
        """Zeros `[B, H, F, V]`, or what else the rule starts from."""
        weight = self.out_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (batch_size, self.heads, self.feature_dim, self.value_dim)
        return weight.new_zeros(shape, dtype=dtype)

    @property
    def feature_dim(self) -> int:
        """Rows of the memory: the width of a key's features."""
        return self.key_dim

    # The stages of a call.

    def operands(self, qkv: Tensor, raw: Tensor, positions: Tensor | None) -> Operands:
        """From convolved queries, keys and values and the gates' logits to what a rule takes."""
        if self.silu:
            qkv = F.silu(qkv)
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = (rearrange(t, "b t (g k) -> b t g k", g=self.groups) for t in (q, k))
        v = rearrange(v, "b t (h v) -> b t h v", h=self.heads)
        q, k = self.features(q, positions), self.features(k, positions)
        return Operands(q, k, v, **self.gates(raw))

    def readout(
        self, y: Float[Tensor, "b t h v"], x: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        """What was read as an output: normalized per head, gated by `x`, mixed."""
        y = y.to(self.out_proj.weight.dtype)
        y = rearrange(y if self.norm is None else self.norm(y), "b t h v -> b t (h v)")
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y)

    def forward(self, x: Float[Tensor, "b t d"], state: MatrixState | None = None) -> Output:
        """Writes each token into the memory and reads the memory with its query."""
        state = self.init_state(len(x)) if state is None else state
        y, state = self.read_written(x, state)
        return Output(self.readout(y, x), state)

    @property
    def saved_dim(self) -> int:
        """Width of what is read: the values of all heads."""
        return self.widths[2]

    def forward_saving(
        self, x: Float[Tensor, "b t d"], state: MatrixState | None = None
    ) -> tuple[Output, Float[Tensor, "b t m"]]:
        """As `forward`, with what was read, before it is normalized and gated."""
        state = self.init_state(len(x)) if state is None else state
        y, state = self.read_written(x, state)
        saved = rearrange(y.to(self.out_proj.weight.dtype), "b t h v -> b t (h v)")
        return Output(self.readout(y, x), state), saved

    def read_written(
        self, x: Float[Tensor, "b t d"], state: MatrixState
    ) -> tuple[Float[Tensor, "b t h v"], MatrixState]:
        """What each token reads after it has written, and the state after the last."""
        qkv, raw = self.in_proj(x).tensor_split([sum(self.widths)], dim=-1)
        qkv, conv = self.convolve(qkv, state.conv)
        operands = self.operands(qkv, raw, self.positions(state.position, x.shape[1]))
        y, memory = self.rule(operands, state.memory)
        position = tuple(p + x.shape[1] for p in state.position)
        return y, MatrixState(memory, conv, position)

    def recall(
        self, x: Float[Tensor, "b t d"], state: MatrixState | None = None
    ) -> Float[Tensor, "b t d"]:
        """What the memory as it stands, neither decayed nor corrected, holds for `x`'s queries."""
        state = self.init_state(len(x)) if state is None else state
        return self.readout(self.read(self.queries(x, state.position), state.memory), x)

    def init_state(self, batch_size: int) -> MatrixState:
        """An empty memory, zeros as the convolution's tail, and position 0."""
        conv = ConvState(self.out_proj.weight.new_zeros(batch_size, 0, sum(self.widths)))
        if self.conv is not None:
            conv = self.conv.init_state(batch_size)
        if self.rotary_base is None:
            return MatrixState(self.empty(batch_size), conv)
        start = torch.zeros(batch_size, dtype=torch.long, device=self.out_proj.weight.device)
        return MatrixState(self.empty(batch_size), conv, (start,))

    def state_size(self, seq_len: int) -> int:
        """Memory, convolution tail and position, whatever the length."""
        memory = sum(t.numel() for t in state_tensors(self.empty(1)))
        tail = 0 if self.conv is None else self.conv.state_size(seq_len)
        return memory + tail + (self.rotary_base is not None)

    def queries(
        self, x: Float[Tensor, "b t d"], position: tuple[Tensor, ...]
    ) -> Float[Tensor, "b t g f"]:
        """Queries without the convolution, all at the place of the next token."""
        q = self.project_queries(x)
        q = rearrange(F.silu(q) if self.silu else q, "b t (g k) -> b t g k", g=self.groups)
        positions = repeat(position[0], "b -> b t", t=x.shape[1]) if position else None
        return self.features(q, positions)

    def project_queries(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... n"]:
        """Queries without the convolution, by the first rows of `in_proj`, heads side by side."""
        weight, bias = self.in_proj.weight, self.in_proj.bias
        n = self.widths[0]
        return F.linear(x, weight[:n], None if bias is None else bias[:n])

    def convolve(self, qkv: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        """The short convolution, if there is one."""
        if self.conv is None:
            return qkv, state
        y, conv, _ = self.conv(qkv, state)
        return y, conv

    def positions(self, position: tuple[Tensor, ...], tokens: int) -> Tensor | None:
        """Positions `[B, T]` of the next tokens, where they matter."""
        if not position:
            return None
        return position[0][:, None] + torch.arange(tokens, device=position[0].device)


@without_autocast
def read_matrix(
    q: Float[Tensor, "b t g k"], memory: Float[Tensor, "b h k v"], scale: float | None = None
) -> Tensor:
    """Every query against the same memory, in its precision, times `scale`, K**-0.5 by default."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = repeat(q, "b t g k -> b t (g n) k", n=memory.shape[1] // q.shape[2])
    return torch.einsum("bthk,bhkv->bthv", q.to(memory.dtype), memory) * scale


def head_size(d_model: int, heads: int) -> int:
    """Width of a head.

    Raises:
        ValueError: heads that do not divide the width.
    """
    require_at_least(1, heads=heads)
    if d_model % heads:
        raise ValueError(f"heads ({heads}) must divide d_model ({d_model}), or give head_dim")
    return d_model // heads
