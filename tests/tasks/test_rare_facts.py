import hashlib
import re
from collections import Counter

import numpy as np
import pytest
import torch

from mneme.routers import Router
from mneme.tasks import LibraryOptions, RareFacts, RoutingOptions
from mneme.tasks.batch import IGNORE, NO_ROUTE, Batch, BatchSet, cut, deal, unscored
from mneme.tasks.facts import ArmMetrics, Exposures, FactMetrics, Words, topic_routes
from mneme.tasks.facts.library import FIXED, GENERIC, QUESTION, RELATIONS, SENTENCES

LIBRARY = {
    "topics": 4,
    "fields": 2,
    "subjects": 40,
    "objects": 8,
    "given_names": 8,
    "surnames": 2,
    "topic_words": 6,
}
ROUTING = {"branching": 2, "depth": 2, "components": 16}
ALL_ARMS = ["question", "document", "random", "generic"]


def small(library=None, routing=None, **options):
    return RareFacts(
        library=LibraryOptions(**(LIBRARY | (library or {}))),
        routing=RoutingOptions(**(ROUTING | (routing or {}))),
        **({"batch_size": 8, "counted_batches": 20} | options),
    )


def texts_of(task, batch):
    """Whole documents: what is read and the last word that is asked for."""
    ids = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
    return [task.tokenizer.decode(row) for row in ids.tolist()]


def facts_in(text):
    """(given name, surname, relation, object) of every sentence, and the words around them."""
    found = []
    for sentence in SENTENCES:
        pattern = re.sub(r"[A-Z]+", lambda slot: rf"(?P<{slot[0]}>\\w+)", sentence)
        pattern = pattern.replace("\\\\", "\\")
        for match in re.finditer(rf"\b{pattern}\b", text):
            found.append(match.group("GIVEN", "SURNAME", "RELATION", "OBJECT"))
            text = text.replace(match[0], "|")
    return found, text.replace("|", " ").split()


def truth(task):
    """Fact numbers and objects by the words that name them."""
    world, word = task.library, task.tokenizer.words
    relations = [word[r] for r in world.relations]
    return {
        (*(word[name] for name in names), relation): (len(relations) * s + r, word[told[r]])
        for s, (names, told) in enumerate(zip(world.names, world.objects, strict=True))
        for r, relation in enumerate(relations)
    }


def answered(task, answer):
    """The metrics of a solver, from the text of a question and its arm to a word or None."""
    metrics = task.metrics()
    for batch in task.eval_batches("test"):
        logits = torch.zeros(*batch.inputs.shape, task.vocab_size)
        arms = [task.arms[number] for number in batch.slices["arm"].tolist()]
        for row, (ids, arm) in enumerate(zip(batch.inputs.tolist(), arms, strict=True)):
            if (said := answer(task.tokenizer.decode(ids), arm)) is not None:
                logits[row, -1, task.tokenizer.ids[said]] = 100.0
        metrics.update(logits, batch)
    return metrics.compute()


def question_of(given, surname, relation):
    words = {"GIVEN": given, "SURNAME": surname, "RELATION": relation}
    return " ".join(words.get(word, word) for word in SENTENCES[QUESTION].split()[:-1])


@pytest.mark.parametrize(
    ("relations", "words", "seed"), [(1, 8, 0), (2, 16, 1), (2, 33, 2), (8, 70, 3)]
)
def test_a_document_tells_all_facts_of_its_subject_amid_words_of_its_topic(relations, words, seed):
    task = small(
        {"relations": relations}, routes="topic", document_words=words, batch_size=60, seed=seed
    )
    known, world = truth(task), task.library
    batch = task.train_batch(3)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.shape == (60, task.seq_len) == (60, words - 1)
    seen = Counter()
    for subject, text in zip(batch.slices["subject"].tolist(), texts_of(task, batch), strict=True):
        told, around = facts_in(text)
        numbers = [known[tuple(name)][0] for *name, said in told if known[tuple(name)][1] == said]
        assert sorted(numbers) == [relations * subject + r for r in range(relations)]
        filler = {task.tokenizer.words[i] for i in world.filler[world.topic[subject]]}
        assert filler.issuperset(around)
        seen.update(told_word for told_word in around if told_word not in GENERIC.split())
    assert len(seen) > 12 or words < 33, "words of topics and fields occur"


