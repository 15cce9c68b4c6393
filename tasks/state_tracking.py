"""State tracking: a running result of which every token changes something, and none can be skipped.

B examples, L symbols, T positions. Attention at fixed depth and recurrences whose transitions have
only positive eigenvalues learn these at the lengths of training at best; a delta rule with beta up
to 2 reaches eigenvalue -1, and a nonlinear recurrence any group (arXiv 2411.12537, 2404.08819).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, as_list
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.sampling import Ints

Labels = Literal["last", "every"]
Group = Literal["Z60", "S3", "A5", "S5", "A4xZ5"]


def make_parity(rng: np.random.Generator, n: int, *, length: int, labels: Labels = "last") -> Batch:
    """Makes `n` rows of random bits and a last token that asks for their sum modulo 2.

    Tokens: the bits 0 and 1, and 2 for the question. With L = 4::

        inputs    1  0  1  1  2
        targets   .  .  .  .  1      labels="every": 1  1  0  1  1

    Args:
        rng: the only source of randomness.
        n: number of examples.
        length: L, bits.
        labels: "last", only the answer is scored, as in arXiv 2411.12537; "every", so is the sum of
            the bits up to each position.

    Returns:
        A batch of T = L + 1 positions with the slices of `_batch`.
    """
    bits = rng.integers(2, size=(n, length))
    sums = bits.cumsum(axis=1) % 2
    inputs = np.concatenate([bits, np.full((n, 1), 2)], axis=1)
    targets = np.concatenate([sums, sums[:, -1:]], axis=1)
    if labels == "last":
        targets[:, :-1] = IGNORE
    return _batch(inputs, targets, length)


def solve_parity(inputs: Tensor) -> Tensor:
    """The sum modulo 2 of the bits up to each position `[B, T]`."""
    return (inputs == 1).cumsum(1) % 2


def make_arithmetic(rng: np.random.Generator, n: int, *, length: int, modulus: int = 5) -> Batch:
    """Makes `n` expressions such as `3 + 1 * 4 - 2 =`, whose value modulo m is asked for.

    Products come before sums, as in the task without brackets of arXiv 2207.02098. Tokens: m
    residues, then `+`, `-`, `*` and `=`. Residues and operators are drawn evenly.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        length: L, operands.
        modulus: m.

    Returns:
        A batch of T = 2 L positions, of which the last, `=`, has a target.
    """
    operands = rng.integers(modulus, size=(n, length))
    operators = rng.integers(3, size=(n, length))
    inputs = np.stack([operands, modulus + operators], axis=2).reshape(n, 2 * length)
    inputs[:, -1] = modulus + 3
    targets = np.full((n, 2 * length), IGNORE)
    targets[:, -1] = _value(operands, operators[:, :-1], modulus)
    return _batch(inputs, targets, length)


def solve_arithmetic(inputs: Tensor, modulus: int = 5) -> Tensor:
    """The value of each expression, at the position of its `=`; 0 elsewhere, `[B, T]`."""
    tokens = inputs.numpy()
    answers = np.zeros_like(tokens)
    answers[:, -1] = _value(tokens[:, ::2], tokens[:, 1:-1:2] - modulus, modulus)
    return torch.from_numpy(answers)


def _value(operands: Ints, operators: Ints, modulus: int) -> Ints:
    """The values `[B]` of `[B, L]` operands with `[B, L - 1]` operators: 0 for +, 1 for -, 2 *."""
    total, product = np.zeros_like(operands[:, 0]), operands[:, 0]
    for operand, operator in zip(operands.T[1:], operators.T, strict=True):
        times = operator == 2
        total = np.where(times, total, (total + product) % modulus)
        signed = np.where(operator == 1, -operand, operand)
        product = np.where(times, product * operand, signed) % modulus
    return (total + product) % modulus


def make_group_words(rng: np.random.Generator, n: int, *, length: int, group: Group) -> Batch:
    """Makes `n` words of random elements of a group; each position asks for the product so far.

    A token is an element. The target at position t is x_1 x_2 ... x_t, multiplied from the left
    (arXiv 2404.08819). A5 and S5 are not solvable: no fixed depth of products of diagonal or
    commuting transitions tracks them.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        length: L, elements.
        group: which; "A4xZ5", "A5" and "Z60" have 60 elements, "S5" 120, "S3" 6.

    Returns:
        A batch of T = L positions.
    """
    table = multiplication_table(group)
    inputs = rng.integers(len(table), size=(n, length))
    return _batch(inputs, _products(inputs, table), length)


def solve_group_words(inputs: Tensor, group: Group) -> Tensor:
    """The product of the elements up to each position, `[B, T]`."""
    return torch.from_numpy(_products(inputs.numpy(), multiplication_table(group)))


def _products(elements: Ints, table: Ints) -> Ints:
    products = elements.copy()
    for position in range(1, elements.shape[1]):
        products[:, position] = table[products[:, position - 1], elements[:, position]]
    return products


@cache
def multiplication_table(group: Group) -> Ints:
    """`[G, G]`: the number of the product a b, for the numbers of a and b; 0 is the identity."""
    if group == "Z60":
        numbers = np.arange(60)
        return (numbers[:, None] + numbers) % 60
    if group == "A4xZ5":
        alternating, cyclic = _permutations(4, even=True), np.arange(5)
        added = (cyclic[:, None] + cyclic) % 5
        whole = alternating[:, None, :, None] * 5 + added[None, :, None, :]
        return whole.reshape(60, 60)
    return _permutations(int(group[1:]), even=group[0] == "A")


def _permutations(size: int, *, even: bool) -> Ints:
    """The multiplication table of all permutations of `size` things, or of the even ones."""
    elements = [p for p in itertools.permutations(range(size)) if not even or not _odd(p)]
    number = {element: index for index, element in enumerate(elements)}
    products = [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
    return np.array(products)


def _odd(permutation: Sequence[int]) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(first > second for first, second in pairs) % 2 == 1


def _batch(inputs: Ints, targets: Ints, length: int) -> Batch:
    """With slices `length` `[B]`, and `position` and `last` `[B, T]`: from 1, and 1 at the end."""
    positions = torch.arange(1, inputs.shape[1] + 1).expand(inputs.shape)
    slices = {
        "length": torch.full((len(inputs),), length),
        "position": positions,
        "last": (positions == inputs.shape[1]).long(),
    }
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)


@dataclass(kw_only=True, eq=False)
class StateTracking(RecallTask):
    """What the tasks of this file share: levels are lengths, and tests go beyond those of training.

    Args:
        min_length: the least number of symbols L of a training example.
        max_length: the greatest; each batch holds one length, drawn evenly.
        test_length: values of L to evaluate.
        batch_size: examples in a batch; default 256.
        test_examples: examples for each of `test_length`, in each of the two evaluation sets;
            default 500.
    """

    level = "length"

    min_length: int
    max_length: int
    test_length: int | list[int]
    batch_size: int = 256
    test_examples: int = 500
    seq_len: int = field(init=False)
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length ({self.min_length}) must be from 1 to max_length ({self.max_length})"
            )
        if min(lengths := as_list(self.test_length), default=0) < 1:
            raise ValueError(f"test_length must hold lengths of 1 or more, got {lengths}")
        self.seq_len = self.positions(max(self.max_length, *lengths))
        super().__post_init__()

    @property
    def length(self) -> list[int]:
        """The lengths of training."""
        return list(range(self.min_length, self.max_length + 1))

    def check(self, level: int) -> None:
        """All lengths can be made."""

    def positions(self, length: int) -> int:
        """T of examples of L symbols."""
        return length

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        return {
            "length": sorted({*self.train_levels, *self.test_levels}),
            "position": [self.seq_len],
            "last": [0, 1],
        }


@dataclass(kw_only=True, eq=False)
class Parity(StateTracking):
    """The sum modulo 2 of some bits: see `make_parity`.

    Defaults are those of arXiv 2411.12537 and of xLSTM's code, which train on 3 to 40 bits and test
    on 40 to 256. Differs in that all examples of a batch have one length. Other options are those
    of `StateTracking`.

    Args:
        min_length: the least number of bits of training; default 3.
        max_length: the greatest; default 40.
        test_length: numbers of bits to evaluate; default 40, 64, 128 and 256.
        labels: "last" (default) scores the answer only, "every" the sum at every position.
    """

    name = "parity"

    min_length: int = 3
    max_length: int = 40
    test_length: int | list[int] = field(default_factory=lambda: [40, 64, 128, 256])
    labels: Labels = "last"

    def __post_init__(self) -> None:
        """Checks the options."""
        self.vocab_size = 3
        super().__post_init__()

    def positions(self, length: int) -> int:
        """The bits and the question."""
        return length + 1

    @property
    def chance_level(self) -> float:
        """Of guessing a bit."""
        return 0.5

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of `level` bits from `rng` alone."""
        return make_parity(rng, n, length=level, labels=self.labels)


