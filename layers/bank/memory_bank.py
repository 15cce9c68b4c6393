"""A bank of blocks in a tree: a model fetches those on one path for each sequence.

B sequences; L places, the layers that blocks widen; k children of a node, p levels, r_l units of a
block of level l, R of them on a path; W elements of a unit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mneme.layers.bank.bank_blocks import Kind, init_units
from mneme.layers.parts.row_options import RowOptions
from mneme.layers.parts.shared import NO_ROUTE, RoutedPart, SharedPart
from mneme.layers.protocol import ParamOptions, require_at_least, require_choice

GENERIC = NO_ROUTE
"""The route of a sequence that nobody can place: it fetches the generic block."""

BANK = "bank"  # the name under which a model owns its bank

CLIP_GROUP = "bank"  # a bank's gradients are clipped together, apart from all others


@dataclass(frozen=True)
class BankOptions(RowOptions):
    """What a bank holds, and how training writes it.

    A row is a block here, and blocks that were not fetched are left alone, unless `update` is
    "dense". The generic block always belongs to the model's optimizer. In arXiv 2510.02375 weight
    decay is 1e-3.

    Attributes:
        branching: k, children of each node.
        hidden: r_1 to r_p, units of a block at each level of the tree, the root's children first;
            0 leaves a level without blocks.
        kind: what a block is. "ffn" widens the feed-forward; "lora" adapts its three matrices;
            "kv" adds attention over learned slots. The last two are for comparison.
        generic_probability: how often a training sequence gets the generic block in place of those
            of its route; None for 1 / (k + 1), as in arXiv 2510.02375.

    Raises:
        ValueError: an option is out of range.
    """

    branching: int = 4
    hidden: tuple[int, ...] = (32, 16, 8)
    kind: Kind = "ffn"
    generic_probability: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))
        require_at_least(2, branching=self.branching)
        require_choice(Kind, kind=self.kind)
        if not self.hidden or min(self.hidden) < 0 or not any(self.hidden):
            raise ValueError(
                f"hidden must name the units of each level, 0 or more and not all 0, such as "
                f"(32, 16, 8); got {self.hidden}"
            )
        if not 0 <= self.generic_share <= 1:
            raise ValueError(
                f"generic_probability must be from 0 to 1, got {self.generic_probability}"
            )

    @property
    def generic_share(self) -> float:
        """How often a training sequence gets the generic block."""
        given = self.generic_probability
        return 1 / (self.branching + 1) if given is None else given

    @property
    def units(self) -> int:
        """R."""
        return sum(self.hidden)


@dataclass(frozen=True)
class BankShape:
    """Sizes of a bank, from which all others follow.

    Attributes:
        places: L.
        branching: k.
        hidden: r_1 to r_p.
        width: W.
        kind: what a block is.
    """

    places: int
    branching: int
    hidden: tuple[int, ...]
    width: int
    kind: Kind = "ffn"

    @property
    def depth(self) -> int:
        """P: levels."""
        return len(self.hidden)

    @property
    def leaves(self) -> int:
        """Nodes of the last level: routes are from 0 to one less."""
        return int(self.branching**self.depth)

    @property
    def units(self) -> int:
        """R."""
        return sum(self.hidden)

    def nodes(self, level: int) -> int:
        """Blocks of a level; level 0 is the generic block."""
        return int(self.branching**level)

    def units_of(self, level: int) -> int:
        """r_l, or R for the generic block."""
        return self.hidden[level - 1] if level else self.units

    def record(self, level: int) -> tuple[int, int, int]:
        """Shape of a block: `[L, r_l, W]`."""
        return self.places, self.units_of(level), self.width

    def node(self, route: Any, level: int) -> Any:
        """Which node of a level lies on the way to a leaf, for one route or a tensor of them."""
        return route // self.branching ** (self.depth - level)

    @property
    def levels(self) -> list[int]:
        """The levels that have blocks, from 1."""
        return [level for level in range(1, self.depth + 1) if self.units_of(level)]

    @property
    def parameters(self) -> int:
        """Elements of all blocks, with the generic one."""
        sizes = (self.nodes(level) * self.units_of(level) for level in [0, *self.levels])
        return sum(sizes) * self.places * self.width

    @property
    def fetched(self) -> int:
        """Elements that a route fetches."""
        return self.places * self.units * self.width


class Bank(RoutedPart):
    """What a model asks of a bank, wherever its blocks lie.

    Args:
        shape: its sizes.

    Attributes:
        shape: likewise.
        generic: `[L, R, W]`, the generic block.
    """

    generic: Tensor

    def __init__(self, shape: BankShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    def leaves(self) -> int:
        """Nodes of the last level."""
        return self.shape.leaves

    @property
    def tree(self) -> str:
        """Leaves, children and levels."""
        return (
            f"{self.leaves}, {self.shape.branching} children at each of {self.shape.depth} levels "
            "(its branching and, with units for each level, its hidden)"
        )

    def fetch(self, route: Int[Tensor, " b"]) -> Float[Tensor, "b places r w"]:
        """The blocks on the way to each leaf; `GENERIC` fetches the generic block."""
        raise TypeError(f"{type(self).__name__} does not define fetch")


class MemoryBank(Bank):
    """Blocks of weights for every node of a tree (arXiv 2510.02375), held and trained in memory.

    A sequence with leaf i fetches, of each level l, the block of node `i // k^(p - l)`; all blocks
    together are R units, which the layers that read the bank add to their own. Blocks are the rows
    of one table per level, `[k^l, L r_l W]`, and only those that were fetched have a gradient: a
    level-l block is written k^l times less often than the model, by similar text only.

    In training, a sequence gets the generic block instead with the probability that the options
    say, so that the same run also trains its own control: as many parameters, not chosen.

    Args:
        shape: sizes.
        d_model: D.
        options: how it is written.
    """

    def __init__(self, shape: BankShape, d_model: int, options: BankOptions) -> None:
        super().__init__(shape)
        self.options = options
        self.generic = nn.Parameter(torch.empty(shape.record(0)))
        init_units(self.generic.data.flatten(0, 1), shape.kind, d_model)
        for level in shape.levels:
            blocks = torch.empty(shape.nodes(level), *shape.record(level))
            init_units(blocks.flatten(0, 2), shape.kind, d_model)
            self.register_parameter(f"level{level}", nn.Parameter(blocks.flatten(1)))

    @property
    def param_options(self) -> Mapping[str, ParamOptions]:
        """What the optimizer is told of blocks."""
        options = self.options.param_options(CLIP_GROUP)
        levels = {f"level{level}": options for level in self.shape.levels}
        return {"generic": options._replace(update="dense"), **levels}

    def fetch(self, route: Int[Tensor, " b"]) -> Float[Tensor, "b places r w"]:
        """The blocks of each sequence, with gradients.

        Args:
            route: `[B]`, a leaf of each sequence, or `GENERIC`.

        Raises:
            ValueError: there is no such leaf.
        """
        require_routes(route, self.shape)
        if self.training:
            route = route.masked_fill(self._draw_generic(route), GENERIC)
        known = (route != GENERIC).nonzero()[:, 0]
        found = self._blocks(route[known])
        if len(known) == len(route) and not self.training:
            return found
        # in training always, as processes that average gradients must all have one here
        return self.generic.expand(len(route), -1, -1, -1).index_copy(0, known, found)

    def record(self, level: int, node: int) -> Float[Tensor, "places r w"]:
        """One block as it is now, without a gradient; level 0 is the generic block."""
        weight = self.generic[None] if level == 0 else self._table(level)
        return weight[node].detach().view(self.shape.record(level))

    def records(self, level: int) -> Iterator[Tensor]:
        """Every block of a level, in the order of its nodes: what a file of it holds."""
        return (self.record(level, node) for node in range(self.shape.nodes(level)))

    @torch.no_grad()
    def write(self, level: int, node: int, block: Float[Tensor, "places r w"]) -> None:
        """Puts a block in the place of another."""
        self.record(level, node).copy_(block)

    def _draw_generic(self, route: Tensor) -> Tensor:
        return torch.rand(len(route), device=route.device) < self.options.generic_share

    def _blocks(self, route: Tensor) -> Tensor:
        """`[n, L, R, W]`, the levels next to each other."""
        sparse = self.options.update != "dense"
        parts = []
        for level in self.shape.levels:
            rows = self.shape.node(route, level)
            blocks = F.embedding(rows, self._table(level), sparse=sparse)
            parts.append(blocks.unflatten(1, self.shape.record(level)))
        return torch.cat(parts, dim=2)

    def _table(self, level: int) -> Tensor:
        return self.get_parameter(f"level{level}")

    def extra_repr(self) -> str:
        """Sizes and options, for `print`."""
        shape = self.shape
        return f"{shape.parameters:,} parameters, {shape.fetched:,} a route, {self.options}"


class BankReader(SharedPart):
    """A layer's place in the one bank of a model.

    Args:
        d_model: D.
        options: of the bank.
        width: W.

    Attributes:
        place: which of the bank's layers this is.
    """

    def __init__(self, d_model: int, options: BankOptions, width: int) -> None:
        super().__init__(BANK)
        self.d_model, self.options, self.width, self.place = d_model, options, width, 0

    def make(self, places: Sequence["BankReader"]) -> "MemoryBank":
        """A bank with a place for each of the layers that read it."""
        for other in places:
            if (other.options, other.width) != (self.options, self.width):
                raise ValueError(
                    "the layers of a model share one bank, and these ask for different ones: "
                    f"{self.options} with {self.width} elements a unit and {other.options} with "
                    f"{other.width}"
                )
        return MemoryBank(self._shape(len(places)), self.d_model, self.options)

    def bind(self, part: nn.Module, place: int, places: int) -> None:
        """Reads this place of a bank from now on.

        Raises:
            ValueError: the bank has other sizes.
        """
        assert isinstance(part, Bank)
        if part.shape != self._shape(places):
            raise ValueError(
                f"the model reads a bank of {self._shape(places)}; this is {part.shape}"
            )
        super().bind(part, place, places)
        self.place = place

    @property
    def bank(self) -> Bank | None:
        """What it reads; None before anything was bound."""
        assert self.part is None or isinstance(self.part, Bank)
        return self.part

    def _shape(self, places: int) -> BankShape:
        options = self.options
        return BankShape(places, options.branching, options.hidden, self.width, options.kind)


def require_routes(route: Tensor, shape: BankShape) -> None:
    """Raises ValueError for a route that leads to no leaf."""
    if route.is_floating_point():
        raise ValueError(f"routes must be integers, got {route.dtype}")
    if route.numel() and not bool(((route >= GENERIC) & (route < shape.leaves)).all()):
        raise ValueError(
            f"routes must be from 0 to {shape.leaves - 1}, the leaves of a tree of {shape.depth} "
            f"levels with {shape.branching} children each, or {GENERIC} for the generic block; "
            f"got {int(route.min())} to {int(route.max())}"
        )
