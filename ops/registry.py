"""What an op must bring so that tests and benchmarks find it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
