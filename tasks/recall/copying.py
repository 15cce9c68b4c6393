"""Saying a whole string again: what a state of fixed size cannot do at every length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, as_list
from mneme.tasks.recall.base import RecallTask


def make_copying(rng: np.random.Generator, n: int, *, vocab_size: int, length: int) -> Batch:
    """Makes `n` rows of L random tokens, a mark, and the same tokens again but for the last.

    The tokens are the targets of the mark and of each token that follows it. The mark is the last
    token of the vocabulary.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V.
        length: L.

    Returns:
        A batch of T = 2L positions with slices `length` `[B]` and `position` `[B, T]`, from 1 in
        the copy.
    """
    tokens = rng.integers(vocab_size - 1, size=(n, length))
    inputs = np.concatenate([tokens, np.full((n, 1), vocab_size - 1), tokens[:, :-1]], axis=1)
    targets = np.concatenate([np.full((n, length), IGNORE), tokens], axis=1)
    places = np.concatenate([np.zeros(length), np.arange(1, length + 1)]).astype(np.int64)
    slices = {
        "length": torch.full((n,), length),
        "position": torch.from_numpy(np.broadcast_to(places, inputs.shape).copy()),
    }
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)


def solve_copying(inputs: Tensor) -> Tensor:
    """The token as far behind as the mark from the start, in the second half; `[B, T]`."""
    half = inputs.shape[1] // 2
    return torch.cat([torch.zeros_like(inputs[:, :half]), inputs[:, :half]], dim=1)


@dataclass(kw_only=True, eq=False)
class Copying(RecallTask):
    """Copying strings, longer ones in tests than in training: see `make_copying`.

    After "Repeat After Me" (arXiv 2402.01032): 26 letters, drawn evenly. There, Transformers need
    far fewer examples than state space models at 300 letters and more. Other options are those of
    `RecallTask`.

    Args:
        length: L, or several values of it: each training batch holds one; default 32.
        test_length: values of L to evaluate; default 16, 32, 64 and 128.
        vocab_size: V with the mark; default 27.
        test_examples: examples for each of `test_length`; default 200.
    """

    name = "copying"
    level = "length"

    length: int | list[int] = 32
    test_length: int | list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    vocab_size: int = 27
    test_examples: int = 200
    seq_len: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options."""
        self.seq_len = 2 * max(*as_list(self.length), *as_list(self.test_length), 1)
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError` if there is nothing to copy."""
        if level < 1:
            raise ValueError(f"length and test_length must be 1 or more, got {level}")

    @property
    def chance_level(self) -> float:
        """Of guessing a token."""
        return 1 / (self.vocab_size - 1)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of `level` tokens from `rng` alone."""
        return make_copying(rng, n, vocab_size=self.vocab_size, length=level)

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        lengths = sorted({*self.train_levels, *self.test_levels})
        return {"length": lengths, "position": [max(lengths)]}