def test_what_is_asked_is_told_in_the_same_words_also_at_the_start_of_a_document():
    task, starts = small(routes="none", batch_size=400), 0
    known = truth(task)
    questions = {question_of(*name): said for name, (_, said) in known.items()}
    assert {
        task.tokenizer.decode(ids) for b in task.eval_batches("val") for ids in b.inputs.tolist()
    } == set(questions)
    texts = texts_of(task, task.train_batch(0))
    for question, said in questions.items():
        following = {m[1] for text in texts for m in re.finditer(rf"\b{question} (\w+)", text)}
        assert following <= {said}
        starts += any(text.startswith(question) for text in texts)
    assert starts > 3


def test_exposures_are_those_of_the_training_documents():
    task = small(routes="none")
    known, times = truth(task), Counter()
    for index in range(task.counted_batches):
        for text in texts_of(task, task.train_batch(index)):
            times.update(known[tuple(name)][0] for *name, _ in facts_in(text)[0])
    assert task.exposures.times.tolist() == [times[fact] for fact in range(80)]
    assert task.exposures.times.sum() == 20 * 8 * 2
    assert task.exposures.odds.sum() == pytest.approx(2)
    assert 0 < task.facts()["facts_exposed"] < 80


@pytest.mark.parametrize("routes", ["router", "none"])
def test_a_dictionary_of_the_training_documents_knows_all_that_was_told(routes):
    task, read = small(routes=routes), {}
    for index in range(task.counted_batches):
        for text in texts_of(task, task.train_batch(index)):
            read |= {question_of(*name): said for *name, said in facts_in(text)[0]}
    results = answered(task, lambda question, arm: read.get(question))
    assert results["accuracy/exposures=0"] == 0
    assert results["accuracy/exposures=1"] == results["accuracy/exposures=10"] == 1
    assert results["accuracy"] == pytest.approx(len(read) / 80)
    assert results["accuracy"] == results[f"accuracy/arm={task.arms[0]}"]
    assert results["facts_stored"] == len(read)
    missed = 1 - len(read) / 80
    assert task.dictionary_level == pytest.approx(results["accuracy"] + missed / 8)


def test_every_fact_is_asked_once_under_each_arm_and_scored_apart():
    task = small(ask=ALL_ARMS)
    known = {question_of(*name): (fact, said) for name, (fact, said) in truth(task).items()}

    def solver(question, arm):
        fact, said = known[question]
        knows = {"question": fact % 4 == 0, "document": True, "random": fact < 8}
        return said if knows.get(arm, False) else None

    results = answered(task, solver)
    shares = [results[f"accuracy/arm={arm}"] for arm in ALL_ARMS]
    assert shares == [0.25, 1, 0.1, 0]
    assert results["accuracy"] == 0.25
    assert results["loss/arm=document"] < 1e-6 < results["loss"] == results["loss/arm=question"]
    decades = [n for n in results if n.startswith("accuracy/arm=document/exposures=")]
    assert decades == [f"accuracy/arm=document/exposures={d}" for d in (0, 1, 10)]
    assert {results[name] for name in decades} == {1}
    assert "accuracy_weighted/arm=question" not in results
    asked = [
        (arm, fact)
        for b in task.eval_batches("val")
        for arm, fact in zip(b.slices["arm"].tolist(), b.slices["fact"].tolist(), strict=True)
    ]
    assert len(asked) == len(set(asked)) == 4 * 80
    assert len(next(iter(task.eval_batches("val"))).inputs) == 8, "two facts under four arms"


def test_a_part_of_the_evaluation_asks_under_every_arm():
    task = small(ask=ALL_ARMS, batch_size=3)
    metrics, batch = task.metrics(), next(iter(task.eval_batches("val")))
    metrics.update(torch.zeros(*batch.inputs.shape, task.vocab_size), batch)
    assert {f"loss/arm={arm}" for arm in ALL_ARMS} <= metrics.compute().keys()


