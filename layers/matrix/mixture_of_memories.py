"""Mixture of memories: several matrix memories, of which each token writes and reads a few."""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mneme.layers.matrix.gated_delta_net import GatedDeltaNet
from mneme.layers.matrix.matrix_memory import MatrixMemory, MatrixState, Operands
from mneme.layers.parts.precision import at_least_fp32
from mneme.layers.parts.short_convolution import ConvState, ShortConvolution
from mneme.layers.parts.telemetry import observe
from mneme.layers.protocol import (
    LayerFactory,
    Memory,
    Output,
    map_state,
    require_at_least,
    state_tensors,
)
from mneme.layers.registry import register
from mneme.ops.contract import in_graph_of
from mneme.ops.routing import (
    Dispatch,
    Routes,
    balance_loss,
    combine,
    dispatch,
    plan_dispatch,
    route,
    router_logits,
    router_telemetry,
    spread,
    z_loss,
)

_HASH = 0x45D9F3B  # odd; products of it and 32 bits fit into 64


class MixtureState(NamedTuple):
    """What a mixture carries.

    Attributes:
        memories: of each memory, `[B, M, ...]`.
        tails: of each memory's convolution, `[B, M, conv_size - 1, C]`.
        shared: of the memory that every token writes; empty without.
        conv: the tail of a convolution before routing, `[B, conv_size - 1, D]`; empty without.
        position: `[B]`, tokens seen, where rotary positions or a random router need it.
    """

    memories: Any
    tails: Tensor
    shared: tuple[MatrixState, ...]
    conv: tuple[ConvState, ...]
    position: tuple[Tensor, ...]


