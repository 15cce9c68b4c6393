"""Prompts of RULER (arXiv 2404.06654) as text: needles in haystacks, variables, frequent words.

Prompts and answer prefixes are those of github.com/NVIDIA/RULER, so that its scores mean the same;
its words (of the package wonderwords) and essays are not here, so haystacks and keys are others.
A prompt ends with the prefix of the answer, which a model continues.
"""

import json
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["words", "numbers", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of the sentences before a needle
ADJECTIVES = """
    amber ancient bitter bold brave brief bright broad calm clever cold cosmic crisp curious
    dark deep distant dry eager early earnest faint fair fierce firm flat fresh gentle giant
    glad grand happy harsh hidden hollow humble icy idle keen kind large late light lively
    lone loud lucky mellow mild narrow neat noble odd pale patient plain proud quick quiet
    rapid rare rough round rustic sharp shy silent simple sleepy slow small smooth soft solid
    steep strange sturdy subtle sunny sweet swift tall tame tender thick thin tidy tiny tough
    vast vivid warm weary wide wild wise young
""".split()  # noqa: SIM905
NOUNS = """
    acorn anchor apple arrow badge barrel basket beacon bell bird blanket boat book bottle
    bridge brush bucket button cabin candle canyon carpet castle chair cherry circle cliff
    clock cloud coast coin comet copper corner cradle crystal curtain desert door dragon drum
    eagle echo ember engine feather fence field flame flute forest fountain garden gate
    glacier glove harbor hammer helmet hill island ivory jacket jewel journal kettle ladder
    lake lantern leaf lemon library lion magnet maple marble meadow mirror moon mountain
    needle ocean orchard paddle paper pebble pencil piano pillow planet pocket pond quilt
    rabbit ribbon river rocket sail saddle shadow shell shore spoon spring star statue stone
    table temple thread tiger tower valley violin wagon wheel willow window winter
""".split()  # noqa: SIM905


class Prompt(NamedTuple):
    """What a model is asked, and what it should say.

    Attributes:
        text: up to and with the prefix of the answer.
        answers: all of them are wanted.
    """

    text: str
    answers: list[str]


@dataclass(frozen=True)
class NeedleOptions:
    """Which needles are hidden where: the columns of RULER's table.

    Attributes:
        haystack: "noise", five sentences again and again; "essay", sentences of a text; "needle",
            other needles.
        keys: what keys are.
        values: what values are.
        needles: keys that are hidden; at least those that are asked for.
        values_of_key: all of which are asked for.
        queries: keys that are asked for.
    """

    haystack: Haystack = "noise"
    keys: Kind = "words"
    values: Kind = "numbers"
    needles: int = 1
    values_of_key: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": NeedleOptions(),
    "niah_single_2": NeedleOptions(haystack="essay"),
    "niah_single_3": NeedleOptions(haystack="essay", values="uuids"),
    "niah_multikey_1": NeedleOptions(haystack="essay", needles=4),
    "niah_multikey_2": NeedleOptions(haystack="needle"),
    "niah_multikey_3": NeedleOptions(haystack="needle", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleOptions(haystack="essay", values_of_key=4),
    "niah_multiquery": NeedleOptions(haystack="essay", needles=4, queries=4),
}
GENERATED = {"niah": 128, "vt": 30, "fwe": 50}  # tokens that an answer may have


def needle_prompt(
    rng: random.Random, size: int, options: NeedleOptions, essay: Sequence[str] = ()
) -> Prompt:
    """A prompt of RULER's needles.

    Sentences of an essay get needles at different ones of 40 evenly spaced depths; in the other
    haystacks they stand before different random sentences.

    Args:
        rng: the only source of randomness.
        size: sentences of the haystack, at least as many as needles.
        options: which needles.
        essay: sentences, repeated as needed; for haystack="essay".

    Raises:
        ValueError: the haystack is too small, or there is no essay.
    """
    count = max(options.needles, options.queries)
    keys = _different(lambda: _drawn(rng, options.keys), count)
    values = [[_drawn(rng, options.values) for _ in range(options.values_of_key)] for _ in keys]
    pairs = [(key, value) for key, its in zip(keys, values, strict=True) for value in its]
    needles = [_needle(options.values, key, value) for key, value in pairs]
    rng.shuffle(needles)
    if size < len(needles):
        raise ValueError(f"a haystack of {size} sentences is too small for {len(needles)} needles")
    context = _haystack(rng, size, options, needles, essay)
    asked = rng.sample(range(len(keys)), options.queries)
    names = [keys[i] for i in asked]
    query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    answers = [value for i in asked for value in values[i]]
    what, some, are = str(options.values), "Some", "are all the"
    if len(answers) == 1:
        what, some, are = what[:-1], "A", "is the"
    text = (
        f"{some} special magic {what} {are.split()[0]} hidden within the following text. Make sure "
        f"to memorize it. I will quiz you about the {what} afterwards.\n{context}\nWhat {are} "
        f"special magic {what} for {query} mentioned in the provided text? The special magic "
        f"{what} for {query} mentioned in the provided text {are.split()[0]}"
    )
    return Prompt(text, answers)


def _needle(values: Kind, key: str, value: str) -> str:
    return f"One of the special magic {values} for {key} is: {value}."


def _haystack(
    rng: random.Random,
    size: int,
    options: NeedleOptions,
    needles: Sequence[str],
    essay: Sequence[str],
) -> str:
    if options.haystack == "essay":
        if not essay:
            raise ValueError("a haystack of an essay needs its sentences")
        sentences = [essay[i % len(essay)] for i in range(size)]
        places = [size * depth // 100 for depth in rng.sample(DEPTHS, len(needles))]
    else:
        sentences = [NOISE] * size
        if options.haystack == "needle":
            sentences = [
                _needle(options.values, _drawn(rng, options.keys), _drawn(rng, options.values))
                for _ in range(size)
            ]
        places = rng.sample(range(size), len(needles))
    for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
        sentences.insert(place, needle)
    return (" " if options.haystack == "essay" else "\n").join(sentences)


def variable_prompt(rng: random.Random, size: int, *, chains: int = 1, hops: int = 4) -> Prompt:
    """A prompt of RULER's variable tracking: which variables get the value of the first chain?

    `VAR A = 12345` is followed by `VAR B = VAR A` and so on, in order, at random places among the
    noise. Differs in that there is no worked example before.

    Args:
        rng: the only source of randomness.
        size: sentences of noise, at least `hops` + 1.
        chains: of variables, each with a value of its own.
        hops: from each chain's first variable to its last.

    Raises:
        ValueError: the noise is too short.
    """
    length = hops + 1
    if size < length:
        raise ValueError(f"noise of {size} sentences is too short for a chain of {length}")
    names = _different(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), chains * length)
    values = _different(lambda: str(rng.randrange(10_000, 99_999)), chains)
    sentences = [NOISE] * size
    for chain, value in enumerate(values):
        mine = names[chain * length : (chain + 1) * length]
        sources = [value, *(f"VAR {name}" for name in mine)]
        places = sorted(rng.sample(range(len(sentences)), length))
        for later, place in enumerate(places):
            sentences.insert(place + later, f"VAR {mine[later]} = {sources[later]}")
    context, value = "\n".join(sentences), values[0]
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above. Answer: According to the chain(s) of variable assignment in the text above, "
        f"{length} variables are assigned the value {value}, they are: "
    )
    return Prompt(text, names[:length])