@dataclass(kw_only=True, eq=False)
class ModularArithmetic(StateTracking):
    """The value of an expression modulo m: see `make_arithmetic`.

    Other options are those of `StateTracking`.

    Args:
        min_length: the least number of operands of training; default 2.
        max_length: the greatest; default 20, which is 40 tokens.
        test_length: numbers of operands to evaluate; default 20, 32, 64 and 128.
        modulus: m; default 5.
    """

    name = "modular_arithmetic"

    min_length: int = 2
    max_length: int = 20
    test_length: int | list[int] = field(default_factory=lambda: [20, 32, 64, 128])
    modulus: int = 5

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.modulus < 2:
            raise ValueError(f"modulus ({self.modulus}) must be at least 2")
        self.vocab_size = self.modulus + 4
        super().__post_init__()

    def positions(self, length: int) -> int:
        """Each operand is followed by an operator or by `=`."""
        return 2 * length

    @property
    def chance_level(self) -> float:
        """Of guessing a residue evenly, which published scaled accuracies set to zero.

        Always saying 0 is right a little more often, as a product with one factor of 0 is 0.
        """
        return 1 / self.modulus

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` expressions of `level` operands from `rng` alone."""
        return make_arithmetic(rng, n, length=level, modulus=self.modulus)


@dataclass(kw_only=True, eq=False)
class GroupWords(StateTracking):
    """The word problem of a finite group: see `make_group_words`.

    Differs from the code of arXiv 2404.08819 in that words never repeat but by chance (there: a
    fixed set of up to five million of each length) and all words of a batch have one length.
    Accuracy over all positions looks high, as first products are easy: `accuracy/last=1` is that of
    the last. Other options are those of `StateTracking`.

    Args:
        group: "A5" (default), "S3", "S5", "Z60" or "A4xZ5".
        min_length: the least length of training words; default 2.
        max_length: the greatest; default 20.
        test_length: lengths to evaluate; default 10, 20 and 40.
    """

    name = "group_words"

    group: Group = "A5"
    min_length: int = 2
    max_length: int = 20
    test_length: int | list[int] = field(default_factory=lambda: [10, 20, 40])

    def __post_init__(self) -> None:
        """Checks the options."""
        self.vocab_size = len(multiplication_table(self.group))
        super().__post_init__()

    @property
    def chance_level(self) -> float:
        """Of guessing an element; all are equally likely at every position."""
        return 1 / self.vocab_size

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` words of `level` elements from `rng` alone."""
        return make_group_words(rng, n, length=level, group=self.group)
