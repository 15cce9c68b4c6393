"""RULER's prompts: needles, variables and words are where and as often as its code puts them."""

import json
import random
import re
from collections import Counter

import pytest

from mneme.tasks.ruler import (
    DEPTHS,
    NEEDLES,
    NOISE,
    NeedleOptions,
    Prompt,
    frequent_words_prompt,
    largest_prompt,
    needle_prompt,
    read_ruler,
    score_all,
    score_exact,
    variable_prompt,
)

ESSAY = [f"Sentence number {i} of the essay." for i in range(50)]
NEEDLE = r"One of the special magic (\w+) for (\S+) is: (\S+)\."


@pytest.mark.parametrize("name", NEEDLES)
def test_every_needle_is_hidden_whole_and_asked_for_as_the_table_says(name):
    options = NEEDLES[name]
    for seed in range(20):
        prompt = needle_prompt(random.Random(seed), 60, options, ESSAY)
        found = re.findall(NEEDLE, prompt.text)
        count = max(options.needles, options.queries) * options.values_of_key
        assert len(found) == count + (60 if options.haystack == "needle" else 0)
        assert len(prompt.answers) == options.queries * options.values_of_key
        (query,) = re.findall(r"for (.*) mentioned in the provided text\?", prompt.text)
        asked = re.split(r", and |, ", query)
        assert len(asked) == options.queries
        told = [value for _, key, value in found if key in asked]
        assert sorted(told) == sorted(prompt.answers)
        one = len(prompt.answers) == 1
        assert prompt.text.startswith("A special magic" if one else "Some special magic")
        assert prompt.text.endswith("provided text is" if one else "provided text are")
        assert {kind for kind, _, _ in found} == {options.values}


def test_the_published_prompt_of_one_needle_to_the_letter():
    prompt = needle_prompt(random.Random(1), 2, NeedleOptions())
    (key,) = {key for _, key, _ in re.findall(NEEDLE, prompt.text)}
    lines = prompt.text.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert sorted(lines[1:4]) == sorted(
        [NOISE, NOISE, f"One of the special magic numbers for {key} is: {prompt.answers[0]}."]
    )
    assert lines[4] == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert re.fullmatch(r"[1-9]\d{6}", prompt.answers[0])


def test_needles_in_an_essay_stand_at_different_ones_of_forty_depths():
    places = Counter()
    for seed in range(300):
        prompt = needle_prompt(random.Random(seed), 100, NEEDLES["niah_multikey_1"], ESSAY)
        context = prompt.text.split("\n")[1]
        before = [
            context[: match.start()].count("essay.") for match in re.finditer(NEEDLE, context)
        ]
        assert len(set(before)) == 4
        places.update(before)
    assert set(places) == {100 * depth // 100 for depth in DEPTHS}
    assert len(DEPTHS) == 40
    assert max(abs(count - 30) for count in places.values()) < 5 * 30**0.5


def test_variables_are_assigned_in_order_and_all_of_the_first_chain_are_wanted():
    for seed in range(20):
        prompt = variable_prompt(random.Random(seed), 30, chains=3, hops=4)
        assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt.text)
        assert len(assigned) == 15
        (value,) = re.findall(r"assigned the value (\d+) in the text above", prompt.text)
        have = set()
        for name, source in assigned:
            if source == value or source in have:
                have.add(name)
        assert have == set(prompt.answers)
        assert len(prompt.answers) == 5
        assert "5 variables are assigned the value" in prompt.text


def test_frequent_words_come_as_often_as_zeta_says():
    prompt = frequent_words_prompt(random.Random(0), 2000, alpha=2.0)
    text = prompt.text.split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = Counter(text).most_common(5)
    wanted = [int(2000 / (rank**2 * 1.6449340668)) for rank in range(1, 6)]  # pi^2 / 6
    assert [count for _, count in counts] == wanted
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == prompt.answers


@pytest.mark.parametrize("limit", [120, 333, 1000])
def test_the_largest_haystack_that_fits_is_found(limit):
    def make(size):
        return needle_prompt(random.Random(3), size, NeedleOptions(needles=4))

    def tokens(text):
        return len(text.split())

    if limit < tokens(make(4).text):
        with pytest.raises(ValueError, match="no prompt of this task fits into 120 tokens"):
            largest_prompt(make, tokens, limit)
        return
    size = largest_prompt(make, tokens, limit)
    assert tokens(make(size).text) <= limit < tokens(make(size + 1).text)


def test_scores_are_the_share_found_and_exact_ones_take_no_others():
    assert score_all("It is 1234567, or 7654321", ["1234567", "9999999"]) == 0.5
    assert score_all("AMBER-acorn", ["amber-ACORN"]) == 1
    assert score_exact(" 1234567.", ["1234567"]) == 1
    assert score_exact("b, a", ["A", "b"]) == 1
    assert score_exact("1234567 7654321", ["1234567"]) == 0
    assert score_exact("", ["1"]) == 0


def test_files_of_ruler_are_read_and_their_faults_named(tmp_path):
    path = tmp_path / "validation.jsonl"
    sample = {"input": "What is it?", "outputs": [7, "b"], "answer_prefix": " It is", "index": 3}
    path.write_text(json.dumps(sample) + "\n" + json.dumps({**sample, "answer_prefix": ""}))
    assert read_ruler(path) == [
        Prompt("What is it? It is", ["7", "b"]),
        Prompt("What is it?", ["7", "b"]),
    ]
    path.write_text(json.dumps(sample) + "\n{}\n")
    with pytest.raises(ValueError, match=r"validation.jsonl, line 2: not a sample .*'outputs'"):
        read_ruler(path)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda r: needle_prompt(r, 3, NEEDLES["niah_multivalue"], ESSAY), "too small for 4"),
        (lambda r: needle_prompt(r, 9, NEEDLES["niah_single_2"]), "needs its sentences"),
        (lambda r: variable_prompt(r, 4), "too short for a chain of 5"),
        (lambda r: frequent_words_prompt(r, 10), "too short to tell"),
    ],
)
def test_what_cannot_be_made_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(random.Random(0))