def frequent_words_prompt(
    rng: random.Random, size: int, *, words: int = 100, alpha: float = 2.0
) -> Prompt:
    """A prompt of RULER's frequent words: the three that come most often among coded words.

    The word of rank r comes `size * r^-alpha / zeta` times, rounded down, with zeta the sum of
    r^-alpha over all ranks; that of rank 1 is `...`, which the question says to ignore.

    Args:
        rng: the only source of randomness.
        size: words of the text, about.
        words: different words that there are.
        alpha: above 1.

    Raises:
        ValueError: the text is too short for the third word to come more often than the fourth.
    """
    zeta = sum(rank**-alpha for rank in range(1, 100_001))
    zeta += 100_000.5 ** (1 - alpha) / (alpha - 1)  # the rest, as an integral
    names = _different(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), words)
    names[0] = "..."
    counts = [int(size * rank**-alpha / zeta) for rank in range(1, words + 1)]
    if not counts[3] < counts[2]:
        raise ValueError(f"a text of {size} words is too short to tell the most frequent three")
    text = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    question = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(text)}\nQuestion: Do not provide any "
        "explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text? Answer: According to the coded text above, the three most "
        "frequently appeared words are:"
    )
    return Prompt(question, names[1:4])


def largest_prompt(make: Callable[[int], Prompt], tokens: Callable[[str], int], limit: int) -> int:
    """The greatest haystack whose prompt has no more than so many tokens.

    Args:
        make: a prompt with a haystack of a given size.
        tokens: of a text.
        limit: tokens, those of the answer taken off already.

    Raises:
        ValueError: not even the smallest that can be made fits.
    """

    def fits(size: int) -> bool | None:
        try:
            return tokens(make(size).text) <= limit
        except ValueError:  # too small
            return None

    size, best = 1, 0
    while (found := fits(size)) is not False:
        best = size if found else best
        size *= 2
    low, high = size // 2, size
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        if found is False:
            high = middle
        else:
            low = middle
            best = middle if found else best
    if not best:
        raise ValueError(f"no prompt of this task fits into {limit} tokens")
    return best


def score_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's score of needles, variables and words: the share of answers found, case ignored."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def score_exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the words and numbers of a prediction are the answers and no others, in any order.

    RULER's own score rewards an answer that names everything; this one does not.
    """
    found = re.findall(r"[\w-]+", prediction.lower())
    return float(sorted(found) == sorted(answer.lower() for answer in answers))


def read_ruler(path: Path) -> list[Prompt]:
    """The samples of a file that RULER's `prepare.py` wrote, a JSON object with a line each.

    Raises:
        ValueError: a line is none, or lacks `input` or `outputs`; with its number.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            answers = [str(answer) for answer in sample["outputs"]]
            prompts.append(Prompt(sample["input"] + sample.get("answer_prefix", ""), answers))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: not a sample of RULER with `input` and `outputs` ({error})"
            ) from error
    return prompts


def _drawn(rng: random.Random, kind: Kind) -> str:
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _different(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
