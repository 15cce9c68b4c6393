"""What an op must bring so that tests and benchmarks find it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Op:
    """An operation, its specification, its fast forms, and inputs to try them on.

    Attributes:
        name: Name of the folder under `ops/`.
        naive: The specification: a plain loop, called as `naive(**inputs)`.
        forms: Fast forms by name; each takes and returns what `naive` does.
        inputs: `inputs(generator, batch, length, *, dtype, regime, **sizes)` makes the arguments
            of one call: tensors, tuples of them, and options that a regime sets.
        regimes: Names of the input distributions `inputs` knows; the first is the ordinary one.
        odd_sizes: Sizes for `inputs` that no tile, block or vector width divides, all different.
        flops: Operations of one forward pass on such inputs; one multiply-add counts as two.
        timed: Names of the inputs with one row of axis 1 per token; where there are more rows, the
            last ones are the tokens'.
        stateful: Whether the op takes `state` and returns (outputs, new state), so that a sequence
            may be fed in pieces.
        starts_empty: Whether no state means a state of zeros.
        half_products: Whether matrix products of half-precision inputs have half-precision
            operands, as states would otherwise be read at a fraction of the hardware's speed.
    """

    name: str
    naive: Callable[..., tuple[Any, ...] | Tensor]
    forms: Mapping[str, Callable[..., tuple[Any, ...] | Tensor]]
    inputs: Callable[..., dict[str, Any]]
    regimes: tuple[str, ...]
    odd_sizes: Mapping[str, int]
    flops: Callable[[dict[str, Any]], float]
    timed: tuple[str, ...]
    stateful: bool = True
    starts_empty: bool = True
    half_products: bool = False


@dataclass(frozen=True)
class Draw:
    """Random tensors in float64, of which inputs to try an op on are made.

    Attributes:
        generator: where the draws come from, in the order of the calls.
    """

    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws of a shape."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        """Random directions: rows of norm one along the last axis."""
        return torch.nn.functional.normalize(self.normal(*shape), dim=-1)

    def uniform(self, *shape: int) -> Tensor:
        """Draws from 0 to 1 of a shape."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)


def drawn(
    *, exact: str = "state"
) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., dict[str, Any]]]:
    """Makes `Op.inputs` of a function `(draw, batch, length, regime, **sizes)` in float64.

    Args:
        exact: name of the input that is fp32 at least, whatever the dtype of the others; "" where
            there is none.
    """

    def decorated(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @functools.wraps(make)
        def inputs(
            generator: torch.Generator,
            batch: int,
            length: int,
            *,
            dtype: torch.dtype = torch.float32,
            regime: str = "typical",
            **sizes: int,
        ) -> dict[str, Any]:
            wide = torch.promote_types(dtype, torch.float32)

            def cast(name: str, value: Any) -> Any:
                to = wide if name == exact else dtype
                return tree_map_only(Tensor, lambda x: x.to(to), value)

            made = make(Draw(generator), batch, length, regime, **sizes)
            return {name: cast(name, value) for name, value in made.items()}

        return inputs

    return decorated
