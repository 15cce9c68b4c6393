"""Drawing without replacement for many rows at once.

N rows, K draws per row, S items to draw from.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Below this many items per draw, ranking them all is as fast as redrawing collisions.
DENSE = 8


def distinct(rng: np.random.Generator, rows: int, draws: int, items: int) -> Ints:
    """Draws `draws` different integers of `[0, items)` per row, in an evenly random order.

    A large range is never written out: integers are drawn with replacement and repeats redrawn,
    the first of equals staying. Renaming the integers does not change that procedure, so no
    ordered choice can be likelier than another.

    Args:
        rng: source of randomness.
        rows: N.
        draws: K, at most `items`.
        items: S.

    Returns:
        `[N, K]` integers, different within a row.
    """
    if items <= DENSE * draws:
        return first_arrivals(rng.random((rows, items)), draws)
    drawn = rng.integers(items, size=(rows, draws))
    repeated = _repeats(drawn)
    while repeated.any():
        drawn[repeated] = rng.integers(items, size=int(repeated.sum()))
        repeated = _repeats(drawn)
    return drawn


def weighted(rng: np.random.Generator, rows: int, draws: int, weights: Floats) -> Ints:
    """Draws `draws` different indices per row, one after the other in proportion to `weights`.

    An exponential race: index s arrives after a time Exp(1) / weights[s], and the first arrival
    among those that remain is index s with probability proportional to weights[s], which is
    what drawing without replacement means. The order of arrival is the order of the draws.

    Args:
        rng: source of randomness.
        rows: N.
        draws: K, at most S.
        weights: `[S]`, positive, of any sum.

    Returns:
        `[N, K]` indices, different within a row, in the order of the draws.
    """
    times = rng.exponential(size=(rows, len(weights))) / weights
    return first_arrivals(times, draws)


def first_arrivals(times: Floats, count: int) -> Ints:
    """The indices of the `count` smallest times of each row, earliest first.

    Args:
        times: `[N, S]`.
        count: K, at most S.

    Returns:
        `[N, K]` indices.
    """
    early = np.argpartition(times, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(times, early, axis=1), axis=1)
    return np.take_along_axis(early, order, axis=1)


def first_equal(values: Ints) -> Ints:
    """The index of the first entry of its row that each `[N, K]` entry equals, often its own."""
    order = np.argsort(values, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=1)
    begins = np.zeros_like(order)  # where the run of equals begins among the ranked
    begins[:, 1:] = np.where(ranked[:, 1:] != ranked[:, :-1], np.arange(1, order.shape[1]), 0)
    first = np.empty_like(order)
    runs = np.maximum.accumulate(begins, axis=1)
    np.put_along_axis(first, order, np.take_along_axis(order, runs, axis=1), axis=1)
    return first


def _repeats(drawn: Ints) -> NDArray[np.bool_]:
    """Marks each `[N, K]` entry that equals an earlier entry of its row."""
    return first_equal(drawn) < np.arange(drawn.shape[1])
