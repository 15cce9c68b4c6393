"""What an op gives where there is nothing to work on: no token, or no sequence."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

P = ParamSpec("P")
R = TypeVar("R")


def accepts_nothing(*timed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets an op take pieces of no token and batches of no sequence.

    Without a token, no output and the state as it was given (zeros where none was); without a
    sequence, no output and no state, each in the shape that it would have. Outputs belong to the
    graph of all arguments, whose gradients through them are zero. Shapes are those of a call with
    one token, or one sequence, of zeros; so no op needs code for the case.

    Args:
        timed: names of the arguments `[B, T, ...]`, one of them the op's first. A batch stands
            first in them and in `state`, and in no other.
    """

    def decorated(op: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(op).parameters)

        @functools.wraps(op)
        def with_nothing(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0] if args else kwargs[names[0]]
            assert isinstance(first, Tensor)
            if first.shape[0] and first.shape[1]:
                return op(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            return _nothing(op, timed, given, *first.shape[:2])

        return with_nothing

    return decorated


def in_graph_of(y: Tensor, *inputs: Any) -> Tensor:
    """An empty tensor as a result of all tensors in `inputs`, with gradients of zero."""
    leaves = (x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad)
    return y + 0 * sum(leaf.sum() for leaf in leaves)


def _nothing(
    op: Callable[..., Any],
    timed: tuple[str, ...],
    given: Mapping[str, Any],
    batch: int,
    tokens: int,
) -> Any:
    """The results of a call with one more token or sequence, without what that adds."""
    more = {name: value for name, value in given.items() if not callable(value)}  # unwatched
    for axis, names in ((1, timed), (0, (*timed, "state"))):
        if not (batch, tokens)[axis]:
            grown = {n: tree_map_only(Tensor, _one_more(axis), more[n]) for n in names if n in more}
            more |= grown
    with torch.no_grad():
        results = op(**more)
    if isinstance(results, Tensor):
        return in_graph_of(results[:batch, :tokens], given)
    y, state = results
    if given.get("state") is not None and not tokens:
        state = given["state"]
    else:
        state = tree_map_only(Tensor, lambda x: torch.zeros_like(x[:batch]), state)
    return in_graph_of(y[:batch, :tokens], given), state


def _one_more(axis: int) -> Callable[[Tensor], Tensor]:
    """Adds zeros of size one along an axis."""

    def grown(x: Tensor) -> Tensor:
        size = list(x.shape)
        size[axis] = 1
        return torch.cat((x, x.new_zeros(size)), axis)

    return grown
