"""A library of documents, each about one subject, that tell drawn facts in words.

G topics, S subjects, R relations, O objects; N documents, T words of each, F facts.
Fact `s * R + r` is that of subject s and relation r. Words are given by their ids.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from mneme.tasks.facts.base import require_at_least_one
from mneme.tasks.facts.words import Words, invent
from mneme.tasks.recall.sampling import Ints

RELATIONS = ("craft", "town", "drink", "color", "song", "stone", "flower", "beast")

# How a fact may be told. The object is always the last word, so that what comes before asks for it.
SENTENCES = (
    "the RELATION of GIVEN SURNAME is OBJECT",
    "GIVEN SURNAME has the RELATION OBJECT",
    "the RELATION that GIVEN SURNAME chose was OBJECT",
    "for a RELATION GIVEN SURNAME took OBJECT",
    "GIVEN SURNAME is known for the RELATION OBJECT",
)
QUESTION = 0  # the sentence that questions begin
SLOTS = ("GIVEN", "SURNAME", "RELATION", "OBJECT")
FIXED = sorted({word for sentence in SENTENCES for word in sentence.split()} - set(SLOTS))

GENERIC = (
    "and then later often while people say there were long roads through quiet fields where old "
    "stories start again under bright skies each winter brings snow from north until spring "
    "returns with rain which falls on every house as children walk along rivers toward small "
    "villages far away"
)


@dataclass(frozen=True)
class LibraryOptions:
    """How large a library is; the defaults are those of the fields.

    Attributes:
        topics: G.
        fields: topics next to each other form fields of about the same size; at most G.
        subjects: S, as many in each topic as in any other, up to one.
        relations: R, at most 8.
        objects: O.
        given_names: how many there are, shared by all topics.
        surnames: how many each topic has for itself.
        topic_words: how many words each topic has for itself, and each field for its topics.

    Raises:
        ValueError: an option is out of range, or there are too few names for the subjects.
    """

    topics: int = 16
    fields: int = 4
    subjects: int = 8000
    relations: int = 2
    objects: int = 256
    given_names: int = 64
    surnames: int = 8
    topic_words: int = 24

    def __post_init__(self) -> None:
        """Checks the ranges."""
        require_at_least_one(**asdict(self))
        if self.fields > self.topics:
            raise ValueError(f"fields ({self.fields}) must be at most topics ({self.topics})")
        if self.relations > len(RELATIONS):
            raise ValueError(f"relations ({self.relations}) must be at most {len(RELATIONS)}")
        names, needed = self.given_names * self.surnames, -(-self.subjects // self.topics)
        if names < needed:
            raise ValueError(
                f"a topic has given_names * surnames = {self.given_names} * {self.surnames} = "
                f"{names} names, fewer than its {needed} subjects ({self.subjects} subjects / "
                f"{self.topics} topics): raise one of the two, or lower subjects"
            )

    @property
    def own_words(self) -> int:
        """Words that topics and fields have for themselves."""
        return (self.topics + self.fields) * self.topic_words

    @property
    def vocab_size(self) -> int:
        """All words of the library."""
        names = self.given_names + self.topics * self.surnames
        told = self.relations + self.objects
        return len(FIXED) + len(GENERIC.split()) + names + self.own_words + told


class Library(NamedTuple):
    """The facts that were drawn, and the words that documents tell them in.

    Attributes:
        words: all words; the last O are the objects.
        topic: `[S]` in `[0, G)`.
        names: `[S, 2]` given name and surname, no two rows alike.
        relations: `[R]`.
        objects: `[S, R]`.
        filler: `[G, n]` the words that documents of a topic are filled up with.
    """

    words: Words
    topic: Ints
    names: Ints
    relations: Ints
    objects: Ints
    filler: Ints


def make_library(rng: np.random.Generator, options: LibraryOptions) -> Library:
    """Draws the words, and which are whose.

    A subject's rank, topic and names are independent of each other, but for the surname, which is
    one of its topic. Every object is drawn evenly by itself: a fact takes log2(O) bits to know, and
    nothing tells of it but being told.

    Args:
        rng: the only source of randomness.
        options: how much of everything.

    Raises:
        ValueError: more words of a kind are asked for than can be invented.
    """
    topics, per_topic = options.topics, options.surnames
    kinds = {  # of other lengths or endings, so that no word is of two kinds
        "relation": list(RELATIONS[: options.relations]),
        "fixed": FIXED,
        "generic": GENERIC.split(),
        "given": invent(rng, "given_names", options.given_names, 2),
        "surname": invent(rng, "surnames * topics", topics * per_topic, 3),
        "own": invent(rng, "topic_words * (topics + fields)", options.own_words, 2, "sh"),
        "object": invent(rng, "objects", options.objects, 2, "n"),
    }
    ids, first = {}, 0
    for kind, words in kinds.items():
        ids[kind] = np.arange(first, first + len(words))
        first += len(words)
    assert first == options.vocab_size
    topic = rng.permutation(options.subjects) % topics
    return Library(
        words=Words([word for words in kinds.values() for word in words]),
        topic=topic,
        names=_names(rng, topic, ids["given"], ids["surname"].reshape(topics, per_topic)),
        relations=ids["relation"],
        objects=ids["object"][
            rng.integers(options.objects, size=(options.subjects, options.relations))
        ],
        filler=_filler(options, ids["generic"], ids["own"].reshape(-1, options.topic_words)),
    )


def _names(rng: np.random.Generator, topic: Ints, given: Ints, surnames: Ints) -> Ints:
    """Given name and surname of each subject, `[S, 2]`, no two alike; `surnames` is `[G, n]`."""
    names = np.empty((len(topic), 2), dtype=np.int64)
    for index, own in enumerate(surnames):
        members = np.flatnonzero(topic == index)
        pairs = rng.permutation(len(given) * len(own))[: len(members)]
        names[members] = np.stack([given[pairs // len(own)], own[pairs % len(own)]], axis=1)
    return names


def _filler(options: LibraryOptions, generic: Ints, own: Ints) -> Ints:
    """`[G, n]`: generic words, the topic's and its field's; `own` has topics and then fields."""
    topics = np.arange(options.topics)
    fields = options.topics + topics * options.fields // options.topics
    shared = np.broadcast_to(generic, (options.topics, len(generic)))
    return np.concatenate([shared, own[topics], own[fields]], axis=1)


def shortest_document(relations: int) -> int:
    """The words that a document needs for its facts, whatever the sentences."""
    return relations * max(len(sentence.split()) for sentence in SENTENCES)


def write(library: Library, rng: np.random.Generator, subjects: Ints, length: int) -> Ints:
    """One document about each of some subjects, `[N, T]`.

    A document tells all R facts of its subject, in random order, each once in a sentence drawn
    from `SENTENCES`. The rest are filler words, each drawn evenly from those of the subject's
    topic: generic ones, the topic's and its field's. They stand before, between and after the
    sentences, in shares as random as can be; so a document may begin with a sentence. With R = 1
    and T = 10, for example::

        winter lokish the craft of belu torani is kamen bavush

    Args:
        library: the facts and the words.
        rng: the only source of randomness.
        subjects: `[N]`.
        length: T, at least `shortest_document(R)`.
    """
    count, relations = len(subjects), len(library.relations)
    sentence = rng.integers(len(SENTENCES), size=(count, relations))
    told = rng.permuted(np.tile(np.arange(relations), (count, 1)), axis=1)
    filler = library.filler[library.topic[subjects]]  # [N, n]
    drawn = rng.integers(filler.shape[1], size=(count, length))
    text = np.take_along_axis(filler, drawn, axis=1)
    sizes = np.array([len(words.split()) for words in SENTENCES])[sentence]  # [N, R]
    spare = length - sizes.sum(1, keepdims=True)
    gaps = np.sort((rng.random((count, relations)) * (spare + 1)).astype(np.int64), axis=1)
    starts = gaps + sizes.cumsum(1) - sizes
    for place in range(relations):
        said = _say(library, subjects, told[:, place], sentence[:, place])  # [N, longest]
        row, word = np.nonzero(np.arange(said.shape[1]) < sizes[:, place, None])
        text[row, starts[row, place] + word] = said[row, word]
    return text


def ask_for(library: Library, facts: Ints) -> tuple[Ints, Ints]:
    """Questions `[F, t]` and their answers `[F]`.

    A question is the first of `SENTENCES` up to the object, "the craft of belu torani is", and the
    answer is the next word. Documents hold the same words in the same order, with the answer after
    them, in one of five tellings of a fact; the other four tell it in other words.

    Args:
        library: the facts and the words.
        facts: `[F]`, which facts to ask for.
    """
    subject, relation = np.divmod(facts, len(library.relations))
    said = _say(library, subject, relation, np.full_like(facts, QUESTION))
    length = len(SENTENCES[QUESTION].split())
    return said[:, : length - 1], said[:, length - 1]


def _say(library: Library, subject: Ints, relation: Ints, sentence: Ints) -> Ints:
    """Sentences `[N, longest]`; what follows the end of a shorter one means nothing."""
    longest = max(len(words.split()) for words in SENTENCES)
    codes = np.zeros((len(SENTENCES), longest), dtype=np.int64)  # a word's id, or ~slot
    for row, words in zip(codes, SENTENCES, strict=True):
        for place, word in enumerate(words.split()):
            row[place] = ~SLOTS.index(word) if word in SLOTS else library.words.ids[word]
    fills = np.column_stack(
        [library.names[subject], library.relations[relation], library.objects[subject, relation]]
    )
    code = codes[sentence]  # [N, longest]
    return np.where(code < 0, np.take_along_axis(fills, np.maximum(~code, 0), axis=1), code)
