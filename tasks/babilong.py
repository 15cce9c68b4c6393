"""bAbI's stories scattered through a book, as BABILong asks them (arXiv 2406.10149).

Stories are made here from templates of the same kinds as those of bAbI's tasks 1 to 3; published
sets are read from their files. Facts keep their order among sentences of a book, the question
follows, and the answer is one word.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GOES = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
TAKES = ("took", "grabbed", "picked up", "got")
LEAVES = ("dropped", "left", "put down", "discarded")

Story = Literal["qa1", "qa2", "qa3"]


class Question(NamedTuple):
    """A story and what is asked of it.

    Attributes:
        facts: sentences in their order.
        text: the question.
        answer: one word.
    """

    facts: list[str]
    text: str
    answer: str


class Sample(NamedTuple):
    """What a model reads, and what it should say.

    Attributes:
        context: the facts, among others.
        question: see `Question`.
        answer: likewise.
    """

    context: str
    question: str
    answer: str


def make_story(rng: random.Random, kind: Story, facts: int) -> Question:
    """A random story and a question that its facts answer.

    qa1 asks where a person is (one fact decides), qa2 where a thing is that people carry (two), qa3
    where it was before it came to a place (three).

    Args:
        rng: the only source of randomness.
        kind: which question.
        facts: sentences at least; more until the question has an answer.
    """
    at = dict.fromkeys(PEOPLE, "")
    holder: dict[str, str] = {}
    path: dict[str, list[str]] = {thing: [] for thing in THINGS}  # where each has been, in order
    told: list[str] = []
    while len(told) < facts or not (found := _questions(kind, at, holder, path)):
        person = rng.choice(PEOPLE)
        carried = [thing for thing in THINGS if holder.get(thing) == person]
        free = [t for t in THINGS if t not in holder and (not path[t] or path[t][-1] == at[person])]
        deed = rng.random()
        if kind != "qa1" and deed < 0.25 and free and at[person]:
            thing = rng.choice(free)
            holder[thing] = person
            told.append(f"{person} {rng.choice(TAKES)} the {thing} there.")
            _moved(path[thing], at[person])
        elif kind != "qa1" and deed < 0.4 and carried:
            thing = rng.choice(carried)
            del holder[thing]
            told.append(f"{person} {rng.choice(LEAVES)} the {thing}.")
        else:
            at[person] = rng.choice([place for place in PLACES if place != at[person]])
            told.append(f"{person} {rng.choice(GOES)} the {at[person]}.")
            for thing in carried:
                _moved(path[thing], at[person])
    text, answer = rng.choice(found)
    return Question(told, text, answer)


def _moved(places: list[str], place: str) -> None:
    if not places or places[-1] != place:
        places.append(place)


def _questions(
    kind: Story, at: dict[str, str], holder: dict[str, str], path: dict[str, list[str]]
) -> list[tuple[str, str]]:
    """What may be asked now, with the answers."""
    if kind == "qa1":
        return [(f"Where is {person}?", place) for person, place in at.items() if place]
    known = {thing: places for thing, places in path.items() if places}
    if kind == "qa2":
        return [(f"Where is the {thing}?", places[-1]) for thing, places in known.items()]
    return [
        (f"Where was the {thing} before the {places[-1]}?", places[-2])
        for thing, places in known.items()
        if len(places) > 1 and places.count(places[-1]) == 1
    ]


def scattered(
    rng: random.Random,
    story: Question,
    background: Sequence[str],
    tokens: Callable[[str], int],
    limit: int,
) -> Sample:
    """A story among successive sentences of a book, of as many tokens as fit.

    Sentences begin at a random place of the book, which goes on from its start. Facts stand before
    places drawn with replacement, and keep their order.

    Args:
        rng: the only source of randomness.
        story: whose facts are scattered.
        background: sentences; shorter ones than ten words are left out, as published.
        tokens: of a text.
        limit: of the context and the question; 0 or less than the story for the story alone.

    Raises:
        ValueError: the book has no sentence of ten words.
    """
    book = [sentence for sentence in background if len(sentence.split()) >= 10]
    if not book:
        raise ValueError("the background has no sentence of ten words or more")
    first, room = rng.randrange(len(book)), limit - tokens(" ".join([*story.facts, story.text]))
    taken: list[str] = []
    while (room := room - tokens(" " + book[(first + len(taken)) % len(book)])) >= 0:
        taken.append(book[(first + len(taken)) % len(book)])
    places = sorted(rng.choices(range(len(taken) + 1), k=len(story.facts)))
    for later, (place, fact) in enumerate(zip(places, story.facts, strict=True)):
        taken.insert(place + later, fact)
    return Sample(" ".join(taken), story.text, story.answer)


def score(prediction: str, sample: Sample, labels: Sequence[str] = PLACES) -> float:
    """1 where the first sentence of a prediction names the answer and no other label.

    Labels that stand in the question do not count. Case is ignored.
    """
    sentence = prediction.lower().strip().split("\n")[0].split(".")[0]
    asked = sample.question.lower()
    named = {label for label in labels if label in sentence and label not in asked}
    return float(named == {sample.answer.lower()})


def read_babilong(path: Path) -> list[Sample]:
    """The samples of a file of BABILong: a JSON object with a line each, as the hub's set has them.

    Raises:
        ValueError: a line is none, or lacks `input`, `question` or `target`; with its number.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            samples.append(Sample(found["input"], found["question"], found["target"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: not a sample of BABILong with `input`, `question` and "
                f"`target` ({error})"
            ) from error
    return samples
