"""MAD's recall tasks: in context, noisy and fuzzy (arXiv 2403.17844), by its code's procedures.

B examples, L length, V vocabulary, R pairs. Every position is trained on its next token, as
published, though most next tokens cannot be known; what is evaluated are the values of keys that
were shown before.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch
from mneme.tasks.mad.base import MadTask, with_length
from mneme.tasks.recall.sampling import Ints, distinct, first_equal

MOTIF = 3  # tokens of a fuzzy key or value, at most


def make_in_context_recall(
    rng: np.random.Generator,
    n: int,
    *,
    vocab_size: int,
    seq_len: int,
    noise_vocab: int = 0,
    noise: float = 0.0,
) -> Batch:
    """Makes `n` rows of key-value pairs in which keys come again with the value they have.

    Keys are the first half of the vocabulary without noise tokens, values the second. Each row has
    a map of its own, values drawn with replacement. L/2 - 1 pairs of random keys are followed by
    one more pair whose key was shown. With probability `noise` a pair is two random noise tokens
    in its place; one pair of each row never is.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V, of which the last `noise_vocab` are noise tokens.
        seq_len: L, even, at least 4.
        noise_vocab: noise tokens.
        noise: how likely a pair is noise.

    Returns:
        A batch whose targets are the values of keys shown before, at the position of the key.
    """
    symbols = vocab_size - noise_vocab
    half, pairs = symbols // 2, seq_len // 2 - 1
    keys = rng.integers(half, size=(n, pairs))
    values = rng.integers(half, symbols, size=(n, half))
    is_noise = rng.random((n, pairs)) < noise
    is_noise[np.arange(n), rng.integers(pairs, size=n)] = False
    marked = np.where(is_noise, half + np.arange(pairs), keys)  # each noise pair unlike all others
    again = first_equal(marked) < np.arange(pairs)
    shown_first = ~again & ~is_noise
    probe = (rng.random((n, pairs)) * shown_first).argmax(axis=1)  # each distinct key as likely
    keys = np.concatenate([keys, np.take_along_axis(keys, probe[:, None], 1)], axis=1)
    again = np.concatenate([again, np.ones((n, 1), dtype=bool)], axis=1)
    inputs = np.stack([keys, np.take_along_axis(values, keys, 1)], axis=2)
    targets = np.full(inputs.shape, IGNORE)
    targets[:, :, 0] = np.where(again, inputs[:, :, 1], IGNORE)
    if noise:
        drawn = rng.integers(symbols, vocab_size, size=(n, pairs, 2))
        inputs[:, :-1] = np.where(is_noise[:, :, None], drawn, inputs[:, :-1])
    return with_length(inputs.reshape(n, -1), targets.reshape(n, -1))


class Records(NamedTuple):
    """Pairs of motifs, R to a row.

    Attributes:
        keys: `[B, R, 3]` tokens, of which the first `key_sizes` `[B, R]` count.
        values: likewise.
    """

    keys: Ints
    key_sizes: Ints
    values: Ints
    value_sizes: Ints

    @property
    def sizes(self) -> Ints:
        """Tokens of each pair, `[B, R]`."""
        return self.key_sizes + self.value_sizes

    @property
    def starts(self) -> Ints:
        """Tokens before each pair, `[B, R]`."""
        return np.cumsum(self.sizes, axis=1) - self.sizes

    @property
    def spelled(self) -> Ints:
        """One integer for each key, `[B, R]`."""
        used = np.arange(MOTIF) < self.key_sizes[..., None]
        weights = (1 + self.keys.max()) ** np.arange(1, MOTIF + 1)
        return self.key_sizes + MOTIF * (np.where(used, self.keys, 0) * weights).sum(axis=-1)

    def put(self, rows: Ints, places: Ints, pairs: "Records") -> None:
        """Writes the one pair of each row of `pairs` over one of these, in some rows."""
        for mine, theirs in zip(self, pairs, strict=True):
            mine[rows, places] = theirs[rows, 0]


def make_fuzzy_recall(
    rng: np.random.Generator, n: int, *, vocab_size: int, seq_len: int, shorter_keys: bool = False
) -> Batch:
    """Makes `n` rows of pairs whose keys and values are motifs of one to three different tokens.

    The last token of the vocabulary pads on the left; of the others the first half spell keys, the
    rest values. Sizes are drawn evenly. One pair, drawn beforehand, stands at a random place unless
    its key came up before it, and is asked for at the end. Differs from the public code where that
    place lies behind the last pair that fits: there the key is asked for and was never shown.

    Args:
        rng: the only source of randomness.
        n: number of examples.
        vocab_size: V, at least 8.
        seq_len: L, at least 20.
        shorter_keys: keys of one and two tokens too, as in training; tests have three.

    Returns:
        A batch whose targets are the tokens of values of keys shown before.
    """
    count, rows = seq_len // 2, np.arange(n)
    drawn = _records(rng, n, count, vocab_size, shorter_keys)
    probe = _records(rng, n, 1, vocab_size, shorter_keys)
    size = probe.sizes[:, 0]
    end = (seq_len - size - 2 * MOTIF)[:, None]  # no pair begins later
    starts = _mapped(drawn, probe).starts
    place = (starts >= rng.integers(seq_len - 2 * size)[:, None]).argmax(axis=1)
    place = np.minimum(place, (starts < end).sum(axis=1) - 1)
    before = np.arange(count) < place[:, None]
    missing = rows[~(_spelled_alike(drawn, probe) & before).any(axis=1)]
    drawn.put(missing, place[missing], probe)
    pairs = _mapped(drawn, probe)
    kept = pairs.starts < end
    last = kept.sum(axis=1)
    pairs.put(rows, last, probe)
    kept[rows, last] = True
    spelled = np.where(kept, pairs.spelled, -1 - np.arange(count))  # others equal no key
    again = first_equal(spelled) < np.arange(count)
    return _written(pairs, kept, again, pad=vocab_size - 1, seq_len=seq_len)


def _mapped(drawn: Records, probe: Records) -> Records:
    """Keys that come again have the value of their first pair, that of the probe the probe's."""
    first = first_equal(drawn.spelled)
    probed = _spelled_alike(drawn, probe)
    values = np.take_along_axis(drawn.values, first[..., None], 1)
    sizes = np.take_along_axis(drawn.value_sizes, first, 1)
    return drawn._replace(
        values=np.where(probed[..., None], probe.values, values),
        value_sizes=np.where(probed, probe.value_sizes, sizes),
    )


