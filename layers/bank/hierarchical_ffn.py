"""HierarchicalFFN: a gated feed-forward, widened for each sequence by blocks of a memory bank."""

from jaxtyping import Float, Int
from torch import Tensor

from mneme.layers.bank.bank_blocks import (
    adapted_feed_forward,
    feed_forward_block,
    key_value_block,
    unit_width,
)
from mneme.layers.bank.memory_bank import BANK, BankOptions, BankReader
from mneme.layers.feed_forward import SwiGLU
from mneme.layers.parts.shared import Fetched
from mneme.layers.protocol import Output, RoutedLayer, State
from mneme.layers.registry import register
from mneme.layers.state_fit import TensorSpec

_NO_BANK = (
    "this HierarchicalFFN reads no bank, so it cannot fetch a route: put it into a LanguageModel, "
    "which makes the bank of all its layers, or give it blocks as its state"
)


@register(
    ffn={"expand": 2},
    lora={"expand": 2, "bank": BankOptions(hidden=(3, 2), kind="lora")},
    kv={"expand": 2, "bank": BankOptions(hidden=(3, 2), kind="kv")},
)
class HierarchicalFFN(SwiGLU, RoutedLayer):
    """`SwiGLU` with R more hidden units, which are not its own (arXiv 2510.02375).

        y = [W3 | M3] (silu([W1; M1] x) * ([W2; M2] x)) = SwiGLU(x) + M3 (silu(M1 x) * (M2 x))

    M1, M2 and M3 are the blocks of one path through a tree, one block per level; the path is chosen
    once per sequence, from its text, before the model sees it. They are the layer's state: fetched
    by `init_state(batch_size, route)`, read by every token and never written by one. M3 starts at
    zero, so that a new bank changes nothing.

    The blocks of all such layers of a model are one `MemoryBank`, which the model owns: a path is
    one block per level for the whole model. Without a route a sequence gets the bank's generic
    block. A layer outside of a model has no bank; its own blocks are zero, and it is `SwiGLU`.

    Args:
        d_model: width D.
        expand: hidden width of the layer's own part over D; default 8/3.
        multiple_of: that width is rounded up to a multiple of this; default 8.
        bank: what blocks are, and how training writes them.

    State: `[B, R, W]` with W = 3 D elements of a unit for "ffn", 3 (D + hidden width) for "lora",
    2 D for "kv". Budgets charge fetched blocks as state, as they belong to one sequence: in a batch
    they are read once for each, where weights are read once for all.

    Where we differ: "kv" slots are asked with the layer's own input, not with the queries of the
    attention before it, so that all three kinds stand in the same place.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 8 / 3,
        multiple_of: int = 8,
        bank: BankOptions = BankOptions(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(d_model, expand=expand, multiple_of=multiple_of)
        self.options = bank
        self.width = unit_width(bank.kind, d_model, self.out_proj.in_features)
        self.reader = BankReader(d_model, bank, self.width)

    def forward(self, x: Float[Tensor, "b t d"], state: State = None) -> Output:
        """Transforms each position on its own, with the blocks of its sequence."""
        blocks = self.init_state(len(x)) if state is None else state
        return Output(self._widened(x, blocks.to(x.dtype)), blocks)

    def init_state(
        self, batch_size: int, route: Int[Tensor, " b"] | Fetched | None = None
    ) -> Float[Tensor, "b r w"]:
        """Fetches the blocks of each sequence.

        Args:
            batch_size: B.
            route: a leaf of each sequence, or -1 for the generic block; or what has been fetched
                for all layers of a model; None for the generic block.

        Raises:
            ValueError: a route is given to a layer that reads no bank, or leads nowhere.
        """
        bank, place = self.reader.bank, self.reader.place
        if isinstance(route, Fetched):
            blocks: Tensor = route[BANK][:, place]
            return blocks
        if bank is None:
            if route is not None:
                raise ValueError(_NO_BANK)
            return self.in_proj.weight.new_zeros(batch_size, self.options.units, self.width)
        if route is not None:
            return bank.fetch(route)[:, place]
        return bank.generic[place].expand(batch_size, -1, -1)

    def state_spec(self) -> TensorSpec:
        """The blocks of each sequence; no bank is asked for them."""
        own = self.in_proj.weight
        return TensorSpec.of(own.new_empty(1, self.options.units, self.width, device="meta"))

    def state_size(self, seq_len: int) -> int:
        """Numbers of the fetched blocks, at any length."""
        return self.options.units * self.width

    def _widened(self, x: Tensor, blocks: Tensor) -> Tensor:
        if self.options.kind == "lora":
            return adapted_feed_forward(x, blocks, self.in_proj.weight, self.out_proj.weight)
        beside = feed_forward_block if self.options.kind == "ffn" else key_value_block
        return super().forward(x).y + beside(x, blocks)
