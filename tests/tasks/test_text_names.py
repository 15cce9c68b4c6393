"""Which corpus it is does not depend on how a folder is listed."""

import glob
import itertools
import os
import pwd
import random
from pathlib import Path

import pytest

from mneme.tasks import LocalFiles
from mneme.tasks.text.corpus import content_hash, split_documents
from mneme.tasks.text.store import cache_root


def names(documents):
    return [document.name for document in documents]


@pytest.fixture
def listed_in_any_order(monkeypatch):
    """What glob finds, in the order of a seed: file systems list folders as they like."""
    real = glob.glob

    def set_seed(seed):
        def shuffled(*args, **options):
            found = sorted(real(*args, **options))
            random.Random(seed).shuffle(found)
            return found

        monkeypatch.setattr(glob, "glob", shuffled)

    return set_seed


def make(folder, *files):
    for index, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {index}\n")


def test_a_link_beside_its_file_changes_nothing(tmp_path, listed_in_any_order):
    make(tmp_path, *(f"part/{index}.txt" for index in range(8)))
    alone = LocalFiles([f"{tmp_path}/**/*.txt"]).documents()
    (tmp_path / "part" / "0a.txt").symlink_to("7.txt")  # before its file in the alphabet
    (tmp_path / "part" / "9.txt").symlink_to(tmp_path / "part" / "3.txt")
    (tmp_path / "also").symlink_to("part")
    for seed in range(8):
        listed_in_any_order(seed)
        found = LocalFiles([f"{tmp_path}/**/*.txt"]).documents()
        assert found == alone
        assert content_hash(found) == content_hash(alone)
        assert split_documents(found) == split_documents(alone)


def test_a_link_to_a_file_elsewhere_is_a_document(tmp_path):
    make(tmp_path, "elsewhere/book", "corpus/1.txt")
    (tmp_path / "corpus" / "2.txt").symlink_to("../elsewhere/book")
    (tmp_path / "corpus" / "3.txt").symlink_to("../elsewhere/book")
    assert names(LocalFiles([f"{tmp_path}/corpus/*.txt"]).documents()) == ["1.txt", "2.txt"]


def test_two_names_of_one_file_are_one_document(tmp_path, listed_in_any_order):
    make(tmp_path, "b.txt", "c.txt")
    os.link(tmp_path / "c.txt", tmp_path / "a.txt")
    for seed in range(4):
        listed_in_any_order(seed)
        assert names(LocalFiles([f"{tmp_path}/*.txt"]).documents()) == ["a.txt", "b.txt"]


def test_neither_the_order_of_paths_nor_where_they_lie_decides(tmp_path):
    make(tmp_path / "x", *(f"{part}/{index}.txt" for part in "ab" for index in range(4)))
    (tmp_path / "y").mkdir()
    (tmp_path / "x" / "a").rename(tmp_path / "y" / "z")  # behind b in the alphabet now
    (tmp_path / "x" / "b").rename(tmp_path / "y" / "b")
    moved = [[f"{tmp_path}/y/z/*.txt", f"{tmp_path}/y/b/*.txt", f"{tmp_path}/y/b/0.txt"]]
    make(tmp_path / "x", *(f"{part}/{index}.txt" for part in "ab" for index in range(4)))
    there = [f"{tmp_path}/x/a/*.txt", f"{tmp_path}/x/b/*.txt"]
    every = [*moved, *map(list, itertools.permutations(there))]
    assert len({content_hash(LocalFiles(paths).documents()) for paths in every}) == 1


BRACKETED = ["notes [1].txt", "[2024]/a.txt", "[2024]/[b].txt", "[!x]/[a-z]/[[]/c.txt"]


@pytest.mark.parametrize("name", BRACKETED)
def test_a_path_with_brackets_that_exists_is_itself(tmp_path, name):
    make(tmp_path, *BRACKETED, "2/a.txt", "notes 1.txt", "[2024]/b.txt", "1/a/[/c.txt")
    (found,) = LocalFiles([str(tmp_path / name)]).documents()
    assert found.path == tmp_path / name
    assert found.name == found.path.name


def test_wildcards_below_a_folder_with_brackets(tmp_path):
    make(tmp_path, "[2024]/a.txt", "[2024]/deep/b.txt", "2/c.txt", "2[0-1]/d.txt")
    assert names(LocalFiles([f"{tmp_path}/[2024]/**/*.txt"]).documents()) == ["a.txt", "deep/b.txt"]
    assert names(LocalFiles([f"{tmp_path}/[0-9]/*.txt"]).documents()) == ["2/c.txt"]
    with pytest.raises(ValueError, match=r"matches no file .*; a bracket .* is written \[\[\]"):
        LocalFiles([f"{tmp_path}/[xy]/*.txt"]).documents()


def test_a_file_named_as_a_wildcard_does_not_hide_what_it_matches(tmp_path):
    make(tmp_path, "*.txt", "a.txt")
    assert names(LocalFiles([f"{tmp_path}/*.txt"]).documents()) == ["*.txt", "a.txt"]


def test_a_name_that_is_not_utf8_is_a_name(tmp_path):
    make(tmp_path, "a.txt", "b.txt")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w") as file:
        file.write("text\n")
    documents = LocalFiles([f"{tmp_path}/*.txt"]).documents()
    assert len(content_hash(documents)) == 64
    assert all(split_documents(documents).values())


def test_a_document_that_cannot_be_read_is_named(tmp_path):
    make(tmp_path, "a.txt")
    (document,) = LocalFiles([f"{tmp_path}/*.txt"]).documents()
    document.path.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*/a.txt: No such file"):
        content_hash([document])


def test_a_user_without_a_home_is_told_so(monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("MNEME_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ValueError, match=r"~/texts/\*: there is no home folder for ~"):
        LocalFiles(["~/texts/*"]).documents()
    with pytest.raises(ValueError, match=r"~/.cache/mneme: there is no home folder .* MNEME_CACHE"):
        cache_root()
    assert cache_root("here") == Path("here")
