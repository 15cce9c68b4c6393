"""One label for a whole sequence, at its last position: nested lists and images of digits.

B examples, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, BatchSet, EvalSplit, Facts
from mneme.tasks.batch import cut, select
from mneme.tasks.recall.base import RecallTask
from mneme.tasks.recall.sampling import Ints

Objective = Literal["label", "next_token"]
OPERATORS = ("MIN", "MAX", "MED", "SM")  # SM: the sum modulo 10
DIGITS = 10
OPEN, CLOSE, PAD, ASK = 10, 14, 15, 16  # OPEN to OPEN + 3 open a list of each operator
LIST_ODDS = 0.25  # that a place of a list is a list
TRAINED = 1197  # images
LEVELS = 17  # shades of scikit-learn's images


def make_list_ops(
    rng: np.random.Generator, n: int, *, seq_len: int, shortest: int, depth: int, arguments: int
) -> Batch:
    """Makes `n` nested lists such as `[MAX 4 [MIN 2 9 ] 3 ]`, whose value is asked for.

    By the code of Long Range Arena (arXiv 2011.04006): a place is a list with probability 1/4
    unless it is as deep as may be, else a digit; a list has from two to `arguments` of them, and an
    operator; expressions of other lengths are drawn again. A token is a digit, an operator with its
    bracket, or the bracket that ends it. Padded on the left.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        seq_len: T; expressions have at most T - 1 tokens.
        shortest: and at least so many.
        depth: of lists in lists, at most.
        arguments: of a list, at most.

    Returns:
        A batch whose last position has the target, a digit.
    """
    inputs, targets = np.full((n, seq_len), PAD), np.full((n, seq_len), IGNORE)
    inputs[:, -1] = ASK
    for row in range(n):
        tokens: list[int] = []
        while not shortest <= len(tokens) < seq_len:
            tokens = []
            value = _nested(rng, depth, arguments, tokens, seq_len)
        inputs[row, seq_len - 1 - len(tokens) : -1] = tokens
        targets[row, -1] = value
    return _labelled(inputs, targets)


def _nested(
    rng: np.random.Generator, depth: int, arguments: int, tokens: list[int], most: int
) -> int:
    """Appends the tokens of a list or a digit, and returns its value; stops beyond `most`."""
    if len(tokens) >= most or depth <= 1 or rng.random() > LIST_ODDS:
        tokens.append(int(rng.integers(DIGITS)))
        return tokens[-1]
    operator = int(rng.integers(len(OPERATORS)))
    tokens.append(OPEN + operator)
    count = int(rng.integers(2, arguments + 1))
    values = [_nested(rng, depth - 1, arguments, tokens, most) for _ in range(count)]
    tokens.append(CLOSE)
    return apply_operator(operator, values)


def apply_operator(operator: int, values: Sequence[int]) -> int:
    """The value of a list; the median of an even number of values is rounded down."""
    name = OPERATORS[operator]
    if name == "MED":
        return int(np.median(values))
    if name == "SM":
        return sum(values) % DIGITS
    return min(values) if name == "MIN" else max(values)


def solve_list_ops(inputs: Tensor) -> Tensor:
    """Evaluates each list with a stack; at the last position, `[B, T]`."""
    answers = torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs.tolist()):
        stack: list[tuple[int, list[int]]] = [(0, [])]
        for token in tokens:
            if token < DIGITS:
                stack[-1][1].append(token)
            elif OPEN <= token < CLOSE:
                stack.append((token - OPEN, []))
            elif token == CLOSE:
                operator, values = stack.pop()
                stack[-1][1].append(apply_operator(operator, values))
        answers[row, -1] = stack[0][1][-1]
    return answers


def _labelled(inputs: Ints, targets: Ints) -> Batch:
    slices = {"label": torch.from_numpy(targets[:, -1].copy())}
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)


def to_next_token(batch: Batch) -> Batch:
    """The same inputs, each of which is to say the next: pretraining on a task's own inputs."""
    following = torch.cat([batch.inputs[:, 1:], torch.full_like(batch.inputs[:, :1], IGNORE)], 1)
    label = batch.slices["label"][:, None].expand_as(following)
    return batch._replace(targets=following, slices={"label": label[:, 0]})


