"""Gated DeltaNet: a matrix memory that forgets by a gate and corrects what it already holds."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layers.protocol import Memory, Output, require_at_least
from layers.registry import register
from layers.short_convolution import ConvState, ShortConvolution
from ops.gated_delta import gated_delta
from ops.precision import without_autocast

MAX_DECAY_RATE = 16.0  # A ~ U(0, 16), as in the released code of Mamba-2 and Gated DeltaNet
STEP_RANGE = (1e-3, 1e-1)  # the step starts log-uniform here, so half-lives spread over decades


class GatedDeltaState(NamedTuple):
    """The memory and the last inputs of the convolution over q, k and v.

    Attributes:
        memory: `[B, H, K, V]`, fp32 (fp64 in fp64): one row per key feature.
        conv: the convolution's tail, `[B, conv_size - 1, 2 H K + H V]`.
    """

    memory: Float[Tensor, "b h k v"]
    conv: ConvState


@register(
    default={"heads": 2},
    wide_values={"heads": 2, "expand_v": 2.0, "chunk_size": 4},
    negative_eigenvalues={"heads": 2, "head_dim": 4, "negative_eigenvalues": True},
    bare={"heads": 1, "conv_size": 1, "output_gate": False},
)
class GatedDeltaNet(Memory):
    """The gated delta rule of "Gated Delta Networks" (arXiv 2412.06464).

    Per head, `S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`,
    `o_t = S_t^T q_t / sqrt(K)`, with

    * q, k, v: projection, short causal convolution, SiLU; q and k are then L2-normalised;
    * decay `log a_t = -exp(A_log) softplus(w_a . x_t + dt_bias)`, in fp32;
    * write strength `b_t = sigmoid(w_b . x_t)`;
    * output: RMSNorm per head, times `silu(W_g x_t)`, then the output projection.

    Args:
        d_model: width D.
        heads: H; default 4.
        head_dim: key size K of a head; default D / H.
        expand_v: value size over key size, V / K; default 1.
        conv_size: taps of the short convolution; default 4; 1 leaves each token alone.
        negative_eigenvalues: doubles b, so that a write can flip the sign of what a key holds
            (arXiv 2411.12537); default False.
        output_gate: multiply the output by `silu(W_g x)`; default True.
        chunk_size: tokens per tile of the chunked form; changes speed, not the function.

    State: `H K V` memory scalars and `(conv_size - 1)(2 H K + H V)` of the convolution.

    Where we differ: the paper's model has K = 256, 0.75 D key features and V = 2K; ours are set by
    `head_dim` and `expand_v`. The decay rates A are drawn stratified, one per head from equal parts
    of (0, 16), because with the two to four heads of small models independent draws dominate the
    variance between seeds. One convolution runs over the concatenated q, k and v, which is the same
    function as three.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        output_gate: bool = True,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads)
        if head_dim is None and d_model % heads:
            raise ValueError(f"heads ({heads}) must divide d_model ({d_model}), or give head_dim")
        self.heads, self.chunk_size = heads, chunk_size
        self.key_dim = d_model // heads if head_dim is None else head_dim
        self.value_dim = int(self.key_dim * expand_v)
        require_at_least(1, head_dim=self.key_dim, value_size_of_a_head=self.value_dim)
        self.max_strength = 2.0 if negative_eigenvalues else 1.0
        keys, values = heads * self.key_dim, heads * self.value_dim
        self.qkv_proj = nn.Linear(d_model, 2 * keys + values, bias=False)
        self.conv = ShortConvolution(2 * keys + values, conv_size=conv_size)
        self.decay_proj = nn.Linear(d_model, heads, bias=False)
        self.strength_proj = nn.Linear(d_model, heads, bias=False)
        self.gate_proj = nn.Linear(d_model, values, bias=False) if output_gate else None
        self.norm = nn.RMSNorm(self.value_dim)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.A_log = nn.Parameter(_stratified_rates(heads).log())
        self.dt_bias = nn.Parameter(_inverse_softplus(_log_uniform(heads, *STEP_RANGE)))

    def forward(self, x: Float[Tensor, "b t d"], state: GatedDeltaState | None = None) -> Output:
        """Writes each token into the memory and reads the memory with its query."""
        qkv, conv, _ = self.conv(self.qkv_proj(x), None if state is None else state.conv)
        q, k, v = self._split_heads(F.silu(qkv))
        y, memory = gated_delta(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            self._log_decay(x),
            self.max_strength * _at_least_fp32(self.strength_proj(x)).sigmoid(),
            None if state is None else state.memory,
            chunk_size=self.chunk_size,
        )
        return Output(self._answer(y, x), GatedDeltaState(memory, conv))

    def recall(
        self, x: Float[Tensor, "b t d"], state: GatedDeltaState | None = None
    ) -> Float[Tensor, "b t d"]:
        """`S^T q / sqrt(K)` of the memory as it is: neither decayed nor corrected."""
        state = self.init_state(len(x)) if state is None else state
        queries = F.linear(x, self.qkv_proj.weight[: self.heads * self.key_dim])
        q = rearrange(F.silu(queries), "b t (h k) -> b t h k", h=self.heads)
        return self._answer(_read(F.normalize(q, dim=-1), state.memory), x)

    def init_state(self, batch_size: int) -> GatedDeltaState:
        """An empty memory."""
        dtype = torch.promote_types(self.out_proj.weight.dtype, torch.float32)
        shape = (batch_size, self.heads, self.key_dim, self.value_dim)
        memory = self.out_proj.weight.new_zeros(shape, dtype=dtype)
        return GatedDeltaState(memory, self.conv.init_state(batch_size))

    def state_size(self, seq_len: int) -> int:
        """Memory and convolution tail, whatever the length."""
        return self.heads * self.key_dim * self.value_dim + self.conv.state_size(seq_len)

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        q, k, v = qkv.split([keys, keys, values], dim=-1)
        q, k, v = (rearrange(t, "b t (h k) -> b t h k", h=self.heads) for t in (q, k, v))
        return q, k, v

    def _answer(self, y: Tensor, x: Tensor) -> Tensor:
        """What was read `[B, T, H, V]` as an output: normalised per head, gated by `x`, mixed."""
        y = rearrange(self.norm(y.to(self.norm.weight.dtype)), "b t h v -> b t (h v)")
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y)

    def _log_decay(self, x: Tensor) -> Tensor:
        step = F.softplus(_at_least_fp32(self.decay_proj(x)) + self.dt_bias)
        return -_at_least_fp32(self.A_log).exp() * step


@without_autocast
def _read(q: Float[Tensor, "b t h k"], memory: Float[Tensor, "b h k v"]) -> Tensor:
    """Every query against the same memory, in its precision."""
    return torch.einsum("bthk,bhkv->bthv", q.to(memory.dtype), memory) * q.shape[-1] ** -0.5


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _stratified_rates(heads: int) -> Tensor:
    """One decay rate per head, from equal parts of (0, MAX_DECAY_RATE), kept off zero."""
    rates = (torch.arange(heads) + torch.rand(heads)) * (MAX_DECAY_RATE / heads)
    return rates.clamp(min=1e-3)  # log(0) would make a head's decay untrainable


def _log_uniform(size: int, low: float, high: float) -> Tensor:
    return torch.exp(torch.empty(size).uniform_(math.log(low), math.log(high)))


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))
