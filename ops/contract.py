"""What every op keeps to, as decorators: precision, empty inputs, what is not finite, whole graphs.

- `without_autocast`: arithmetic in the precision that the op chooses.
- `accepts_nothing`: what comes out where there is no token, or no sequence.
- `carries`: keeps what is not a number from the past of its own sequence. Fast forms multiply masks
  and weights of zero with tokens that are still to come, and zero times NaN is NaN. Within
  `contained()`, every op that carries a sequence sees zeros in the place of a token that is not
  finite, and what it returns for that sequence is NaN from this token on, the state included, also
  where a window would let it go again. Looking at all inputs takes time, so that this is for
  finding where a run went wrong, not for training.
- `kept`: tensors that depend on a few numbers alone, made once. A cache of tensors outlives the
  mode in which its entries were made: one made in inference mode may not be saved for a backward
  pass, and one made in a fake mode has no values.
- `uncompiled`: left alone by torch.compile, without importing Dynamo. `torch.compiler.disable` as a
  decorator imports it with the module that it stands in, which takes as long as torch itself, also
  where nothing is ever compiled. Here it is called when the function is, and only once something
  else has imported Dynamo: before that nothing compiles.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree
from torch.utils._pytree import tree_leaves, tree_map_only

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """Runs an op with autocast off, for one whose states must not be rounded to bf16.

    Autocast would otherwise cast the operands of every product inside, fp32 states included. The
    first argument of the op must be a tensor.
    """

    @functools.wraps(op)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        device = first.device.type
        if not torch.amp.is_autocast_available(device):  # the meta device has none
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return exact


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


_within: list[bool] = []


@contextmanager
def contained() -> Iterator[None]:
    """Within it, what is not finite in a token reaches no earlier token of its sequence."""
    _within.append(True)
    try:
        yield
    finally:
        _within.pop()


def carries(*timed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates an op over sequences, so that `contained()` holds for it.

    Args:
        *timed: arguments, or pytrees of them, with a row of axis 1 for each token; where one has
            more rows than the first, the last ones are the tokens'. Minus infinity counts as
            finite in `g`, the logarithm of a decay.
    """

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(op)

        @functools.wraps(op)
        def containing(*args: P.args, **kwargs: P.kwargs) -> R:
            if not _within:
                return op(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            first = call.arguments[timed[0]]
            bad = first.new_zeros(first.shape[:2], dtype=torch.bool)
            for name in timed:
                clean = functools.partial(_cleaned, name=name, bad=bad)
                value = call.arguments.get(name)
                call.arguments[name] = pytree.tree_map_only(Tensor, clean, value)
            since = bad.cummax(1).values if bad.shape[1] else bad
            return _marked(op(*call.args, **call.kwargs), since)

        return containing

    return decorate


def _cleaned(x: Tensor, *, name: str, bad: Tensor) -> Tensor:
    """`x` with zeros in rows that are not finite, which are entered in `bad` [B, T]."""
    wrong = ~(x.isfinite() | (x == -torch.inf)) if name == "g" else ~x.isfinite()
    rows = wrong.flatten(2).any(-1) if x.ndim > 2 else wrong
    tokens = bad.shape[1]
    past = rows.shape[1] - tokens
    if tokens:
        bad |= rows[:, past:]
        bad[:, :1] |= rows[:, :past].any(1, keepdim=True)
    return x.masked_fill(rows.view(*rows.shape, *[1] * (x.ndim - 2)), 0)


def _marked(result: Any, since: Tensor) -> Any:
    """An op's outputs [B, T, ...], and its state if it has one, NaN for all that follows."""
    if isinstance(result, Tensor):
        return _nan_where(since, result)
    y, state = result
    ended = since.any(1)
    return _nan_where(since, y), pytree.tree_map_only(
        Tensor, lambda x: _nan_where(ended, x) if x.is_floating_point() else x, state
    )


def _nan_where(where: Tensor, x: Tensor) -> Tensor:
    return x.masked_fill(where.view(*where.shape, *[1] * (x.ndim - where.ndim)), torch.nan)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """PyTorch's `scaled_dot_product_attention` with grouped heads, to which `contained()` applies.

    Args:
        q: `[..., H, T, K]`.
        k: `[..., G, S, K]`, with G a divisor of H.
        v: as `k`.
        visible: which keys each query sees, broadcast to `[..., H, T, S]`; None for all.
    """
    if not _within or visible is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    k, v = (x.masked_fill(bad[..., None], 0) for x in (k, v))
    y = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    bad = bad.repeat_interleave(q.shape[-3] // k.shape[-3], -2)
    return y.masked_fill((bad[..., None, :] & visible).any(-1, keepdim=True), torch.nan)


def kept(make: Callable[P, tuple[Tensor, ...]]) -> Callable[P, tuple[Tensor, ...]]:
    """Decorates a function whose tensors follow from its arguments, which must be hashable.

    They are made outside of inference mode, and kept if they are plain tensors. In a mode whose
    tensors are not plain, such as a fake mode, and while a caller is being compiled, they are made
    anew. The device must be one of the arguments; a caller must not write to what it gets.
    """
    known: dict[object, tuple[Tensor, ...]] = {}

    @functools.wraps(make)
    def constants(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or type(torch.empty(0, device="meta")) is not Tensor:
            return make(*args, **kwargs)
        key = (args, tuple(kwargs.items()))
        if key not in known:
            with torch.inference_mode(False):
                known[key] = make(*args, **kwargs)
        return known[key]

    return constants


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable(function)`."""
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # Dynamo calls it, and goes on
    return call


def constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result(function)`."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
