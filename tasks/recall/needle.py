"""One needle in a haystack of noise.

Reference: "RULER: What's the Real Context Size of Your Long-Context Language Models?",
https://arxiv.org/abs/2404.06654, whose single-needle tasks (S-NIAH) this is in tokens.
B examples, L length, m tokens of the value, p period of the noise, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, Facts
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.sampling import Ints

MARKER = 0
DEPTHS = 10  # equal parts of the haystack that accuracy is reported for


def check_needle(*, vocab_size: int, seq_len: int, value_length: int, period: int) -> None:
    """Raises `ValueError`, with the arithmetic, if such sequences cannot be made."""
    if value_length < 1:
        raise ValueError(f"value_length ({value_length}) must be at least 1")
    if period < 1:
        raise ValueError(f"period ({period}) must be at least 1")
    if vocab_size % 4 or vocab_size < 8:
        nearest = max(8, 4 * round(vocab_size / 4))
        raise ValueError(
            f"vocab_size ({vocab_size}) must be a multiple of 4 and at least 8: a quarter is the "
            f"marker and the noise, a quarter keys and half values; use {nearest}"
        )
    needed = 2 * value_length + 4
    if needed > seq_len:
        room = (seq_len - 4) // 2
        shorter = f" or value_length <= {room}" if room > 0 else ""
        raise ValueError(
            f"value_length ({value_length}) does not fit seq_len ({seq_len}): the insert takes "
            f"{value_length} + 2 = {value_length + 2} positions, the query {value_length} + 1 = "
            f"{value_length + 1} and the noise at least 1, 2 * {value_length} + 4 = {needed} > "
            f"{seq_len}; use seq_len >= {needed}{shorter}"
        )


def make_needle(
    rng: np.random.Generator,
    n: int,
    *,
    vocab_size: int,
    seq_len: int,
    value_length: int,
    period: int = 16,
    fixed_noise: bool = False,
) -> Batch:
    """Makes `n` sequences of repeated noise with one insert, which the end asks for.

    Tokens: 0 is the marker, noise is in `[1, V/4)`, keys in `[V/4, V/2)`, values in `[V/2, V)`.
    The insert is `marker key value1 ... valuem`; it starts at any of the L - 2m - 2 places with
    equal chance, and the noise goes on after it where it broke off. The end is
    `marker key value1 ... valuem-1`, and the labels there are the m values, each at the position
    before its own. One example with V = 16, L = 14, m = 2, p = 3::

        position   0  1  2  3  4  5  6  7  8  9 10 11 12 13
        inputs     2  1  3  2  0  5  9 14  1  3  2  0  5  9
        targets    .  .  .  .  .  .  .  .  .  .  .  .  9 14     (. is IGNORE)

    Key and values are drawn evenly and independently, so that values may repeat and nothing but
    the insert tells of them.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V, a multiple of 4.
        seq_len: L, at least 2m + 4.
        value_length: m.
        period: p; from the length of the noise on, it never repeats.
        fixed_noise: count through the noise tokens, 1 to p, in every example, instead of drawing
            each example's p tokens afresh.

    Returns:
        A batch with slices `value_length`, `length` and `depth`, each `[B]`; the depth is the
        tenth of the possible places, 0 to 9, that the insert starts in.
    """
    check_needle(vocab_size=vocab_size, seq_len=seq_len, value_length=value_length, period=period)
    quarter = vocab_size // 4
    noise_length = seq_len - 2 * value_length - 3
    noise = _noise(rng, n, quarter - 1, noise_length, period, fixed_noise)  # [B, noise_length]
    start = rng.integers(noise_length + 1, size=n)  # [B]
    marker = np.full((n, 1), MARKER, dtype=np.int64)
    key = rng.integers(quarter, 2 * quarter, size=(n, 1))
    value = rng.integers(2 * quarter, vocab_size, size=(n, value_length))
    insert = np.concatenate([marker, key, value], axis=1)  # [B, m + 2]

    haystack = np.empty((n, noise_length + value_length + 2), dtype=np.int64)
    offset = np.arange(haystack.shape[1]) - start[:, None]  # from where the insert starts
    inserted = (offset >= 0) & (offset < value_length + 2)
    haystack[inserted] = insert.ravel()  # a mask is filled row by row, and from left to right
    haystack[~inserted] = noise.ravel()
    inputs = np.concatenate([haystack, insert[:, :-1]], axis=1)
    targets = np.full((n, seq_len), IGNORE, dtype=np.int64)
    targets[:, -value_length:] = value
    slices = {
        "value_length": torch.full((n,), value_length),
        "length": torch.full((n,), seq_len),
        "depth": torch.from_numpy(DEPTHS * start // (noise_length + 1)),
    }
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)


def _noise(
    rng: np.random.Generator, n: int, symbols: int, length: int, period: int, fixed: bool
) -> Ints:
    """Repeats a pattern of tokens in `[1, symbols]` along each row of `[B, length]`."""
    shown = min(period, length)  # no more of a pattern is ever drawn than can be seen
    if fixed:
        pattern = np.broadcast_to(np.arange(shown) % symbols, (n, shown))
    else:
        pattern = rng.integers(symbols, size=(n, shown))
    return 1 + np.tile(pattern, -(-length // shown))[:, :length]


def solve_needle(inputs: Tensor) -> Tensor:
    """Answers by hand: from the second marker on, it says what followed the first.

    It never looks ahead and is told neither m nor where anything stands, so what it reaches,
    100 %, is what a model can reach.

    Args:
        inputs: `[B, L]`.

    Returns:
        `[B, L]` answers, `MARKER` where the second marker has not been seen yet.
    """
    answers = torch.full_like(inputs, MARKER)
    for row, tokens in enumerate(inputs.tolist()):
        markers: list[int] = []
        for position, token in enumerate(tokens):
            if token == MARKER:
                markers.append(position)
            if len(markers) > 1:
                answers[row, position] = tokens[markers[0] + position - markers[1] + 1]
    return answers


@dataclass(kw_only=True, eq=False)
class Needle(RecallTask):
    """A single needle in a haystack: see `make_needle` for the sequences.

    The small form of RULER's S-NIAH. Its task with a haystack of noise (five sentences, repeated),
    S-NIAH-1 or pass-key retrieval, has a number of seven digits as its value: m = 7, a token for
    each. m = 32 stands for the UUIDs of S-NIAH-3, which hides them in essays; the default m = 1 is
    easier than either. Differs in that every answer but its first token is given the true tokens
    before it.

    By default each example has its own noise, so that a model cannot know it by heart and has
    to notice while reading that it repeats and is worth no memory. RULER's sentences are always
    the same: `fixed_noise` does that, alike for every seed and length.

    Other options are those of `RecallTask`.

    Args:
        seq_len: L, at least 2m + 4; default 512.
        vocab_size: V, a multiple of 4: half values, a quarter keys, the rest noise and the marker;
            default 128.
        value_length: m, or several values of it; default 1.
        test_value_length: values of m to evaluate; default those of `value_length`.
        period: the noise repeats after so many tokens; default 16.
        fixed_noise: the same noise in every example; default false.
        batch_size: examples in a batch; default 32.
    """

    name = "needle"
    level = "value_length"

    seq_len: int = 512
    vocab_size: int = 128
    value_length: int | list[int] = 1
    test_value_length: int | list[int] | None = None
    period: int = 16
    fixed_noise: bool = False
    batch_size: int = 32

    def check(self, level: int) -> None:
        """Raises `ValueError`, with the arithmetic, if no value of `level` tokens can be hidden."""
        check_needle(
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            value_length=level,
            period=self.period,
        )

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {"period": self.period, "fixed_noise": str(self.fixed_noise)}

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples with a value of `level` tokens from `rng` alone."""
        return make_needle(
            rng,
            n,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            value_length=level,
            period=self.period,
            fixed_noise=self.fixed_noise,
        )

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take."""
        return {**super().slice_values(), "depth": range(DEPTHS)}