@register(
    default={"memory": partial(GatedDeltaNet, heads=2)},
    alone={"memory": partial(GatedDeltaNet, heads=2), "shared": False, "top_k": 1},
    convolved_before={
        "memory": partial(GatedDeltaNet, heads=1),
        "convolve": "before",
        "memories": 3,
        "z_loss": 1e-3,
    },
    random={"memory": partial(GatedDeltaNet, heads=1, conv_size=1), "router": "random"},
    single_projection={
        "memory": partial(GatedDeltaNet, heads=1),
        "convolve": "before",
        "single_projection": True,
    },
)
class MixtureOfMemories(Memory):
    """Mixture-of-Memories (arXiv 2502.13685) around any matrix memory.

    A router `p_t = softmax(W_r x_t)` sends each token to its k likeliest memories I_t, with weights
    `w_t = p_t[I_t] / sum p_t[I_t]`. Only those are written, and time stands still for the others:

        S^m_t = rule(S^m_{t-1}, k^m_t, v^m_t, gates^m_t)    for m in I_t, else S^m_{t-1}
        o_t = sum_{m in I_t} w^m_t read(S^m_t, q_t) + read(S^shared_t, q_t)

    Each memory has its own projection of keys, values and gates, or all have one. Queries, the
    convolution, all biases, the gates' rates, and all that follows the read, are shared. Tokens are
    sorted by memory into sequences of their own, so that the memories of all rows are one batched
    call of the base's rule; no memory sees what goes to another, nor to another row.

    Args:
        d_model: width D.
        memory: a matrix memory; its own projections are those of the shared memory, or of the first
            routed one if there is none.
        memories: M; default 4.
        top_k: k; default 2. With 1 all weights are one and the router learns from its losses alone.
        shared: a memory that every token writes, with weight one; default True.
        convolve: the memory's short convolution runs "after" routing (default), over the tokens of
            one memory, as in the paper; or "before", over the layer's input in the order of the
            text, in place of it, and the router sees what it gives. After routing, a token's
            neighbors are not those in the text, and keys cannot count on the token before.
        single_projection: one projection of keys, values and gates for all memories, which differ
            in the tokens that they get alone (`single_kv_proj` of the released code); default
            False.
        router: "learned" (default), or "random", which ignores the token: a hash of its position,
            to measure what routing is worth. It has no losses.
        balance_loss: weight of the loss `M sum_m f_m P_m`, f_m the share of the tokens that goes to
            m and P_m its mean probability; k if loads are even; default 0.01.
        z_loss: weight of the mean squared log partition of the router's logits; default 0.

    State: M times that of the memory, the shared one's, and a convolution's tail each.

    Where we differ: the paper's memory is Gated DeltaNet, ours is any; its router sees the layer's
    input, ours, with the convolution "before", what that gives; its balance loss of 0.001
    and 0.01 are both published, and both were within noise there. P_m is the mean of the router's
    whole softmax, as in Switch Transformers and the released code for packed sequences; the
    released code without dispatch takes the renormalized weights of the k chosen in its place, from
    which a router with k = 1 would learn nothing. The loss is each layer's own, where the packed
    code pools the layers. The released code convolves across the bounds of the memories'
    sequences in training; ours does not.

    Raises:
        ValueError: a memory that is no matrix memory, or more choices than memories.
    """

    def __init__(
        self,
        d_model: int,
        *,
        memory: LayerFactory,
        memories: int = 4,
        top_k: int = 2,
        shared: bool = True,
        convolve: Literal["after", "before"] = "after",
        single_projection: bool = False,
        router: Literal["learned", "random"] = "learned",
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least(1, memories=memories, top_k=top_k)
        require_at_least(0, balance_loss=balance_loss, z_loss=z_loss)
        if top_k > memories:
            raise ValueError(f"top_k ({top_k}) must be at most memories ({memories})")
        base = memory(d_model)
        if not isinstance(base, MatrixMemory):
            raise ValueError(
                f"memory must be a matrix memory, such as GatedDeltaNet; {type(base).__name__} "
                "has no matrix as its state"
            )
        self.base, self.memories, self.top_k, self.shared = base, memories, top_k, shared
        self.balance_loss, self.z_loss = balance_loss, z_loss
        self.conv = None
        if convolve == "before" and base.conv is not None:
            taps = base.conv.weight.shape[1]
            bias = base.conv.bias is not None
            self.conv = ShortConvolution(d_model, conv_size=taps, bias=bias)
            base.conv = None
        self.router = None
        if router == "learned" and memories > 1:
            self.router = nn.Linear(d_model, memories, bias=False)
        self.single_projection = single_projection
        self.write_proj = None
        own = 0 if single_projection else memories - (not shared)
        if own:
            rows = base.in_proj.out_features - base.widths[0]
            self.write_proj = nn.Parameter(torch.empty(own, rows, d_model))
            nn.init.uniform_(self.write_proj, -(d_model**-0.5), d_model**-0.5)  # as base.in_proj

    def forward(self, x: Float[Tensor, "b t d"], state: MixtureState | None = None) -> Output:
        """Writes each token into its memories and reads them with its query."""
        state = self.init_state(len(x)) if state is None else state
        if x.numel() == 0:  # there is nothing to write, and no sequence to dispatch
            return self._nothing(x, state)
        text, conv = self._convolved(x, state.conv)
        logits = self._logits(text, state.position)
        routes = route(logits, self.top_k)
        y, memories, tails = self._routed(text, routes, state)
        shared = state.shared
        if self.shared:
            read, last = self.base.read_written(text, state.shared[0])
            y, shared = y + read, (last,)
        self._observe(routes)
        position = tuple(p + x.shape[1] for p in state.position)
        after = MixtureState(memories, tails, shared, conv, position)
        return Output(self.base.readout(y, x), after, self._aux(routes, logits))

    def recall(
        self, x: Float[Tensor, "b t d"], state: MixtureState | None = None
    ) -> Float[Tensor, "b t d"]:
        """What the routed memories of each token, and the shared one, hold for its query."""
        state = self.init_state(len(x)) if state is None else state
        routes = route(self._logits(x, state.position, advance=False), self.top_k)
        weights = spread(routes)
        q = self.base.queries(x, self._places(state))
        reads = [
            self.base.read(q, map_state(partial(torch.select, dim=1, index=m), state.memories))
            for m in range(self.memories)
        ]
        y = torch.einsum("mbthv,btm->bthv", torch.stack(reads), weights.to(reads[0].dtype))
        if self.shared:
            y = y + self.base.read(q, state.shared[0].memory)
        return self.base.readout(y, x)

    def init_state(self, batch_size: int) -> MixtureState:
        """Empty memories, zeros as the convolutions' tails, and position 0."""
        one = self.base.init_state(batch_size)
        memories = map_state(lambda s: s.unsqueeze(1).repeat_interleave(self.memories, 1), one)
        position = one.position
        if self.router is None and self.memories > 1:
            device = self.base.out_proj.weight.device
            position = (torch.zeros(batch_size, dtype=torch.long, device=device),)
        conv = () if self.conv is None else (self.conv.init_state(batch_size),)
        shared = (one,) if self.shared else ()
        return MixtureState(memories.memory, memories.conv.tail, shared, conv, position)

    def state_size(self, seq_len: int) -> int:
        """That of the memories, whatever the length."""
        return sum(t.numel() for t in state_tensors(self.init_state(1)))

    def active_parameters(self) -> int:
        """All but the projections of the memories that a token does not go to."""
        held = sum(p.numel() for p in self.parameters())
        if self.write_proj is None:
            return held
        return held - (self.memories - self.top_k) * self.write_proj[0].numel()

    def _convolved(
        self, x: Tensor, state: tuple[ConvState, ...]
    ) -> tuple[Tensor, tuple[ConvState, ...]]:
        """The input after the convolution before routing, if there is one."""
        if self.conv is None:
            return x, ()
        y, conv, _ = self.conv(x, state[0])
        return y, (conv,)

    def _places(self, state: MixtureState) -> tuple[Tensor, ...]:
        """Positions, where the memory rotates queries and keys to them."""
        return () if self.base.rotary_base is None else state.position

    def _logits(self, x: Tensor, position: tuple[Tensor, ...], *, advance: bool = True) -> Tensor:
        """The router's logits `[B, T, M]`, in at least fp32."""
        if self.router is not None:
            return router_logits(x, self.router.weight)
        if self.memories == 1:
            return at_least_fp32(x.new_zeros(*x.shape[:2], 1))
        places = position[0][:, None] + torch.arange(x.shape[1], device=x.device) * advance
        memory = torch.arange(self.memories, device=x.device)
        return _hashed(places[..., None] * self.memories + memory, at_least_fp32(x).dtype)

    def _routed(self, x: Tensor, routes: Routes, state: MixtureState) -> tuple[Tensor, Any, Tensor]:
        """Weighted reads `[B, T, H, V]` of the routed memories, and what they hold after."""
        plan = plan_dispatch(routes.memory, self.memories, multiple=self.base.chunk_size)
        operands, tails = self._operands(x, plan, state)
        memories = map_state(_by_memory, state.memories)
        y, memories = self.base.rule(operands.masked(plan.present), memories)
        heads = y.shape[2:]
        y = combine(y.flatten(2), plan, routes.weight).unflatten(-1, heads)
        batch = len(x)
        return y, map_state(lambda s: _by_row(s, batch), memories), _by_row(tails, batch)

    def _operands(self, x: Tensor, plan: Dispatch, state: MixtureState) -> tuple[Operands, Tensor]:
        """What the rule takes of the packed tokens, and the convolutions' tails after them."""
        base = self.base
        q, kv, raw = self._projected(x, plan)
        inputs, tails = torch.cat([q, kv], -1), _by_memory(state.tails)
        qkv, _ = base.convolve(inputs, ConvState(tails))
        tails = _tails_after(tails, inputs, plan.tokens)
        positions = base.positions(self._places(state), x.shape[1])
        if positions is not None:
            positions = dispatch(positions[..., None], plan)[..., 0]
        return base.operands(qkv, raw, positions), tails

    def _projected(self, x: Tensor, plan: Dispatch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys with values, and the gates' logits of the packed tokens."""
        weight, bias = self.base.in_proj.weight, self.base.in_proj.bias
        queries, keys, values = self.base.widths
        if self.write_proj is None:
            every = dispatch(self.base.in_proj(x), plan)
            q, kv, raw = every.tensor_split([queries, queries + keys + values], dim=-1)
            return q, kv, raw
        first = [] if self.shared else [weight[queries:][None]]
        rows = rearrange(dispatch(x, plan), "(m b) l d -> m (b l) d", b=len(x))
        writes = rearrange(
            torch.bmm(rows, torch.cat([*first, self.write_proj]).mT),
            "m (b l) w -> (m b) l w",
            b=len(x),
        )
        if bias is not None:
            writes = writes + bias[queries:]
        kv, raw = writes.tensor_split([keys + values], dim=-1)
        return dispatch(self.base.project_queries(x), plan), kv, raw

    def _nothing(self, x: Tensor, state: MixtureState) -> Output:
        """The output of no token: the sort by memory needs one."""
        logits = self._logits(x, state.position)
        routes = route(logits, self.top_k)
        self._observe(routes)
        return Output(in_graph_of(x, *self.parameters()), state, self._aux(routes, logits))

    def _aux(self, routes: Routes, logits: Tensor) -> dict[str, Tensor]:
        """Losses of a router that learns, and how evenly it loads the memories."""
        if self.memories == 1:
            return {}
        aux = router_telemetry(routes)
        if self.router is None:
            return aux
        if self.balance_loss:
            aux["loss_balance"] = self.balance_loss * balance_loss(routes)
        if self.z_loss:
            aux["loss_z"] = self.z_loss * z_loss(logits)
        return aux

    def _observe(self, routes: Routes) -> None:
        """Weight of every memory for each token, `[B, T, M]`."""
        observe(self, "route", spread(routes))


def _hashed(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers to fractions from -1 to 1 without a pattern: their bits shifted and multiplied."""
    for _ in range(2):
        integers = (integers ^ (integers >> 16)) * _HASH & 0xFFFFFFFF
    return ((integers ^ (integers >> 16)).double() / 2**31 - 1).to(dtype)


def _by_memory(state: Tensor) -> Tensor:
    """`[B, M, ...]` to one row per packed sequence, `[M * B, ...]`."""
    return state.transpose(0, 1).flatten(0, 1)


def _by_row(state: Tensor, batch: int) -> Tensor:
    """`[M * B, ...]` to `[B, M, ...]`."""
    return state.unflatten(0, (-1, batch)).transpose(0, 1)


def _tails_after(tails: Tensor, inputs: Tensor, count: Tensor) -> Tensor:
    """The last inputs of each sequence that hold a token, some of them from before."""
    width = tails.shape[1]
    place = count[:, None] + torch.arange(width, device=count.device)  # in tails, then inputs
    inside = (place - width).clamp(min=0)[..., None].expand(-1, -1, inputs.shape[-1])
    before = place.clamp(max=width - 1)[..., None].expand_as(inside)
    new = inputs.gather(1, inside)
    return torch.where((place < width)[..., None], tails.gather(1, before), new) if width else new
