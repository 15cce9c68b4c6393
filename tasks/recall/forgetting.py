"""ForgetGate MQAR: recall of keys that have been written again with other values.

Reference: `forgetting_mqar.py` of https://github.com/HazyResearch/zoology, the code of "Zoology:
Measuring and Improving Recall in Efficient Language Models", https://arxiv.org/abs/2312.04927.
B examples, L length, K pairs, U rewrites in each of R rounds, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mneme.tasks.base import Batch, EvalSplit, Facts
from mneme.tasks.recall.mqar import (
    POWER,
    PairsTask,
    Shown,
    ask,
    at_queries,
    check_keys,
    interleaved,
)
from mneme.tasks.recall.sampling import Ints, distinct

Rewrites = int | float | Literal["all"]


def check_forgetting_mqar(
    *, vocab_size: int, seq_len: int, pairs: int, rewrites: int, rounds: int
) -> None:
    """Raises `ValueError`, with the arithmetic, if such sequences cannot be made."""
    check_keys(vocab_size=vocab_size, seq_len=seq_len, pairs=pairs)
    if not 0 <= rewrites <= pairs:
        raise ValueError(
            f"rewrites ({rewrites}) must be from 0 to pairs ({pairs}), as a round writes each key "
            "again at most once; a share such as 0.5 fits any number of pairs, and more rounds "
            "write keys more often"
        )
    if rounds < 1:
        raise ValueError(f"rounds ({rounds}) must be at least 1; without rewriting: rewrites = 0")
    written = pairs + rounds * rewrites
    total = f"{pairs} + {rounds} * {rewrites} = {written}"
    needed = 2 * written + 2 * pairs
    if needed > seq_len:
        raise ValueError(
            f"pairs ({pairs}), rewrites ({rewrites}) and rounds ({rounds}) do not fit seq_len "
            f"({seq_len}): {total} pairs are written and {pairs} keys queried, which takes "
            f"2 * {written} + 2 * {pairs} = {needed} > {seq_len} positions; use seq_len >= "
            f"{needed}, or fewer pairs, rewrites or rounds"
        )
    if written > vocab_size // 2:
        raise ValueError(
            f"pairs ({pairs}), rewrites ({rewrites}) and rounds ({rounds}) need {total} different "
            f"values, but vocab_size ({vocab_size}) has {vocab_size} / 2 = {vocab_size // 2}; "
            f"use vocab_size >= {2 * written}"
        )


def make_forgetting_mqar(
    rng: np.random.Generator,
    n: int,
    *,
    vocab_size: int,
    seq_len: int,
    pairs: int,
    rewrites: int,
    rounds: int = 1,
    random_filler: bool = False,
) -> Batch:
    """Makes `n` sequences that show K pairs, write some keys again, and ask for all of them.

    Tokens and queries are those of `make_mqar`; between the K pairs and the queries, each of R
    rounds draws U of the K keys, whatever earlier rounds drew, and writes them with new values in
    an evenly random order. The answer is the last value. All values of a sequence differ, so an
    answer out of date is always wrong. One example with V = 16, L = 12, K = 2, U = 1, R = 1::

        position   0  1  2  3  4  5   6  7  8  9 10 11
        inputs     3  9  5 14  3 12   5  0  0  0  3  0
        targets    .  .  .  .  .  .  14  .  .  . 12  .     (. is IGNORE)
        gap                           4           6        (from the last writing of the key)
        rewritten                     0           1        (how often the key was written again)

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V, even; V/2 - 1 keys must be at least K, and V/2 values K + R * U.
        seq_len: L, even, at least 2 * (K + R * U) + 2K.
        pairs: K.
        rewrites: U, at most K.
        rounds: R.
        random_filler: fill unused positions with tokens drawn evenly from the whole vocabulary
            except the example's own keys.

    Returns:
        A batch with slices `pairs` `[B]`, `length` `[B]`, `gap` `[B, L]`, the distance from the
        key's last writing to its query, and `rewritten` `[B, L]` (both 0 where nothing is scored).
    """
    check_forgetting_mqar(
        vocab_size=vocab_size, seq_len=seq_len, pairs=pairs, rewrites=rewrites, rounds=rounds
    )
    half = vocab_size // 2
    keys = 1 + distinct(rng, n, pairs, half - 1)  # [B, K]
    values = half + distinct(rng, n, pairs + rounds * rewrites, half)  # [B, K + R * U]
    again = [distinct(rng, n, rewrites, pairs) for _ in range(rounds)]
    order = np.concatenate([np.tile(np.arange(pairs), (n, 1)), *again], axis=1)  # each pair's key
    last, times = _last_written(order, pairs)
    shown = Shown(
        context=interleaved(np.take_along_axis(keys, order, axis=1), values),
        keys=keys,
        values=np.take_along_axis(values, last, axis=1),
        written=2 * last,
    )
    batch, places = ask(
        rng, shown, vocab_size=vocab_size, seq_len=seq_len, power=POWER, random_filler=random_filler
    )
    rewritten = at_queries(places, times, seq_len)
    return batch._replace(slices=batch.slices | {"rewritten": rewritten})


def _last_written(order: Ints, pairs: int) -> tuple[Ints, Ints]:
    """Which pair writes each key last, and how many have written it before: twice `[B, K]`.

    Args:
        order: `[B, W]`, the index of the key that each pair writes, in order of time.
        pairs: K.
    """
    rows = np.arange(len(order))
    last = np.zeros((len(order), pairs), dtype=np.int64)
    times = np.full_like(last, -1)
    for pair, key in enumerate(order.T):
        last[rows, key] = pair
        times[rows, key] += 1
    return last, times


def rewritten_keys(rewrites: Rewrites, pairs: int) -> int:
    """U: a number of keys as it is, a share of the K keys to the nearest whole number above 0."""
    if rewrites == "all":
        return pairs
    if isinstance(rewrites, int):
        return rewrites
    if not 0 < rewrites < 1:
        raise ValueError(
            f"rewrites ({rewrites}) as a share of the keys must be between 0 and 1; use 'all' for "
            "every key, or a whole number of keys"
        )
    return max(1, round(rewrites * pairs))


@dataclass(kw_only=True, eq=False)
class ForgettingMQAR(PairsTask):
    """Recall of the last value of keys that are written more than once.

    See `make_forgetting_mqar` for the sequences. A memory that only adds up what it is shown
    cannot tell a key's old value from the new one, and a memory in which everything fades alike
    loses the keys that are not written again. The slice `rewritten` tells these failures apart,
    as long as `rewrites` leaves some keys alone.

    Differs from the public code, which knows one round, in that values never repeat within a
    sequence. There a new value may be that of another key and, as it is compared with the value of
    a key drawn apart, even the one that its own key had. Training data never repeat and
    random filler never repeats a key, as in `MQAR`. Queries are spread as by default there.

    Other options are those of `PairsTask` and `RecallTask`.

    Args:
        seq_len: L, even; default 128.
        rewrites: keys that each round writes again: a number, a share of the K keys between 0 and
            1 (rounded, at least one key; default 0.5), or `"all"`.
        rounds: how many times so many keys are written again, drawn afresh each time; default 1.
    """

    name = "forgetting_mqar"

    seq_len: int = 128
    rewrites: Rewrites = 0.5
    rounds: int = 1

    def check(self, level: int) -> None:
        """Raises `ValueError`, with the arithmetic, if no sequences of K pairs can be made."""
        check_forgetting_mqar(
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            pairs=level,
            rewrites=rewritten_keys(self.rewrites, level),
            rounds=self.rounds,
        )

    @property
    def first_value_level(self) -> float:
        """Expected accuracy of a memory that keeps the first value of every key.

        It is right on keys that no round has drawn, a share (1 - U/K) ** R of them.
        """
        kept = [
            level * (1 - rewritten_keys(self.rewrites, level) / level) ** self.rounds
            for level in self.test_levels
        ]
        return sum(kept) / sum(self.test_levels)

    def baselines(self, split: EvalSplit) -> dict[str, float]:
        """What `monitor` is for solvers that anyone can name, to hold a model's score against."""
        return super().baselines(split) | {"the first value": self.first_value_level}

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {
            "first_value_level": self.first_value_level,
            "rewrites": str(self.rewrites),
            "rounds": self.rounds,
        }

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples with `level` pairs from `rng` alone."""
        return make_forgetting_mqar(
            rng,
            n,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            pairs=level,
            rewrites=rewritten_keys(self.rewrites, level),
            rounds=self.rounds,
            random_filler=self.random_filler,
        )

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        return {**super().slice_values(), "rewritten": range(self.rounds + 1)}
