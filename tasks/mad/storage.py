"""MAD's selective copying and memorization (arXiv 2403.17844), by its code's procedures.

B examples, L length, V vocabulary, M tokens to copy, K keys. Trained on what is evaluated.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, Facts
from mneme.tasks.mad.base import MadTask, with_length
from mneme.tasks.recall.sampling import Ints


def make_selective_copying(
    rng: np.random.Generator, n: int, *, vocab_size: int, seq_len: int, copied: int
) -> Batch:
    """Makes `n` rows of M tokens among blanks, then a mark and M blanks that ask for them.

    The mark is the last token of the vocabulary, the blank the one before. L - 2M - 1 blanks stand
    before tokens drawn evenly, so that the last token always touches the mark, as in the public
    code. Targets are the tokens in their order, at the position that answers.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V.
        seq_len: L, more than 2M + 1.
        copied: M.

    Returns:
        A batch of T = L positions.
    """
    blank, mark = vocab_size - 2, vocab_size - 1
    blanks = seq_len - 2 * copied - 1
    tokens = rng.integers(vocab_size - 2, size=(n, copied))
    before = rng.multinomial(blanks, np.full(copied, 1 / copied), size=n)  # blanks of each token
    inputs = np.full((n, seq_len), blank)
    places = np.arange(copied) + before.cumsum(axis=1)
    np.put_along_axis(inputs, places, tokens, axis=1)
    inputs[:, seq_len - copied - 1] = mark
    targets = np.full((n, seq_len), IGNORE)
    targets[:, seq_len - copied :] = tokens
    return with_length(inputs, targets)


def solve_selective_copying(inputs: Tensor, vocab_size: int) -> Tensor:
    """The tokens of each row that are no blanks, at its last positions; `[B, L]`."""
    answers = torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs):
        shown = tokens[tokens < vocab_size - 2]
        answers[row, inputs.shape[1] - len(shown) :] = shown
    return answers


@dataclass(kw_only=True, eq=False)
class SelectiveCopying(MadTask):
    """MAD's selective copying: see `make_selective_copying`.

    Defaults are the baseline of arXiv 2403.17844. Other options are those of `MadTask` and
    `RecallTask`.

    Args:
        vocab_size: V; default 16. Changes of the suite: 32, 64, 128.
        seq_len: L; default 256. Changes: 512, 1024.
        copied: M, tokens to copy; default 16. Changes: 32, 64, 96.
    """

    name = "selective_copying"

    vocab_size: int = 16
    seq_len: int = 256
    copied: int = 16

    def check(self, level: int) -> None:
        """Raises `ValueError` if the tokens have no room."""
        least = 2 * self.copied + 1
        if self.copied < 1 or level <= least:
            raise ValueError(
                f"seq_len ({level}) must be above 2 * copied + 1 = {least}, and copied "
                f"({self.copied}) at least 1"
            )
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size ({self.vocab_size}) must be at least 3: a blank, a mark")

    @property
    def chance_level(self) -> float:
        """Of guessing among the tokens that are no blank and no mark."""
        return 1 / (self.vocab_size - 2)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of length `level` from `rng` alone."""
        size = {"vocab_size": self.vocab_size, "seq_len": level}
        return make_selective_copying(rng, n, **size, copied=self.copied)


def make_memorization(
    rng: np.random.Generator, n: int, *, values: Ints, vocab_size: int, seq_len: int
) -> Batch:
    """Makes `n` rows `k1 ? k2 ? ...` of random keys; the mark after each asks for its value.

    The mark is the last token of the vocabulary. Nothing in a row tells a value: the map is the
    same in all rows, of training and of tests, so this measures what parameters hold.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        values: `[K]`, the value of each key.
        vocab_size: V.
        seq_len: L, even.

    Returns:
        A batch whose targets are the values, at the marks.
    """
    keys = rng.integers(len(values), size=(n, seq_len // 2))
    inputs = np.stack([keys, np.full_like(keys, vocab_size - 1)], axis=2).reshape(n, -1)
    targets = np.full(inputs.shape, IGNORE)
    targets[:, 1::2] = values[keys]
    return with_length(inputs, targets)


def memorized_values(vocab_size: int, map_seed: int) -> Ints:
    """`[K]`: the value of each key; keys are the first half of V - 1 tokens, values the rest."""
    half = (vocab_size - 1) // 2
    values = np.random.default_rng(map_seed).permutation(vocab_size - 1 - half)[:half]
    return half + values


@dataclass(kw_only=True, eq=False)
class Memorization(MadTask):
    """MAD's memorization: see `make_memorization`.

    Defaults are the baseline of arXiv 2403.17844. Other options are those of `MadTask` and
    `RecallTask`.

    Args:
        vocab_size: V; default 256. Changes of the suite: 512 to 8192, doubled each time.
        seq_len: L, even; default 32.
        map_seed: the map from keys to values follows from it, and not from `seed`; default 12345.
        train_examples: default 256.
    """

    name = "memorization"

    vocab_size: int = 256
    seq_len: int = 32
    map_seed: int = 12345
    train_examples: int | None = 256

    def __post_init__(self) -> None:
        """Checks the options, and draws the map."""
        super().__post_init__()
        self.values = memorized_values(self.vocab_size, self.map_seed)

    def check(self, level: int) -> None:
        """Raises `ValueError` if there are no keys, or one without a mark."""
        if level % 2:
            raise ValueError(f"seq_len ({level}) must be even: each key is followed by a mark")
        if self.vocab_size < 3:
            raise ValueError(f"vocab_size ({self.vocab_size}) must be at least 3: key, value, mark")

    @property
    def chance_level(self) -> float:
        """Of guessing among all values."""
        return 1 / len(self.values)

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {"map_seed": self.map_seed}

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of length `level` from `rng` alone."""
        size = {"vocab_size": self.vocab_size, "seq_len": level}
        return make_memorization(rng, n, values=self.values, **size)
