"""Finding one thing again among many: induction, phone books, compound keys, two sets.

B examples, L length, V vocabulary, K entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, Facts, as_list
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.mqar import POWER, at_queries
from mneme.tasks.recall.sampling import Ints, distinct, weighted

DIGITS = 10
SPECIAL = 4  # tokens of set disjointness: prefix, separator, question, one unused


def make_induction(rng: np.random.Generator, n: int, *, vocab_size: int, seq_len: int) -> Batch:
    """Makes `n` rows of random tokens with a mark in one place and again at the end.

    What followed the mark is asked for: the target of the last position (induction heads of arXiv
    2212.14052 and 2312.00752). The mark is the last token of the vocabulary.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V.
        seq_len: L, at least 3.

    Returns:
        A batch with slices `length` `[B]` and `gap` `[B, L]`: how far back the mark is.
    """
    inputs = rng.integers(vocab_size - 1, size=(n, seq_len))
    place, rows = rng.integers(seq_len - 2, size=n), np.arange(n)
    inputs[rows, place] = inputs[:, -1] = vocab_size - 1
    answers = inputs[rows, place + 1]
    gaps = seq_len - 1 - place
    return _asked(inputs, np.full((n, 1), seq_len - 1), answers[:, None], gaps[:, None], {})


def solve_induction(inputs: Tensor) -> Tensor:
    """What followed the token before, whenever it came: `[B, L]`, right at the last position."""
    answers = torch.zeros_like(inputs)
    place = (inputs[:, :-1] == inputs[:, -1:]).int().argmax(1)
    answers[:, -1] = inputs[torch.arange(len(inputs)), place + 1]
    return answers


def make_phone_book(
    rng: np.random.Generator, n: int, *, names: int, entries: int, digits: int, questions: int
) -> Batch:
    """Makes `n` phone books of K lines `name d1 ... dM`, then M + 2 tokens for each question.

    A question is a mark, a name of the book, and its number but for the last digit; the number's
    digits are the targets of the name and of each digit before the next. Tokens: ten digits, the
    mark, then names. The small form of arXiv 2402.01032, where names and numbers are text.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        names: that there are; those of a book are different.
        entries: K.
        digits: M.
        questions: how many, of different names.

    Returns:
        A batch with slices `length` and `entries` `[B]`, `gap` `[B, L]`, from the name in the book
        to the name, or digit, that is answered, and `turn` `[B, L]`, the question's number from 1.
    """
    first = DIGITS + 1
    line = digits + 1
    who = first + distinct(rng, n, entries, names)
    numbers = rng.integers(DIGITS, size=(n, entries, digits))
    book = np.concatenate([who[..., None], numbers], axis=2)  # [B, K, 1 + M]
    wanted = distinct(rng, n, questions, entries)
    again = np.take_along_axis(book, wanted[..., None], axis=1)
    marks = np.full((n, questions, 1), DIGITS)
    asking = np.concatenate([marks, again[..., :-1]], axis=2)  # [B, Q, 1 + M]
    inputs = np.concatenate([book.reshape(n, -1), asking.reshape(n, -1)], axis=1)
    starts = entries * line + line * np.arange(questions) + 1  # of the name of each question
    places = np.broadcast_to(
        (starts[:, None] + np.arange(digits)).reshape(-1), (n, questions * digits)
    )
    gaps = np.repeat(starts - line * wanted, digits, axis=1)
    batch = _asked(inputs, places, again[..., 1:].reshape(n, -1), gaps, {"entries": entries})
    turns = np.broadcast_to(np.repeat(np.arange(1, questions + 1), digits), places.shape)
    return batch._replace(
        slices=batch.slices | {"turn": at_queries(places, turns, inputs.shape[1])}
    )


def solve_phone_book(inputs: Tensor) -> Tensor:
    """A dictionary from the name and the digits since to the next digit; `[B, L]`."""
    answers = torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs.tolist()):
        known: dict[tuple[int, ...], int] = {}
        since: tuple[int, ...] = ()
        for position, token in enumerate(tokens):
            if since and token < DIGITS:
                known[since] = token
            since = (token,) if token > DIGITS else (*since, token)
            answers[row, position] = known.get(since, 0)
    return answers


def make_compositional_mqar(
    rng: np.random.Generator,
    n: int,
    *,
    vocab_size: int,
    seq_len: int,
    pairs: int,
    power: float = POWER,
) -> Batch:
    """Makes `n` rows of K triples `a b value` and asks for each `a b` once; neither decides alone.

    K = g * g: the keys are all pairs of g first and g second tokens, in random order, and values
    are different. First tokens are in `[1, V/3)`, second ones in `[V/3, 2V/3)`, values in the rest,
    token 0 is filler. Queries stand in slots of three positions, `a b filler`, drawn as those of
    `make_mqar`; the target is that of b. By the code of github.com/HazyResearch/zoology, but for
    its random filler.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V.
        seq_len: L, at least 6K.
        pairs: K, a square.
        power: 1 spreads the queries evenly; the default is close to one over the rank.

    Returns:
        A batch with slices `length` and `pairs` `[B]` and `gap` `[B, L]`, from b in the context.
    """
    side, third = isqrt(pairs), vocab_size // 3
    order = distinct(rng, n, pairs, pairs)
    firsts = np.take_along_axis(1 + distinct(rng, n, side, third - 1), order // side, 1)
    seconds = np.take_along_axis(third + distinct(rng, n, side, third), order % side, 1)
    values = 2 * third + distinct(rng, n, pairs, vocab_size - 2 * third)
    context = np.stack([firsts, seconds, values], axis=2).reshape(n, -1)
    start = 3 * pairs
    odds = np.arange(1, (seq_len - start) // 3 + 1, dtype=np.float64) ** (power - 1)
    places = start + 3 * weighted(rng, n, pairs, odds)
    inputs = np.concatenate([context, np.zeros((n, seq_len - start), dtype=np.int64)], axis=1)
    np.put_along_axis(inputs, places, firsts, axis=1)
    np.put_along_axis(inputs, places + 1, seconds, axis=1)
    gaps = places - 3 * np.arange(pairs)
    return _asked(inputs, places + 1, values, gaps, {"pairs": pairs})


def solve_compositional_mqar(inputs: Tensor) -> Tensor:
    """A dictionary from each two successive tokens to what followed them last; `[B, L]`."""
    answers = torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs.tolist()):
        known: dict[tuple[int, int], int] = {}
        for position in range(1, len(tokens)):
            if position > 1:
                known[tokens[position - 2], tokens[position - 1]] = tokens[position]
            answers[row, position] = known.get((tokens[position - 1], tokens[position]), 0)
    return answers


def make_set_disjointness(
    rng: np.random.Generator, n: int, *, vocab_size: int, first: int, second: int
) -> Batch:
    """Makes `n` rows `prefix A separator B question` of two sets that share one token, the answer.

    All other tokens are different (arXiv 2407.05483). A causal model must hold the first set, so
    the shorter one first is easier; one that reads all twice (`ReadTwice`) does not care.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V, of which four are special.
        first: tokens of A.
        second: tokens of B.

    Returns:
        A batch of T = first + second + 3 with slices `length`, `first` and `second` `[B]` and
        `gap` `[B, T]`: from the token's place in A to the question.
    """
    tokens = SPECIAL + distinct(rng, n, first + second, vocab_size - SPECIAL)
    mine, rows = rng.integers(first, size=n), np.arange(n)
    tokens[rows, first + rng.integers(second, size=n)] = tokens[rows, mine]
    parts = [np.zeros((n, 1)), tokens[:, :first], np.ones((n, 1)), tokens[:, first:]]
    inputs = np.concatenate([*parts, np.full((n, 1), 2)], axis=1).astype(np.int64)
    last = np.full((n, 1), first + second + 2)
    sizes = {"first": first, "second": second}
    return _asked(inputs, last, tokens[rows, mine][:, None], last - 1 - mine[:, None], sizes)


def solve_set_disjointness(inputs: Tensor) -> Tensor:
    """The token that stands twice, at the last position; `[B, T]`."""
    answers = torch.zeros_like(inputs)
    ordered = inputs.sort(1).values
    place = (ordered[:, 1:] == ordered[:, :-1]).int().argmax(1)
    answers[:, -1] = ordered[torch.arange(len(inputs)), place]
    return answers


def _asked(
    inputs: Ints, places: Ints, answers: Ints, gaps: Ints, sizes: Mapping[str, int]
) -> Batch:
    """Answers and gaps `[B, Q]` at the places of questions; `sizes` are slices of all rows."""
    n, length = inputs.shape
    slices = {name: torch.full((n,), size) for name, size in sizes.items()}
    slices |= {"length": torch.full((n,), length), "gap": at_queries(places, gaps, length)}
    targets = at_queries(places, answers, length, elsewhere=IGNORE)
    return Batch(torch.from_numpy(inputs), targets, slices)


@dataclass(kw_only=True, eq=False)
class Induction(RecallTask):
    """What followed a mark, when the mark comes again: see `make_induction`.

    Defaults are those of Mamba (arXiv 2312.00752): 256 tokens in training, and tests at other
    lengths, there up to 2^20; batches of 8. Other options are those of `RecallTask`.

    Args:
        length: L of training, or several values; default 256.
        test_length: values of L to evaluate; default 64, 256, 1024 and 4096.
        vocab_size: V; default 16.
        batch_size: examples in a batch; default 8.
        test_examples: examples for each of `test_length`; default 256.
    """

    name = "induction"
    level = "length"

    length: int | list[int] = 256
    test_length: int | list[int] = field(default_factory=lambda: [64, 256, 1024, 4096])
    vocab_size: int = 16
    batch_size: int = 8
    test_examples: int = 256
    seq_len: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options."""
        self.seq_len = max(*as_list(self.length), *as_list(self.test_length), 2)
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError` if a mark, an answer and a mark have no room."""
        if level < 3:
            raise ValueError(f"length and test_length must be at least 3, got {level}")

    @property
    def chance_level(self) -> float:
        """Of guessing among all tokens but the mark."""
        return 1 / (self.vocab_size - 1)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of `level` tokens from `rng` alone."""
        return make_induction(rng, n, vocab_size=self.vocab_size, seq_len=level)

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        lengths = sorted({*self.train_levels, *self.test_levels})
        return {"length": lengths, "gap": [self.seq_len]}


@dataclass(kw_only=True, eq=False)
class PhoneBook(RecallTask):
    """Numbers of people in a phone book: see `make_phone_book`.

    `exact_sequence_accuracy` is the share of books all of whose questions are answered; with one
    question, of numbers that are right. With several, `accuracy/turn=5` is that of the fifth
    question on one context, as SCBench asks (arXiv 2412.10319). Other options are those of
    `RecallTask`.

    Args:
        entries: K, or several values of it: each training batch holds one; default 32.
        test_entries: values of K to evaluate; the training values by default.
        digits: M of a number; default 4.
        questions: to a book; default 1.
        names: that there are; default 1024.
        batch_size: books in a batch; default 32.
        test_examples: books for each of `test_entries`; default 500.
    """

    name = "phone_book"
    level = "entries"

    entries: int | list[int] = 32
    test_entries: int | list[int] | None = None
    digits: int = 4
    questions: int = 1
    names: int = 1024
    batch_size: int = 32
    test_examples: int = 500
    seq_len: int = field(init=False)
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options."""
        tested = self.entries if self.test_entries is None else self.test_entries
        most = max([*as_list(self.entries), *as_list(tested)], default=0)
        self.seq_len, self.vocab_size = self._positions(most), DIGITS + 1 + self.names
        if self.digits < 1 or self.questions < 1:
            raise ValueError(
                f"digits ({self.digits}) and questions ({self.questions}) must be at least 1"
            )
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError` if a book has fewer entries than questions, or more than names."""
        if not self.questions <= level <= self.names:
            raise ValueError(
                f"entries ({level}) must be from questions ({self.questions}) to names "
                f"({self.names})"
            )

    def _positions(self, entries: int) -> int:
        return (self.digits + 1) * (entries + self.questions)

    @property
    def chance_level(self) -> float:
        """Of guessing a digit."""
        return 1 / DIGITS

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` books of `level` entries from `rng` alone."""
        return make_phone_book(
            rng, n, names=self.names, entries=level, digits=self.digits, questions=self.questions
        )

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        entries = sorted({*self.train_levels, *self.test_levels})
        lengths = [self._positions(count) for count in entries]
        slices = {"entries": entries, "length": lengths, "gap": [self.seq_len]}
        return {**slices, "turn": range(self.questions + 1)}


