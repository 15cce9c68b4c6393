"""One residual stack for every layer: embedding, blocks, final norm, head."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mneme.layers import (
    Fetched,
    Layer,
    LayerFactory,
    LayerList,
    Output,
    Residual,
    RoutedPart,
    Sequential,
    SharedPart,
    State,
    bind_part,
    bind_shared_parts,
    join_aux,
    own_part,
    shared_places,
    start_state,
)
from mneme.layers.parts.norm import RMSNorm
from mneme.layers.protocol import require_at_least
from mneme.layers.state_fit import Stateful

MOST_LAYERS = 10_000  # ten times the deepest that are known; a million would build for hours
EMBEDDING_STD = 0.02  # GPT-2's; with a tied head it keeps the first logits near zero


class LanguageModel(Stateful):
    """Maps tokens to logits through residual layers, with the state of all of them carried.

    Block `i` is `pattern[i % len(pattern)]`, a list of layers each applied as
    `x + layer(norm(x))`; so one attention block in four is a pattern of four blocks. The model
    obeys the split rule of its layers: feeding a sequence in pieces with the state carried gives
    the logits of feeding it whole.

    Parts that layers share belong to the model, under the name that the layers give them
    (`mneme.layers.parts.shared`): tables as `tables.NAME`, a memory bank as `bank`.

    Attributes:
        shared: their names.

    Args:
        d_model: width D of the residual stream.
        vocab_size: tokens V.
        n_layers: blocks.
        pattern: factories of the layers of each block; None entries are left out.
        tie_embeddings: use the embedding's weight as the head's; default True.
        dropout: probability of dropping elements after the embedding and each layer; default 0.
        checkpoint_blocks: recompute each block in backward instead of keeping what is inside;
            default False.

    Initialization: embeddings and an untied head N(0, 0.02); the layers' own; then every
    `out_proj` is divided by sqrt(number of residual layers), so that the variance of the stream
    does not grow with depth (as GPT-2 does).

    Raises:
        ValueError: the pattern holds no layer, a size is out of its range, or layers that share a
            part ask for different ones.
    """

    def __init__(
        self,
        d_model: int,
        *,
        vocab_size: int,
        n_layers: int,
        pattern: Sequence[Sequence[LayerFactory | None]],
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, d_model=d_model, vocab_size=vocab_size)
        if n_layers > MOST_LAYERS:
            raise ValueError(f"n_layers must be {MOST_LAYERS:,} or less, got {n_layers:,}")
        blocks = [[layer for layer in block if layer is not None] for block in pattern]
        if n_layers < 1 or not any(blocks):
            raise ValueError(
                f"a model needs layers; got n_layers={n_layers} and {len(pattern)} blocks with "
                f"{sum(map(len, blocks))} layers as its pattern"
            )
        self.vocab_size, self.checkpoint_blocks = vocab_size, checkpoint_blocks
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = LayerList(
            _block(d_model, blocks[i % len(blocks)], dropout) for i in range(n_layers)
        )
        shared = bind_shared_parts(self.blocks, self._make_part)
        self.shared = tuple(shared)
        for name, part in shared.items():
            own_part(self, name, part)
        self.norm = RMSNorm(d_model)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
        self._init_weights()

    def forward(
        self, tokens: Int[Tensor, "b t"], state: State = None, *, keep_state: bool = True
    ) -> Output:
        """Logits `[B, T, V]` of the token that follows (or answers) each position.

        Args:
            tokens: `[B, T]`.
            state: where an earlier call ended; None for the start of a sequence.
            keep_state: return the state; training without it frees what only the state would hold.

        Raises:
            ValueError: the state is not one of this model, or of another number of sequences.
        """
        x = self.dropout(self.embedding(tokens))
        states = (None,) * len(self.blocks) if state is None else state
        kept, auxes = [], {}
        for i, (block, inner) in enumerate(zip(self.blocks, states, strict=True)):
            x, inner, auxes[str(i)] = self._through(block, x, inner, keep_state)
            kept.append(inner)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(self.norm(x), weight)
        return Output(logits, tuple(kept) if keep_state else None, join_aux(auxes))

    def init_state(self, batch_size: int, route: Int[Tensor, " b"] | None = None) -> State:
        """The state before the first token.

        Args:
            batch_size: B.
            route: a leaf for each sequence, or `NO_ROUTE`. What lies on the way to it is fetched
                once for all layers, of every `RoutedPart` of the model; one without any has no use
                for routes. None where no route is known.

        Raises:
            ValueError: there are more or fewer routes than sequences, or one leads nowhere.
        """
        if route is not None and len(route) != batch_size:
            raise ValueError(f"{len(route)} routes were given for {batch_size} sequences")
        fetched = None
        if route is not None:
            fetched = Fetched({name: part.fetch(route) for name, part in self.routed.items()})
        return tuple(start_state(block, batch_size, fetched) for block in self.blocks)

    def state_spec(self) -> State:
        """What fits each block."""
        return tuple(self.blocks)

    @property
    def routed(self) -> dict[str, RoutedPart]:
        """The shared parts that routes lead to, by name."""
        parts = {name: self.get_submodule(name) for name in self.shared}
        return {name: part for name, part in parts.items() if isinstance(part, RoutedPart)}

    def use_part(self, name: str, part: nn.Module) -> None:
        """Reads another shared part from now on, such as a bank on disk (`mneme.models.bank`).

        Args:
            name: of the part that it replaces.
            part: of the same sizes.

        Raises:
            ValueError: the model has no part of this name, or this one does not fit.
        """
        if name not in self.shared:
            known = ", ".join(self.shared) or "none"
            raise ValueError(f"layers of this model share no part {name!r} (shared: {known})")
        bind_part(part, shared_places(self.blocks)[name])
        own_part(self, name, part)

    def state_size(self, seq_len: int) -> int:
        """Scalars of state per sequence after `seq_len` tokens, over all layers."""
        return sum(block.state_size(seq_len) for block in self.blocks)

    def active_parameters(self) -> int:
        """Parameters that one token touches: one row of an untied embedding, all of a tied one."""
        ends = [*self.norm.parameters(), *([] if self.head is None else self.head.parameters())]
        embedding = self.embedding.weight if self.head is None else self.embedding.weight[:1]
        own = embedding.numel() + sum(p.numel() for p in ends)
        return own + sum(block.active_parameters() for block in self.blocks)

    def _make_part(self, places: Sequence[SharedPart]) -> nn.Module:
        """The part that these places share."""
        return places[0].make(places)

    def _through(self, block: Layer, x: Tensor, state: State, keep_state: bool) -> Output:
        if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
            return checkpoint(_run, block, x, state, keep_state, use_reentrant=False)
        return _run(block, x, state, keep_state)

    def _init_weights(self) -> None:
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=EMBEDDING_STD)
        residual = sum(isinstance(module, Residual) for module in self.modules())
        with torch.no_grad():
            for name, parameter in self.blocks.named_parameters():
                if name.endswith("out_proj.weight"):
                    parameter.div_(residual**0.5)


def _block(d_model: int, layers: Sequence[LayerFactory], dropout: float) -> Sequential:
    """The layers of one block, each as a residual step."""
    steps = [partial(Residual, layer=layer, dropout=dropout) for layer in layers]
    return Sequential(d_model, layers=steps)


def _run(block: Layer, x: Tensor, state: State, keep_state: bool) -> Output:
    """Applies a block, letting go of its state where nobody asked for it."""
    output: Output = block(x, state)
    return output if keep_state else output._replace(state=None)