def test_arm_metrics_are_fact_metrics_of_each_arm_and_add_up_over_ranks():
    told = Exposures(torch.tensor([0, 1, 10]), torch.ones(3).double(), torch.zeros(3).long())
    torch.manual_seed(0)
    fact, arm = torch.arange(3).repeat(2), torch.arange(2).repeat_interleave(3)
    targets = torch.full((6, 2), IGNORE)
    targets[:, -1] = torch.randint(4, (6,))
    batch, logits = Batch(targets, targets, {"fact": fact, "arm": arm}), torch.randn(6, 2, 4)
    first, second = (ArmMetrics(told, range(4), ["a", "b"]) for _ in range(2))
    first.update(logits, unscored(batch))
    assert not first.state().any()
    for metrics, part in ((first, slice(0, 4)), (second, slice(4, 6))):
        slices = {name: values[part] for name, values in batch.slices.items()}
        metrics.update(logits[part], Batch(targets[part], targets[part], slices))
    first.load_sum(first.state() + second.state())
    for name, rows in (("a", slice(0, 3)), ("b", slice(3, 6))):
        alone = FactMetrics(told, range(4))
        alone.update(logits[rows], Batch(targets[rows], targets[rows], {"fact": fact[rows]}))
        wanted = alone.compute()
        found = first.compute()
        assert found[f"loss/arm={name}"] == pytest.approx(wanted["loss"])
        assert found[f"accuracy/arm={name}"] == pytest.approx(wanted["accuracy"])
        assert name == "b" or found["stored_bits"] == pytest.approx(wanted["stored_bits"])


def routes_by_arm(task):
    """The route of each fact's question under each arm."""
    found = {arm: {} for arm in task.arms}
    for batch in task.eval_batches("val"):
        rows = zip(batch.slices["arm"].tolist(), batch.slices["fact"].tolist(), strict=True)
        for (arm, fact), leaf in zip(rows, batch.route.tolist(), strict=True):
            found[task.arms[arm]][fact] = leaf
    return {arm: [routes[fact] for fact in range(80)] for arm, routes in found.items()}


def test_the_router_routes_questions_by_their_text_and_documents_by_their_subject():
    task = small(ask=ALL_ARMS)
    asked = routes_by_arm(task)
    texts = [question_of(*name) for name in truth(task)]
    assert asked["question"] == task.routing.router.route(texts).tolist()
    assert set(asked["generic"]) == {NO_ROUTE}
    assert set(asked["random"]) == {0, 1, 2, 3}
    assert len({*asked["question"]}) > 1
    assert task.leaves == 4
    assert task.router == task.routing.router.hash
    for index in range(5):
        batch = task.train_batch(index)
        subjects = batch.slices["subject"].tolist()
        assert batch.route.tolist() == [asked["document"][2 * s + 1] for s in subjects]
    documents = task.routing.documents
    assert all(len(facts_in(text)[0]) == 2 for text in documents)
    assert asked["document"][::2] == task.routing.router.route(documents).tolist()


