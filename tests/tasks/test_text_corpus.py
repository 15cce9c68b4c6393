import itertools
from pathlib import Path

import pytest

from mneme.tasks import LocalFiles, StandardLibrary
from mneme.tasks.text.corpus import Document, blocks, content_hash, split_documents
from mneme.tasks.text.store import cache_root


def names(documents):
    return [document.name for document in documents]


def test_the_standard_library_is_library_only():
    documents = StandardLibrary().documents()
    found = set(names(documents))
    assert {"abc.py", "json/decoder.py", "unittest/mock.py", "test/support.py"} & found == {
        "abc.py",
        "json/decoder.py",
        "unittest/mock.py",
    }
    assert names(documents) == sorted(found)
    folders = {part for name in found for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "__pycache__", "test", "tests", "idle_test"}
    assert not [name for name in found if "_sysconfigdata" in name or "config-3" in name]
    assert sum(document.path.stat().st_size for document in documents) > 5_000_000


def test_local_files_are_named_from_the_fixed_part_of_their_pattern(corpus_dir):
    by_pattern = LocalFiles([f"{corpus_dir}/**/*.txt"]).documents()
    assert len(by_pattern) == 40
    assert by_pattern[0].name == "part0/00.txt"
    one = LocalFiles([f"{corpus_dir}/part1/01.txt"]).documents()
    assert names(one) == ["01.txt"]
    both = LocalFiles([f"{corpus_dir}/part1/*.txt", f"{corpus_dir}/part1/01.txt"]).documents()
    assert len(both) == len({document.path for document in both}) == 13


def test_relative_paths_work(corpus_dir, monkeypatch):
    monkeypatch.chdir(corpus_dir)
    assert names(LocalFiles(["part1/01.txt", "p*2/0*.txt"]).documents())[:2] == [
        "01.txt",
        "part2/02.txt",
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["{}/*.md"], r"'.*/\*\.md' matches no file \(from "),
        (["{}/none.txt"], r"none\.txt' matches no file"),
        (["{}/part1"], r"is a folder; name its files, as in '.*/part1/\*\*/\*\.txt'"),
    ],
)
def test_paths_that_name_nothing_are_an_error(corpus_dir, paths, message):
    with pytest.raises(ValueError, match=message):
        LocalFiles([path.format(corpus_dir) for path in paths]).documents()


def test_one_path_without_a_list_is_an_error():
    with pytest.raises(ValueError, match=r"write \['a.txt'\] instead of 'a.txt'"):
        LocalFiles("a.txt")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ntwo\ncaf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, line 3, is not UTF-8 \(.*0xe9\)"):
        list(blocks(Document("latin.txt", path)))


def test_blocks_join_to_the_file_and_end_with_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("mneme.tasks.text.corpus.BLOCK_BYTES", 20)
    text = "\ufeffgrün\r\n\r\nzwei\rdrei 記憶\n" * 5 + "no end"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    parts = list(blocks(Document("a.txt", path)))
    assert "".join(parts) == text
    assert len(parts) > 3
    assert all(part.endswith("\n") for part in parts[:-1])


def test_the_hash_depends_on_names_and_contents_only(tmp_path):
    def corpus(folder, contents):
        for name, text in contents.items():
            path = tmp_path / folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return content_hash(LocalFiles([f"{tmp_path / folder}/*"]).documents())

    base = corpus("one", {"a": "x", "b": "y"})
    assert corpus("two", {"b": "y", "a": "x"}) == base
    assert corpus("renamed", {"a": "x", "c": "y"}) != base
    assert corpus("edited", {"a": "x", "b": "z"}) != base
    assert corpus("shifted", {"a": "xy", "b": ""}) != base


def many(count):
    return [Document(f"{index}.txt", Path(f"{index}.txt")) for index in range(count)]


def test_splits_are_a_partition_of_about_90_5_5():
    documents = many(2000)
    splits = split_documents(documents)
    assert sorted(itertools.chain(*splits.values())) == sorted(documents)
    # Expected 100 files held out for each, one standard deviation is 10.
    assert all(50 <= len(splits[split]) <= 150 for split in ("val", "test"))


def test_adding_files_moves_no_other_file():
    before, after = split_documents(many(500)), split_documents(many(700))
    for split, members in before.items():
        assert set(members) <= set(after[split])


@pytest.mark.parametrize("count", [3, 4, 5, 10, 30])
def test_small_corpora_fill_every_split(count):
    splits = split_documents(many(count))
    assert all(splits.values())
    assert sum(map(len, splits.values())) == count


def test_a_corpus_whose_files_all_hash_low_still_trains(monkeypatch):
    monkeypatch.setattr("mneme.tasks.text.corpus._place", lambda name: 0.01)
    splits = split_documents(many(6))
    assert [len(splits[split]) for split in ("train", "val", "test")] == [1, 1, 4]


def test_too_few_files_are_an_error():
    with pytest.raises(ValueError, match=r"needs at least 3, .* this one has 2"):
        split_documents(many(2))


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("MNEME_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("MNEME_CACHE")
    assert cache_root() == Path.home() / ".cache" / "mneme"
