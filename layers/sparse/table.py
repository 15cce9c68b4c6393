"""Tables of many rows of which a token reads a few: owned by a layer, or by the model for several.

N rows, D width, m rows of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mneme.layers.parts.row_options import RowOptions
from mneme.layers.parts.shared import NamedParts, SharedPart
from mneme.layers.protocol import ParamOptions, require_at_least
from mneme.ops.table_read import dot_rows, sum_rows

CLIP_GROUP = "tables"  # gradients of tables are clipped together, apart from all others


@dataclass(frozen=True, kw_only=True)
class TableOptions(RowOptions):
    """How the optimizer writes a table, as `RowOptions` says, and who owns it.

    Attributes:
        share: a name under which the model owns the table, so that every layer that gives this name
            reads the same rows; None for a table of the layer's own. It is a Python identifier, and
            no attribute of `nn.Module`, as it is part of the parameter's name.

    Raises:
        ValueError: an option is out of range, or the name is none.
    """

    share: str | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        _require_name(self.share)

    def named(self, part: str) -> "TableOptions":
        """The same for one of several tables of a layer: a shared name tells them apart."""
        return self if self.share is None else replace(self, share=f"{self.share}_{part}")


def _require_name(share: str | None) -> None:
    """Raises ValueError for a name that cannot be a submodule's."""
    if share is None:
        return
    if not share.isidentifier():
        raise ValueError(
            f"share must be a name of letters, digits and _ that begins with no digit, such as "
            f"'memory'; got {share!r}"
        )
    if hasattr(NamedParts(), share):
        raise ValueError(
            f"share must be another name than {share!r}, which is an attribute of modules; "
            f"take '{share}_table', say"
        )


OWN = TableOptions()


@runtime_checkable
class Rows(Protocol):
    """What layers ask of a table, whoever owns it and wherever it lies."""

    def sum_rows(
        self, rows: Int[Tensor, "*t m"], weights: Float[Tensor, "*t m"]
    ) -> Float[Tensor, "*t d"]:
        """The rows of each token, weighted and summed."""

    def dot_rows(
        self, rows: Int[Tensor, "*t m"], x: Float[Tensor, "*t d"]
    ) -> Float[Tensor, "*t m"]:
        """The inner product of each token's rows with the token."""


class Table(nn.Module):
    """N rows of D values, N(0, std), of which a token reads m.

    Args:
        rows: N.
        dim: D.
        std: of the values at the start; 0 starts with zeros.
        options: how it is written.
    """

    def __init__(self, rows: int, dim: int, *, std: float, options: TableOptions = OWN) -> None:
        super().__init__()
        require_at_least(1, rows=rows, dim=dim)
        self.options = options
        self.weight = nn.Parameter(torch.empty(rows, dim).normal_(std=std))

    @property
    def param_options(self) -> Mapping[str, ParamOptions]:
        """What the optimizer is told of the weight."""
        return {"weight": self.options.param_options(CLIP_GROUP)}

    def sum_rows(
        self, rows: Int[Tensor, "*t m"], weights: Float[Tensor, "*t m"]
    ) -> Float[Tensor, "*t d"]:
        """The rows of each token, weighted and summed."""
        flat = sum_rows(
            self.weight, rows.flatten(0, -2), weights.flatten(0, -2), sparse_grad=self._sparse
        )
        return flat.unflatten(0, rows.shape[:-1])

    def dot_rows(
        self, rows: Int[Tensor, "*t m"], x: Float[Tensor, "*t d"]
    ) -> Float[Tensor, "*t m"]:
        """The inner product of each token's rows with the token."""
        flat = dot_rows(
            self.weight, rows.flatten(0, -2), x.flatten(0, -2), sparse_grad=self._sparse
        )
        return flat.unflatten(0, rows.shape[:-1])

    @property
    def _sparse(self) -> bool:
        return self.options.update != "dense"

    def extra_repr(self) -> str:
        """Sizes and options, for `print`."""
        return f"{self.weight.shape[0]:,} x {self.weight.shape[1]}, {self.options}"


class SharedTable(SharedPart):
    """A layer's place in a table that the model owns, as `tables.NAME`.

    Args:
        rows: N, the same in every layer that shares it.
        dim: D, likewise.
        std: of the values at the start, likewise.
        options: with the name.
    """

    def __init__(self, rows: int, dim: int, *, std: float, options: TableOptions) -> None:
        super().__init__(f"tables.{options.share}")
        self.args: dict[str, Any] = {"rows": rows, "dim": dim, "std": std, "options": options}

    def make(self, places: Sequence["SharedTable"]) -> Table:
        """The table that all places describe alike."""
        for place in places:
            if place.args != self.args:
                raise ValueError(
                    f"layers that share the table {self.args['options'].share!r} ask for different "
                    f"ones: {_differences(self.args, place.args)}"
                )
        return Table(**self.args)

    def sum_rows(
        self, rows: Int[Tensor, "*t m"], weights: Float[Tensor, "*t m"]
    ) -> Float[Tensor, "*t d"]:
        """As `Table.sum_rows`."""
        return self._table().sum_rows(rows, weights)

    def dot_rows(
        self, rows: Int[Tensor, "*t m"], x: Float[Tensor, "*t d"]
    ) -> Float[Tensor, "*t m"]:
        """As `Table.dot_rows`."""
        return self._table().dot_rows(rows, x)

    def _table(self) -> Rows:
        if self.part is None:
            raise ValueError(
                f"the table {self.args['options'].share!r} is shared, and no model owns it yet: "
                "put the layer into a LanguageModel, call bind_shared_parts on what holds it, or "
                "leave share out"
            )
        return cast(Rows, self.part)


def make_table(rows: int, dim: int, *, std: float, options: TableOptions) -> Table | SharedTable:
    """A table of the layer's own, or its place in a shared one."""
    kind = Table if options.share is None else SharedTable
    return kind(rows, dim, std=std, options=options)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The arguments of two tables that are not the same, for messages."""
    a, b = (
        {"rows": args["rows"], "width": args["dim"], "std": args["std"], **asdict(args["options"])}
        for args in (one, other)
    )
    return ", ".join(f"{key} {a[key]!r} and {b[key]!r}" for key in a if a[key] != b[key])