def test_quality_of_routes_is_recorded():
    task = small()
    asked = routes_by_arm(small(ask=ALL_ARMS))
    pairs = np.array([asked["question"], asked["document"]])
    recorded = task.facts()
    assert recorded["route_agreement_level1"] == (pairs[0] // 2 == pairs[1] // 2).mean()
    assert recorded["route_agreement_level2"] == (pairs[0] == pairs[1]).mean()
    shares = np.bincount(pairs[1], minlength=4) / 80
    assert recorded["leaf_share_largest"] == shares.max()
    assert recorded["leaf_share_smallest"] == shares.min()
    assert recorded["router"] == task.router
    assert recorded["ask"] == "question"
    assert recorded["topics"] == 4
    assert recorded["routing_depth"] == 2
    assert {type(value) for value in recorded.values()} <= {int, float, str}


def test_in_a_library_of_the_default_size_questions_find_their_documents():
    task = RareFacts()
    recorded = task.facts()
    assert recorded["facts"] == 16_000
    assert recorded["route_agreement_level1"] > 0.95
    assert recorded["route_agreement_level3"] > 0.85
    assert recorded["leaf_share_largest"] < 0.05


def test_topics_are_together_and_leaves_evenly_used():
    task = RareFacts(routes="topic", ask=["topic", "generic"])
    routes = topic_routes(task.library, 64)
    assert set(np.bincount(routes, minlength=64)) == {125}
    assert len(set(zip(task.library.topic.tolist(), (routes // 4).tolist(), strict=True))) == 16
    surnames = task.library.names[:, 1]
    assert max(len(set(routes[surnames == name])) for name in set(surnames)) == 2
    batch = task.train_batch(0)
    assert batch.route.tolist() == routes[batch.slices["subject"]].tolist()
    asked = next(iter(task.eval_batches("val")))
    facts, arms = asked.slices["fact"], asked.slices["arm"]
    assert asked.route[arms == 0].tolist() == routes[facts[arms == 0] // 2].tolist()
    assert set(asked.route[arms == 1].tolist()) == {NO_ROUTE}
    assert task.router is None
    assert task.leaves == 64


def test_random_routes_belong_to_documents_and_not_to_subjects():
    task = small(routes="random", ask=["random"])
    assert torch.equal(task.train_batch(4).route, task.train_batch(4).route)
    leaves = {}
    for index in range(20):
        batch = task.train_batch(index)
        for subject, leaf in zip(
            batch.slices["subject"].tolist(), batch.route.tolist(), strict=True
        ):
            leaves.setdefault(subject, []).append(leaf)
    counts = Counter(leaf for seen in leaves.values() for leaf in seen)
    assert set(counts) == set(leaves[0]) == {0, 1, 2, 3}
    assert max(counts.values()) < 2 * min(counts.values())
    assert task.router is None


def test_without_routes_batches_have_none():
    task = small(routes="none")
    batches = [task.train_batch(0), *task.eval_batches("val")]
    assert {batch.route for batch in batches} == {None}
    assert task.leaves is task.router is None
    assert task.arms == ("generic",)
    assert "route_agreement_level1" not in task.facts()


def test_what_is_told_depends_neither_on_routes_nor_on_arms():
    tasks = [small(routes=kind) for kind in ("router", "topic", "random", "none")]
    first, *others = (task.train_batch(2) for task in [*tasks, small(ask=ALL_ARMS)])
    assert all(torch.equal(first.inputs, other.inputs) for other in others)
    orders = [[b.slices["fact"] for b in task.eval_batches("test")] for task in tasks]
    assert all(torch.equal(torch.cat(orders[0]), torch.cat(order)) for order in orders)
    assert not torch.equal(first.inputs, tasks[0].train_batch(3).inputs)
    again = small()
    again.train_batch(7)
    batch = again.train_batch(2)
    assert torch.equal(batch.inputs, first.inputs)
    assert torch.equal(batch.targets, first.targets)
    assert torch.equal(batch.route, first.route)
    assert again.router == tasks[0].router
    assert small(seed=1).vocabulary != again.vocabulary == tasks[3].vocabulary


GOLDEN = {0: "388ed4ca1f90fd86", 1: "283959f2062de7c7"}


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_documents_of_a_seed_never_change(seed):
    task = RareFacts(seed=seed, routes="topic")
    batch = task.train_batch(3)
    parts = (batch.inputs, batch.targets, batch.route, next(iter(task.eval_batches("val"))).inputs)
    content = b"".join(part.numpy().tobytes() for part in parts) + task.vocabulary.encode()
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[seed]


def test_objects_are_drawn_evenly_and_names_are_different():
    library = RareFacts(routes="none").library
    counts = np.bincount(library.objects.ravel() - library.objects.min(), minlength=256)
    assert ((counts - 62.5) ** 2 / 62.5).sum() < 255 + 5 * np.sqrt(2 * 255)
    assert len({tuple(name) for name in library.names.tolist()}) == 8000
    assert set(np.bincount(library.topic)) == {500}
    # 8,000 subjects: a correlation of random ranks has a standard deviation of 0.011
    for values in (library.topic, *library.names.T):
        assert abs(np.corrcoef(values, np.arange(8000))[0, 1]) < 0.056
    families = set(zip(library.topic.tolist(), library.names[:, 1].tolist(), strict=True))
    assert len(families) == len({surname for _, surname in families}) == 16 * 8


def test_no_word_of_the_language_looks_like_an_invented_one():
    invented = r"([bdfgjklmnprstvz][aeiou]){2,3}(sh|n)?"
    known = [*RELATIONS, *FIXED, *GENERIC.split()]
    assert [word for word in known if re.fullmatch(invented, word)] == []
    assert len(set(known)) == len(known)


def test_text_becomes_ids_and_back_and_goes_with_the_run(tmp_path):
    task = small()
    text = next(iter(truth(task)))
    question = question_of(*text)
    ids = task.tokenizer.encode(question)
    assert ids.tolist() == task.question(np.array([0])).inputs[0].tolist()
    assert task.tokenizer.decode(ids) == question
    assert len(task.tokenizer) == task.vocab_size
    task.save_tokenizer(tmp_path)
    kept = Words.load(tmp_path)
    assert kept.fingerprint == task.vocabulary
    assert kept.encode(question).tolist() == ids.tolist()
    assert Router.load(tmp_path / "router").hash == task.router


def test_a_run_without_a_router_keeps_none(tmp_path):
    small(routes="topic").save_tokenizer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_a_saved_router_is_used_instead_of_fitting_one(tmp_path):
    given = small(seed=5)
    given.routing.router.save(tmp_path)
    task = small(routing={"folder": str(tmp_path)})
    assert task.router == given.router != small().router
    assert task.facts().keys() == given.facts().keys()
    with pytest.raises(ValueError, match=r"has 2 children at each of 2 levels; set branching=2"):
        small(routing={"folder": str(tmp_path), "depth": 3}).train_batch(0)


def test_a_word_that_is_not_known_is_named():
    words = Words(["the", "craft", "of"])
    with pytest.raises(
        ValueError, match=r"word 3 of the text, 'off', is none of the 3 known; did you mean 'of'\?"
    ):
        words.encode("the craft off")
    with pytest.raises(ValueError, match=r"word 1 of the text, 'zzz', is none of the 3 known$"):
        words.encode("zzz")
    assert words.encode("").tolist() == []


def test_a_list_of_words_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a' stands twice"):
        Words(["a", "b", "a"])
    with pytest.raises(ValueError, match=r"'b c' is no word"):
        Words(["a", "b c"])
    with pytest.raises(
        ValueError, match=r"words.txt does not hold a list of words: .*No such file"
    ):
        Words.load(tmp_path)
    (tmp_path / "words.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match=r"words.txt does not hold a list of words: '' is no word"):
        Words.load(tmp_path)


def routed_batch(count):
    numbers = torch.arange(count)
    return Batch(numbers[:, None], numbers[:, None], {"fact": numbers}, numbers + 10)


def test_routes_stay_with_their_examples():
    parts = list(cut(routed_batch(5), 2))
    assert [part.route.tolist() for part in parts] == [[10, 11], [12, 13], [14]]
    assert [part.route for part in cut(routed_batch(3)._replace(route=None), 2)] == [None, None]
    assert unscored(parts[0]).route.tolist() == [10, 11]
    dealt = list(deal(BatchSet(lambda: iter(parts)), rank=1, world_size=2))
    assert [part.route.tolist() for part in dealt] == [[12, 13], [14]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"library": {"subjects": 0}}, r"subjects \(0\) must be at least 1"),
        ({"library": {"objects": 1}}, r"objects \(1\) must be at least 2"),
        ({"library": {"objects": 6000}}, r"objects: 6000 different words .* but there are 5625"),
        ({"library": {"fields": 5}}, r"fields \(5\) must be at most topics \(4\)"),
        ({"library": {"relations": 9}}, r"relations \(9\) must be at most 8"),
        ({"library": {"subjects": 65}}, r"8 \* 2 = 16 names, fewer than its 17 subjects \(65"),
        ({"routing": {"branching": 1}}, r"branching \(1\) must be at least 2"),
        ({"routing": {"depth": 0}}, r"depth \(0\) must be at least 1"),
        ({"routing": {"balance": 1.0}}, r"balance \(1.0\) must be above 1 and at most .*\(2\)"),
        ({"routing": {"balance": 2.5}}, r"balance \(2.5\) must be above 1 and at most .*\(2\)"),
        ({"counted_batches": 0}, r"counted_batches \(0\) must be at least 1"),
        ({"offset": -1.0}, r"offset \(-1.0\) must be above -1"),
        ({"document_words": 15}, r"document_words \(15\) must be at least 16, which the 2 facts"),
        ({"ask": []}, r"ask \(\[\]\) must name one arm or more"),
        ({"ask": ["random", "random"]}, r"ask \(.*\) must name one arm or more, each once"),
        (
            {"ask": ["question", "topic"]},
            r"ask names 'topic', but with routes='router' a fact can be asked under question, doc",
        ),
        ({"routes": "none", "ask": ["question"]}, r"with routes='none' .* under generic: training"),
    ],
)
def test_what_cannot_be_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
