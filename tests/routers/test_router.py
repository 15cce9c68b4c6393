"""Routers are the same each time, on disk as in memory, and damage is named."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mneme.routers import Clustering, HashedTfidf, Router, RouterError, nodes, saved
from tests.routers.conftest import documents


def test_a_topic_has_a_node_that_its_questions_find(router, texts):
    topics = np.arange(len(texts)) % 4
    learnt = nodes(router.route(texts), 1, 3, 4)
    assert len({*zip(topics.tolist(), learnt.tolist(), strict=True)}) == 4
    questions = ["where did the ship drop anchor", "who milks the cow", "what did the jury say",
                 "how much butter does the recipe have"]  # fmt: skip
    assert np.array_equal(nodes(router.route(questions), 1, 3, 4), learnt[:4])


def test_the_leaf_of_a_text_depends_on_no_other(router, texts):
    leaves = router.route(texts)
    assert leaves.dtype == np.int64
    assert leaves.tolist() == [int(router.route([text])[0]) for text in texts]
    assert router.leaves == 64
    assert leaves.min() >= 0
    assert leaves.max() < 64


def test_every_text_has_a_leaf(router):
    empty, unknown, long = router.route(["", "zzz", "harbour " * 10_000])
    assert empty == unknown
    assert long == router.route(["harbour"])[0]
    assert router.route([]).shape == (0,)
    with pytest.raises(RouterError, match="got one text: 'harbour'"):
        router.route("harbour")


def test_the_hash_follows_from_texts_and_options(router, texts):
    def fit(texts, seed=0, clustering=None, **options):
        embedder = HashedTfidf(features=512, components=16, **options)
        return Router.fit(
            texts, embedder=embedder, branching=4, depth=3, seed=seed, clustering=clustering
        ).hash

    assert fit(texts) == router.hash
    others = [
        fit(texts[1:]),
        fit(texts, seed=1),
        fit(texts, ngrams=(1, 2)),
        fit(texts, clustering=Clustering(steps=3)),
    ]
    assert len({router.hash, *others}) == 5


def test_fitting_leaves_the_embedder_alone(texts):
    embedder = HashedTfidf(features=512)
    first = Router.fit(texts, embedder=embedder, depth=1)
    leaves = first.route(texts)
    Router.fit(["some", "other"], embedder=embedder, depth=1)
    assert np.array_equal(first.route(texts), leaves)


@pytest.mark.parametrize("texts", [["one"], ["same words"] * 20, ["", "", "one"]])
def test_few_or_equal_texts_make_a_router(texts, tmp_path):
    router = Router.fit(texts, embedder=HashedTfidf(features=64), branching=4, depth=2)
    router.save(tmp_path)
    loaded = Router.load(tmp_path)
    assert np.array_equal(loaded.route([*texts, ""]), router.route([*texts, ""]))
    assert all(np.isfinite(level).all() for level in loaded.tree.levels)


def test_no_texts_make_none():
    with pytest.raises(RouterError, match="at least one text"):
        Router.fit([], embedder=HashedTfidf())


@pytest.fixture
def folder(router, tmp_path) -> Path:
    router.save(tmp_path / "router")
    return tmp_path / "router"


def arrays_of(folder: Path) -> Path:
    (file,) = folder.glob("arrays-*.npz")
    return file


def test_a_saved_router_routes_alike(router, folder, texts):
    loaded = Router.load(folder)
    others = [*texts, *documents(50, seed=7), ""]
    assert loaded.hash == router.hash
    assert loaded.options == router.options
    assert np.array_equal(loaded.route(others), router.route(others))
    assert sorted(f.name for f in folder.iterdir()) == [arrays_of(folder).name, "router.json"]


def test_saving_again_replaces_and_leaves_nothing_behind(folder):
    other = Router.fit(["a", "b"], embedder=HashedTfidf(features=64), depth=1)
    other.save(folder)
    assert Router.load(folder).hash == other.hash
    assert sorted(f.name for f in folder.iterdir()) == [arrays_of(folder).name, "router.json"]


def test_a_save_that_is_interrupted_changes_nothing(router, folder, monkeypatch):
    other = Router.fit(["a", "b"], embedder=HashedTfidf(features=64), depth=1)
    replace = os.replace

    def full_disk(source, target):
        if Path(target).name == "router.json":
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(RouterError, match="no space left"):
        other.save(folder)
    assert Router.load(folder).hash == router.hash
    assert not list(folder.glob(".*"))


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut_short, flip, lambda content: b""])
def test_damaged_arrays_are_named(folder, damage):
    file = arrays_of(folder)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RouterError, match=rf"{file.name} was changed or cut short"):
        Router.load(folder)


@pytest.mark.parametrize("damage", [cut_short, lambda content: b"\xff", lambda content: b"[]"])
def test_a_damaged_description_is_named(folder, damage):
    file = folder / "router.json"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RouterError, match=r"router.json is damaged"):
        Router.load(folder)


def edit(folder: Path, change) -> None:
    file = folder / "router.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def test_a_changed_option_is_refused(folder):
    edit(folder, lambda told: told["router"]["embedder_options"].update(ngrams=[1, 2]))
    with pytest.raises(RouterError, match=r"router.json was changed"):
        Router.load(folder)


def test_another_format_is_refused(folder):
    edit(folder, lambda told: told.update(format=2))
    with pytest.raises(RouterError, match=r"router.json has format 2; this version reads 1"):
        Router.load(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(RouterError, match=r"nowhere has no router"):
        Router.load(tmp_path / "nowhere")
    name = arrays_of(folder).name
    arrays_of(folder).unlink()
    with pytest.raises(RouterError, match=name):
        Router.load(folder)


def test_an_unknown_embedder_is_named(folder):
    description, arrays = saved.read(folder)
    saved.write(folder, description | {"embedder": "word2vec"}, arrays)
    with pytest.raises(RouterError, match=r"'word2vec'; this version knows hashed_tfidf, sent"):
        Router.load(folder)