@dataclass(kw_only=True, eq=False)
class CompositionalMQAR(RecallTask):
    """MQAR whose keys are pairs of tokens: see `make_compositional_mqar`.

    Other options are those of `RecallTask`.

    Args:
        seq_len: L; default 64.
        pairs: K, a square, or several of them: each training batch holds one; default 9.
        test_pairs: values of K to evaluate; the training values by default.
        vocab_size: V, a third of it values; default 255.
        power: how evenly queries are spread; 1 is evenly, default 0.01 as in the public code.
    """

    name = "compositional_mqar"
    level = "pairs"

    seq_len: int = 64
    pairs: int | list[int] = 9
    test_pairs: int | list[int] | None = None
    vocab_size: int = 255
    power: float = POWER

    def __post_init__(self) -> None:
        """Checks the options."""
        if not self.power > 0:
            raise ValueError(f"power ({self.power}) must be positive; 1 spreads the queries evenly")
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError`, with the arithmetic, if no sequences of K pairs can be made."""
        side, third = isqrt(max(level, 0)), self.vocab_size // 3
        if level < 1 or side * side != level:
            raise ValueError(
                f"pairs ({level}) must be a square, such as 4, 9 or 16: a grid of keys"
            )
        if 6 * level > self.seq_len:
            raise ValueError(f"seq_len ({self.seq_len}) must be at least 6 * pairs = {6 * level}")
        if side > third - 1 or level > self.vocab_size - 2 * third:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must hold {side} keys and {level} values in its "
                f"thirds; use vocab_size >= {3 * max(side + 1, level)}"
            )

    @property
    def chance_level(self) -> float:
        """Of guessing among all values."""
        return 1 / (self.vocab_size - 2 * (self.vocab_size // 3))

    def facts(self) -> Facts:
        """What to record with a run; a guesser that looks at one of two keys reaches 1/g."""
        half_known = sum(1 / isqrt(level) for level in self.test_levels) / len(self.test_levels)
        return super().facts() | {"guess_level_from_one_key": half_known, "power": self.power}

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples with `level` pairs from `rng` alone."""
        size = {"vocab_size": self.vocab_size, "seq_len": self.seq_len}
        return make_compositional_mqar(rng, n, **size, pairs=level, power=self.power)

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        return {**super().slice_values(), "gap": [self.seq_len]}


@dataclass(kw_only=True, eq=False)
class SetDisjointness(RecallTask):
    """Which token two sets share: see `make_set_disjointness`.

    Sizes are the smaller ones of arXiv 2407.05483, each in both orders; there up to 256 tokens in
    training and 768 in tests. Other options are those of `RecallTask`.

    Args:
        sizes: pairs of |A| and |B| for training, each batch of one; each stands for both orders.
            Default [[4, 16], [8, 32], [16, 64]].
        test_sizes: pairs to evaluate, in both orders; those of training by default.
        vocab_size: V; default 2048.
        test_examples: examples for each pair and order; default 500.
    """

    name = "set_disjointness"
    level = "size"

    sizes: Sequence[Sequence[int]] = ((4, 16), (8, 32), (16, 64))
    test_sizes: Sequence[Sequence[int]] | None = None
    vocab_size: int = 2048
    test_examples: int = 500
    seq_len: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options."""
        tests = self.sizes if self.test_sizes is None else self.test_sizes
        for size in [*self.sizes, *tests]:
            if len(size) != 2 or min(size) < 1 or sum(size) > self.vocab_size - SPECIAL:
                raise ValueError(
                    f"sizes must be pairs of 1 or more, together at most "
                    f"{self.vocab_size - SPECIAL}, vocab_size less {SPECIAL}; got {list(size)}"
                )
        both = [_both_orders(sizes) for sizes in (self.sizes, tests)]
        self.orders = sorted({order for orders in both for order in orders})
        self.size, self.test_size = ([self.orders.index(o) for o in orders] for orders in both)
        self.seq_len = max(map(sum, self.orders), default=0) + 3
        super().__post_init__()

    def check(self, level: int) -> None:
        """All sizes were checked."""

    @property
    def chance_level(self) -> float:
        """Of guessing among all tokens."""
        return 1 / (self.vocab_size - SPECIAL)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of the sizes `orders[level]` from `rng` alone."""
        first, second = self.orders[level]
        return make_set_disjointness(rng, n, vocab_size=self.vocab_size, first=first, second=second)

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The values each slice can take; of a bucketed slice, the largest."""
        firsts, seconds = zip(*self.orders, strict=True)
        lengths = sorted({first + second + 3 for first, second in self.orders})
        return {"first": firsts, "second": seconds, "length": lengths, "gap": [self.seq_len]}


def _both_orders(sizes: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return sorted({order for a, b in sizes for order in ((a, b), (b, a))})
