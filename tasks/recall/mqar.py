"""Multi-query associative recall (MQAR).

Reference: "Zoology: Measuring and Improving Recall in Efficient Language Models",
https://arxiv.org/abs/2312.04927. B examples, L length, K pairs, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, Facts
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.sampling import Ints, distinct, weighted

FILLER = 0
POWER = 0.01  # of the public code; the odds of a slot are close to one over its rank


class Shown(NamedTuple):
    """The context of each sequence, and what its keys stand for at its end.

    Attributes:
        context: `[B, C]` tokens.
        keys: `[B, K]`, different within a row.
        values: `[B, K]`, the right answers.
        written: `[B, K]`, the position in the context of the key that its answer follows.
    """

    context: Ints
    keys: Ints
    values: Ints
    written: Ints


def check_mqar(*, vocab_size: int, seq_len: int, pairs: int) -> None:
    """Raises `ValueError`, with the arithmetic, if such sequences cannot be made."""
    check_keys(vocab_size=vocab_size, seq_len=seq_len, pairs=pairs)
    if 4 * pairs > seq_len:
        raise ValueError(
            f"pairs ({pairs}) do not fit seq_len ({seq_len}): {pairs} pairs take 2 * {pairs} = "
            f"{2 * pairs} positions and their queries as many, 4 * {pairs} = {4 * pairs} > "
            f"{seq_len}; use seq_len >= {4 * pairs} or pairs <= {seq_len // 4}"
        )


def check_keys(*, vocab_size: int, seq_len: int, pairs: int) -> None:
    """Raises `ValueError` if there are no K keys, or if vocabulary or length cannot be halved."""
    half = vocab_size // 2
    if pairs < 1:
        raise ValueError(f"pairs ({pairs}) must be at least 1")
    if vocab_size % 2 or seq_len % 2:
        raise ValueError(
            f"vocab_size ({vocab_size}) and seq_len ({seq_len}) must be even: the vocabulary is "
            "half keys and half values, and a sequence is made of slots of two positions"
        )
    if pairs > half - 1:
        raise ValueError(
            f"pairs ({pairs}) need as many different keys, but vocab_size ({vocab_size}) has "
            f"{vocab_size} / 2 - 1 = {half - 1}; use vocab_size >= {2 * (pairs + 1)}"
        )


def make_mqar(
    rng: np.random.Generator,
    n: int,
    *,
    vocab_size: int,
    seq_len: int,
    pairs: int,
    power: float = POWER,
    random_filler: bool = False,
) -> Batch:
    """Makes `n` sequences that show K key-value pairs and then ask for each of them once.

    Tokens: 0 is filler, keys are in `[1, V/2)`, values in `[V/2, V)`. The context is
    `k1 v1 ... kK vK`; the rest of the sequence is slots of two positions, and query j stands
    at position `2K + 2 * slot_j`. Slots are drawn without replacement with probability
    proportional to `(slot + 1) ** (power - 1)`. The value is not shown after the query: it is the
    label at the query's own position. One example with V = 16, L = 12, K = 2::

        position   0  1  2  3   4  5  6  7  8  9 10 11
        inputs     3  9  5 14   5  0  0  0  3  0  0  0
        targets    .  .  .  .  14  .  .  .  9  .  .  .     (. is IGNORE)
        gap                     2           8              (from the key in the context)

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V, even; V/2 - 1 keys must be at least K.
        seq_len: L, even, at least 4K.
        pairs: K.
        power: 1 spreads the queries evenly; the default, that of the paper's code, is close to
            one over the rank, so that most queries follow closely on the context.
        random_filler: fill unused positions with tokens drawn evenly from the whole vocabulary
            except the example's own keys. The public code does not make that exception, and a
            key followed by junk is a second, wrong pair: at K = 256, L = 1024 that would be 3 %
            of all filler.

    Returns:
        A batch with slices `pairs` `[B]`, `length` `[B]` and `gap` `[B, L]`, the distance from
        the key in the context to its query (0 where nothing is scored).
    """
    check_mqar(vocab_size=vocab_size, seq_len=seq_len, pairs=pairs)
    half = vocab_size // 2
    keys = 1 + distinct(rng, n, pairs, half - 1)  # [B, K]
    values = half + distinct(rng, n, pairs, half)
    written = np.broadcast_to(np.arange(0, 2 * pairs, 2), keys.shape)
    batch, _ = ask(
        rng,
        Shown(interleaved(keys, values), keys, values, written),
        vocab_size=vocab_size,
        seq_len=seq_len,
        power=power,
        random_filler=random_filler,
    )
    return batch


def interleaved(keys: Ints, values: Ints) -> Ints:
    """Writes `[B, K]` keys and values as `[B, 2K]` tokens `k1 v1 ... kK vK`."""
    return np.stack([keys, values], axis=2).reshape(len(keys), -1)


def ask(
    rng: np.random.Generator,
    shown: Shown,
    *,
    vocab_size: int,
    seq_len: int,
    power: float,
    random_filler: bool,
) -> tuple[Batch, Ints]:
    """Fills the rest of each sequence with one query of every key: see `make_mqar`.

    Args:
        rng: the only source of randomness.
        shown: what the sequences begin with.
        vocab_size: V.
        seq_len: L; what is left of it holds at least 2K positions.
        power: how evenly the queries are spread.
        random_filler: fill unused positions with random tokens other than the keys.

    Returns:
        The batch, with slices `pairs`, `length` and `gap`, and the positions of the queries,
        `[B, K]`.
    """
    n, pairs = shown.keys.shape
    start = shown.context.shape[1]
    odds = np.arange(1, (seq_len - start) // 2 + 1, dtype=np.float64) ** (power - 1)
    places = start + 2 * weighted(rng, n, pairs, odds)
    if random_filler:
        rest = _filler(rng, shown.keys, vocab_size, seq_len - start)
    else:
        rest = np.full((n, seq_len - start), FILLER, dtype=np.int64)
    inputs = np.concatenate([shown.context, rest], axis=1)
    np.put_along_axis(inputs, places, shown.keys, axis=1)
    slices = {
        "pairs": torch.full((n,), pairs),
        "length": torch.full((n,), seq_len),
        "gap": at_queries(places, places - shown.written, seq_len),
    }
    targets = at_queries(places, shown.values, seq_len, elsewhere=IGNORE)
    return Batch(torch.from_numpy(inputs), targets, slices), places


def at_queries(places: Ints, values: Ints, length: int, elsewhere: int = 0) -> Tensor:
    """Lays out one value per query, `[B, K]`, as one per position, `[B, length]`."""
    rows = np.full((len(places), length), elsewhere, dtype=np.int64)
    np.put_along_axis(rows, places, values, axis=1)
    return torch.from_numpy(rows)


def _filler(rng: np.random.Generator, keys: Ints, vocab_size: int, length: int) -> Ints:
    """Draws `[B, length]` tokens evenly from the vocabulary without the keys of the same row."""
    row = np.arange(len(keys))[:, None] * vocab_size  # tells equal tokens of two rows apart
    filler = rng.integers(vocab_size, size=(len(keys), length))
    clash = np.isin(filler + row, keys + row)
    while clash.any():
        filler[clash] = rng.integers(vocab_size, size=int(clash.sum()))
        clash = np.isin(filler + row, keys + row)
    return filler


def solve_mqar(inputs: Tensor) -> Tensor:
    """Answers every query by hand: a dictionary, filled from left to right.

    It remembers what last followed each token and says so when the token comes again. It never
    looks ahead and is told neither K nor which tokens are keys, so what it reaches, 100 %, is
    what a model can reach. It is as right where keys are written again (`make_forgetting_mqar`).

    Args:
        inputs: `[B, L]`.

    Returns:
        `[B, L]` answers, `FILLER` where the token has not been seen before.
    """
    answers = torch.full_like(inputs, FILLER)
    for row, tokens in enumerate(inputs.tolist()):
        followed_by: dict[int, int] = {}
        for position, token in enumerate(tokens):
            if position:
                followed_by[tokens[position - 1]] = token
            answers[row, position] = followed_by.get(token, FILLER)
    return answers


@dataclass(kw_only=True, eq=False)
class PairsTask(RecallTask):
    """What tasks of key-value pairs share; the level is K.

    Args:
        seq_len: L, even; default 64.
        vocab_size: V, even; half keys and half values; default 256. The paper uses 8192.
        pairs: K, or several values of it; default 8.
        test_pairs: values of K to evaluate; default those of `pairs`. To evaluate other lengths,
            see `RecallMixture`.
        random_filler: random tokens instead of token 0 between the queries; default false.
    """

    level = "pairs"

    seq_len: int = 64
    vocab_size: int = 256
    pairs: int | list[int] = 8
    test_pairs: list[int] | None = None
    random_filler: bool = False

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later.

        A guesser that has noticed which values the context shows reaches 1/K, and one that always
        says a fixed value of the context, such as the last, does as well.
        """
        context_guess = sum(1 / level for level in self.test_levels) / len(self.test_levels)
        return super().facts() | {
            "guess_level_from_context": context_guess,
            "random_filler": str(self.random_filler),
        }

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        return {**super().slice_values(), "gap": [self.seq_len]}


@dataclass(kw_only=True, eq=False)
class MQAR(PairsTask):
    """Multi-query associative recall: see `make_mqar` for the sequences.

    Differs from the public code in that training data never repeat (there: 100,000 examples seen
    64 times) and random filler never repeats a key.

    Other options are those of `PairsTask` and `RecallTask`.

    Args:
        power: how evenly queries are spread; 1 is evenly, default 0.01 as in the paper.
    """

    name = "mqar"

    power: float = POWER

    def __post_init__(self) -> None:
        """Checks the options."""
        if not self.power > 0:
            raise ValueError(f"power ({self.power}) must be positive; 1 spreads the queries evenly")
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError`, with the arithmetic, if no sequences of K pairs can be made."""
        check_mqar(vocab_size=self.vocab_size, seq_len=self.seq_len, pairs=level)

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {"power": self.power}

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples with `level` pairs from `rng` alone."""
        return make_mqar(
            rng,
            n,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            pairs=level,
            power=self.power,
            random_filler=self.random_filler,
        )
