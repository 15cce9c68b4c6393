"""Invented words, and token ids for a fixed list of words.

N words, T words of a text.
"""

import hashlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mneme.storage.files import replacing
from mneme.tasks.recall.sampling import distinct

Ids = NDArray[np.int64]

SYLLABLES = [consonant + vowel for consonant in "bdfgjklmnprstvz" for vowel in "aeiou"]

WORDS_FILE = "words.txt"


def invent(
    rng: np.random.Generator, kind: str, count: int, syllables: int, ending: str = ""
) -> list[str]:
    """Different words that can be typed, such as "lukami" of three syllables.

    Args:
        rng: the only source of randomness.
        kind: what they are, for the error.
        count: N, at most 75 to the power of `syllables`.
        syllables: of each word; each has two letters.
        ending: the last letters of every word. Words of other lengths or endings are others.

    Raises:
        ValueError: there are not as many words of this form.
    """
    most = len(SYLLABLES) ** syllables
    if count > most:
        raise ValueError(
            f"{kind}: {count} different words of {syllables} syllables are asked for, but there "
            f"are {most}"
        )
    codes = distinct(rng, 1, count, most)[0]
    digits = codes[:, None] // len(SYLLABLES) ** np.arange(syllables) % len(SYLLABLES)
    return ["".join(SYLLABLES[digit] for digit in word) + ending for word in digits.tolist()]


class Words:
    """One token id per word, by place in a list; words of a text are apart by white space.

    Args:
        words: all words there are, no two alike.

    Raises:
        ValueError: a word stands there twice, or is none.
    """

    end_of_document: int | None = None  # texts of words have none

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) < len(self.words):
            twice = next(word for i, word in enumerate(self.words) if self.ids[word] != i)
            raise ValueError(f"the word {twice!r} stands twice in the list: each has one id")
        if wrong := [word for word in self.words if word.split() != [word]]:
            raise ValueError(f"{wrong[0]!r} is no word: a word is not empty and has no white space")

    def __len__(self) -> int:
        return len(self.words)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could be given other ids."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        """The ids of a text, `[T]`.

        Raises:
            ValueError: a word is not in the list.
        """
        said = text.split()
        for place, word in enumerate(said, start=1):
            if word not in self.ids:
                near = get_close_matches(word, self.words, n=1)
                advice = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"word {place} of the text, {word!r}, is none of the {len(self)} known{advice}"
                )
        return np.array([self.ids[word] for word in said], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for: `decode(encode(text)) == text` with single spaces."""
        return " ".join(self.words[index] for index in ids)

    def save(self, folder: Path) -> None:
        """Writes the list to `words.txt` there, a word in each line."""
        with replacing(folder / WORDS_FILE) as file:
            file.write("".join(f"{word}\n" for word in self.words).encode())

    @classmethod
    def load(cls, folder: Path) -> "Words":
        """Reads the list back from a folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = Path(folder) / WORDS_FILE
        if path.exists() and not path.is_file():  # a fifo would be waited for
            raise ValueError(f"{path} does not hold a list of words: it is no file")
        try:
            return cls(path.read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} does not hold a list of words: {error}") from error