def _records(
    rng: np.random.Generator, n: int, count: int, vocab_size: int, shorter_keys: bool
) -> Records:
    half, symbols = (vocab_size - 1) // 2, vocab_size - 1
    shape = (n, count)
    sizes = rng.integers(1, MOTIF + 1, size=(2, *shape))
    if not shorter_keys:
        sizes[0] = MOTIF
    keys = distinct(rng, n * count, MOTIF, half).reshape(*shape, MOTIF)
    values = half + distinct(rng, n * count, MOTIF, symbols - half).reshape(*shape, MOTIF)
    return Records(keys, sizes[0], values, sizes[1])


def _spelled_alike(pairs: Records, probe: Records) -> NDArray[np.bool_]:
    """Whether each pair `[B, R]` has the key of the row's probe."""
    used = np.arange(MOTIF) < probe.key_sizes[..., None]
    same = ((pairs.keys == probe.keys) | ~used).all(axis=-1)
    return same & (pairs.key_sizes == probe.key_sizes)


def _written(
    pairs: Records, kept: NDArray[np.bool_], again: NDArray[np.bool_], *, pad: int, seq_len: int
) -> Batch:
    """Writes the pairs that are kept, so that the last token would be at position L, from 0."""
    n, slots = len(kept), np.arange(MOTIF)
    parts = [(pairs.keys, pairs.key_sizes, kept & False), (pairs.values, pairs.value_sizes, again)]
    tokens = np.concatenate([tokens for tokens, _, _ in parts], axis=2).reshape(n, -1)
    used = np.concatenate([slots < sizes[..., None] for _, sizes, _ in parts], axis=2)
    used = (used & kept[..., None]).reshape(n, -1)
    scored = np.repeat(np.stack([scored for _, _, scored in parts], axis=2), MOTIF, axis=2)
    scored = scored.reshape(n, -1) & used
    places = np.cumsum(used, axis=1) + (seq_len - used.sum(axis=1))[:, None]
    whole, answers = np.full((n, seq_len + 1), pad), np.full((n, seq_len + 1), IGNORE)
    rows = np.broadcast_to(np.arange(n)[:, None], places.shape)
    whole[rows[used], places[used]] = tokens[used]
    answers[rows[scored], places[scored]] = tokens[scored]
    return with_length(whole[:, :-1], answers[:, 1:])