@dataclass(kw_only=True, eq=False)
class Classification(RecallTask):
    """What the tasks of this file share.

    Args:
        objective: "label" (default), or "next_token", which trains on the inputs alone, to go on
            from with `init_from` (self-pretraining, arXiv 2310.02980); evaluation is of the same
            objective.
        batch_size: examples in a batch; default 32.
    """

    level = "seq_len"
    test_seq_len: ClassVar[None] = None

    objective: Objective = "label"
    batch_size: int = 32
    vocab_size: int = field(init=False)

    @property
    def chance_level(self) -> float:
        """Of guessing a digit; of guessing a token where tokens are asked for."""
        return 1 / (DIGITS if self.objective == "label" else self.vocab_size)

    def with_objective(self, batch: Batch) -> Batch:
        """A batch with the targets of the objective."""
        return batch if self.objective == "label" else to_next_token(batch)

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {"objective": self.objective}

    def slice_values(self) -> Mapping[str, Sequence[int]]:
        """The labels."""
        return {"label": range(DIGITS)}


@dataclass(kw_only=True, eq=False)
class ListOps(Classification):
    """Nested lists of digits: see `make_list_ops`.

    Defaults fit a laptop; Long Range Arena has lists of 500 to 2000 tokens, ten deep. Examples
    never repeat but by chance, where it has 96,000. Other options are those of `Classification` and
    `RecallTask`.

    Args:
        seq_len: T; default 128.
        shortest: the least number of tokens; default 32.
        depth: of lists in lists, at most; default 6.
        arguments: of a list, at most; default 10.
        test_examples: examples in each of the two evaluation sets; default 500.
    """

    name = "list_ops"

    seq_len: int = 128
    shortest: int = 32
    depth: int = 6
    arguments: int = 10
    test_examples: int = 500

    def __post_init__(self) -> None:
        """Checks the options."""
        self.vocab_size = ASK + 1
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError` if there are no such lists."""
        depth, arguments, shortest = self.depth, self.arguments, self.shortest
        if depth < 2 or arguments < 2:
            raise ValueError(f"depth ({depth}) and arguments ({arguments}) must be at least 2")
        longest = _longest_list(depth, arguments)
        if not 1 <= shortest < min(level, longest + 1):
            raise ValueError(
                f"shortest ({shortest}) must be from 1 to below seq_len ({level}); such lists have "
                f"at most {longest} tokens"
            )

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples from `rng` alone."""
        limits = {"shortest": self.shortest, "depth": self.depth, "arguments": self.arguments}
        return self.with_objective(make_list_ops(rng, n, seq_len=level, **limits))


def _longest_list(depth: int, arguments: int) -> int:
    """Tokens of the fullest tree; a place at depth 1 is a digit."""
    tokens = 1
    for _ in range(depth - 1):
        tokens = 2 + arguments * tokens
    return tokens


@dataclass(kw_only=True, eq=False)
class Digits(Classification):
    """Images of handwritten digits, pixel by pixel: scikit-learn's 1,797 of 8 x 8.

    A token is one of 17 shades; the 65th asks for the digit. 1,197 images to train on, again and
    again in ever new orders, 300 to validate with, 300 to test: the same for every seed. Other
    options are those of `Classification`.

    Args:
        seed: the order of training images follows from it; default 0.
    """

    name = "digits"

    seq_len: int = field(init=False)
    test_examples: int = field(init=False)

    def __post_init__(self) -> None:
        """Checks the options."""
        self.vocab_size, self.seq_len, self.test_examples = LEVELS + 1, 65, 300
        super().__post_init__()

    def check(self, level: int) -> None:
        """Raises `ValueError` if a batch has more images than there are."""
        if self.batch_size > TRAINED:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be at most {TRAINED}, all images of training"
            )

    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed and the index."""
        images = _images("train")
        return self.with_objective(select(images, self.rows(index, len(images.inputs))))

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Draws `n` training images from `rng` alone."""
        images = _images("train")
        rows = torch.from_numpy(rng.integers(len(images.inputs), size=n))
        return self.with_objective(select(images, rows))

    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """The images of a set."""
        return BatchSet(lambda: cut(self.with_objective(_images(split)), self.batch_size))


@cache
def _images(split: str) -> Batch:
    """All images of a set, in an order that does not follow the writers."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images = load_digits()
    order = np.random.default_rng(0).permutation(len(images.target))
    ends = {"train": (600, None), "val": (0, 300), "test": (300, 600)}[split]
    rows = order[slice(*ends)]
    inputs = np.full((len(rows), 65), LEVELS)
    inputs[:, :-1] = images.data[rows]
    targets = np.full((len(rows), 65), IGNORE)
    targets[:, -1] = images.target[rows]
    return _labelled(inputs, targets)
