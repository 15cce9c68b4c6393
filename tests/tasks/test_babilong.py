"""BABILong: stories whose answers a reader of the sentences finds, scattered in their order."""

import itertools
import json
import random
import re

import pytest

from mneme.tasks.babilong import (
    LEAVES,
    PLACES,
    TAKES,
    Question,
    Sample,
    make_story,
    read_babilong,
    scattered,
    score,
)

BOOK = [f"This is sentence {i} of a very long book about the weather." for i in range(90)]


def answered(facts, question):
    """Reads a story sentence by sentence, as a person would."""
    at, holder, been = {}, {}, {}
    for fact in facts:
        person, rest = fact.rstrip(".").split(" ", 1)
        place = rest.split(" the ")[-1]
        if any(rest.startswith(verb + " the") for verb in TAKES):
            thing = place.removesuffix(" there")
            holder[thing] = person
            been.setdefault(thing, []).append(at[person])
        elif any(rest.startswith(verb + " the") for verb in LEAVES):
            assert holder.pop(place) == person
        else:
            at[person] = place
            for thing in (t for t, whose in holder.items() if whose == person):
                been[thing].append(place)
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return at[match[1]]
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return been[match[1]][-1]
    thing, place = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question).groups()
    places = [p for i, p in enumerate(been[thing]) if not i or p != been[thing][i - 1]]
    return places[places.index(place) - 1]


@pytest.mark.parametrize("kind", ["qa1", "qa2", "qa3"])
def test_stories_have_the_answer_that_a_reader_finds(kind):
    answers = set()
    for seed in range(300):
        story = make_story(random.Random(seed), kind, 2 + seed % 12)
        assert answered(story.facts, story.text) == story.answer
        assert len(story.facts) >= 2 + seed % 12
        answers.add(story.answer)
    assert answers == set(PLACES)


def test_facts_keep_their_order_in_a_book_of_the_length_that_fits():
    def tokens(text):
        return len(text.split())

    starts = set()
    for seed in range(50):
        rng = random.Random(seed)
        story = make_story(rng, "qa1", 5)
        sample = scattered(rng, story, [*BOOK, "Too short."], tokens, 400)
        used = tokens(f"{sample.context} {sample.question}")
        assert 400 - 12 < used <= 400
        places = [sample.context.index(fact) for fact in dict.fromkeys(story.facts)]
        assert places == sorted(places)
        numbers = [int(n) for n in re.findall(r"sentence (\d+)", sample.context)]
        assert all((b - a) % 90 == 1 for a, b in itertools.pairwise(numbers))
        assert "Too short" not in sample.context
        starts.add(numbers[0])
    assert len(starts) > 25
    story = make_story(random.Random(0), "qa1", 3)
    alone = scattered(random.Random(0), story, BOOK, tokens, 0)
    assert alone.context == " ".join(story.facts)


def test_a_score_takes_the_first_sentence_and_one_label():
    sample = Sample("", "Where was the milk before the office?", "kitchen")
    assert score(" The kitchen.", sample) == 1
    assert score("KITCHEN\nThen the garden", sample) == 1
    assert score("It was in the kitchen before the office", sample) == 1
    assert score("the kitchen or the garden", sample) == 0
    assert score("the garden. The kitchen", sample) == 0
    assert score("", sample) == 0


def test_published_files_are_read_and_their_faults_named(tmp_path):
    path = tmp_path / "qa1.jsonl"
    path.write_text(json.dumps({"input": "a b", "question": "Where?", "target": "garden"}) + "\n[]")
    with pytest.raises(ValueError, match=r"qa1.jsonl, line 2: not a sample of BABILong"):
        read_babilong(path)
    path.write_text(path.read_text().splitlines()[0])
    assert read_babilong(path) == [Sample("a b", "Where?", "garden")]


def test_a_book_of_short_sentences_is_refused():
    with pytest.raises(ValueError, match="no sentence of ten words"):
        scattered(random.Random(0), Question(["a."], "b?", "c"), ["Too short."], len, 100)