def solve_fuzzy_recall(inputs: Tensor, vocab_size: int) -> Tensor:
    """Answers by hand: a dictionary from the motif of a key to that of its value.

    Right wherever all keys have the same number of tokens, as in tests. It is told which tokens
    spell keys.

    Returns:
        `[B, L]` answers, 0 where it has none.
    """
    half, answers = (vocab_size - 1) // 2, torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs.tolist()):
        known: dict[tuple[int, ...], list[int]] = {}
        key: list[int] = []
        value: list[int] = []
        for position, token in enumerate(tokens):
            if token == vocab_size - 1:
                continue
            if token < half:
                if value:
                    known[tuple(key)] = value
                    key, value = [], []
                key.append(token)
            else:
                value.append(token)
            rest = known.get(tuple(key), [])[len(value) :]
            answers[row, position] = rest[0] if rest else 0
    return answers


@dataclass(kw_only=True, eq=False)
class InContextRecall(MadTask):
    """MAD's in-context and, with `noise`, noisy in-context recall: see `make_in_context_recall`.

    Defaults are the baselines of arXiv 2403.17844 (of noisy recall: V 32, 16 noise tokens, noise
    0.2). Differs in that a row keeps its last token, whose position has no target: L positions,
    not L - 1. Accuracy is over all scored positions; MAD's is averaged over classes. Other options
    are those of `MadTask` and `RecallTask`.

    Args:
        vocab_size: V; default 16. Changes of the suite: 32, 64, 128 (noisy: 48, 80, 144).
        seq_len: L, even; default 128. Changes: 256, 512, 1024.
        noise_vocab: the last so many tokens of V are noise; default 0.
        noise: how likely a pair is replaced by two noise tokens; default 0. Changes: 0.4, 0.6, 0.8.
    """

    name = "in_context_recall"
    trains_on_all = True

    vocab_size: int = 16
    seq_len: int = 128
    noise_vocab: int = 0
    noise: float = 0.0

    def check(self, level: int) -> None:
        """Raises `ValueError` if no such pairs can be made."""
        if level < 4 or level % 2:
            raise ValueError(f"seq_len ({level}) must be even and at least 4: pairs of tokens")
        if not 0 <= self.noise < 1 or (self.noise > 0) != (self.noise_vocab > 0):
            raise ValueError(
                f"noise ({self.noise}) must be in [0, 1), and noise_vocab ({self.noise_vocab}) "
                "1 or more where there is noise, else 0"
            )
        if self.vocab_size - self.noise_vocab < 2:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must hold a key and a value besides the "
                f"{self.noise_vocab} noise tokens"
            )

    @property
    def chance_level(self) -> float:
        """Of guessing among all values."""
        symbols = self.vocab_size - self.noise_vocab
        return 1 / (symbols - symbols // 2)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` examples of length `level` from `rng` alone."""
        return make_in_context_recall(
            rng,
            n,
            vocab_size=self.vocab_size,
            seq_len=level,
            noise_vocab=self.noise_vocab,
            noise=self.noise,
        )


@dataclass(kw_only=True, eq=False)
class FuzzyRecall(MadTask):
    """MAD's fuzzy in-context recall: see `make_fuzzy_recall`.

    Defaults are the baseline of arXiv 2403.17844. Keys of training have one to three tokens, those
    of tests three. Other options are those of `MadTask` and `RecallTask`.

    Args:
        vocab_size: V; default 16. Changes of the suite: 32, 64, 128.
        seq_len: L; default 128. Changes: 256, 512, 1024.
    """

    name = "fuzzy_recall"
    trains_on_all = True

    vocab_size: int = 16
    seq_len: int = 128

    def check(self, level: int) -> None:
        """Raises `ValueError` if motifs or pairs have no room."""
        if self.vocab_size < 2 * MOTIF + 1:
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must be at least {2 * MOTIF + 1}: three tokens of "
                "a key, three of a value and padding"
            )
        if level < 6 * MOTIF + 2:
            raise ValueError(
                f"seq_len ({level}) must be at least {6 * MOTIF + 2}, so that a pair fits before "
                "the one that is asked for"
            )

    @property
    def chance_level(self) -> float:
        """Of guessing among the tokens of values."""
        return 1 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    def make(self, rng: np.random.Generator, n: int, level: int) -> Batch:
        """Makes `n` test examples of length `level` from `rng` alone."""
        return make_fuzzy_recall(rng, n, vocab_size=self.vocab_size, seq_len=level)

    def train_set(self, rng: np.random.Generator, n: int) -> Batch:
        """With shorter keys too."""
        size = {"vocab_size": self.vocab_size, "seq_len": self.seq_len}
        return make_fuzzy_recall(rng, n, **size, shorter_keys=True)
