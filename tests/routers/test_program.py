"""scripts/route.py from texts to leaves."""

import io

import pytest

from mneme.harness.run.run_directory import RunError
from mneme.routers import HashedTfidf, Router, report
from scripts import route


def fit(source, folder, *options):
    route.run(["fit", "--texts", str(source), "--out", str(folder), *options])


def test_a_file_of_texts_becomes_a_router_that_answers(texts, tmp_path, capsys, monkeypatch):
    source, folder = tmp_path / "texts.txt", tmp_path / "router"
    source.write_text("\n\n".join(texts) + "\n")
    fit(source, folder, "--branching", "3", "--depth", "2", "--seed", "5")
    printed = capsys.readouterr().out
    router = Router.load(folder)
    expected = Router.fit(texts, embedder=HashedTfidf(seed=5), branching=3, depth=2, seed=5)
    assert router.hash == expected.hash
    effective = report(router.route(texts), branching=3, depth=2).levels[1].effective
    assert printed.splitlines()[3].split("|")[6].strip() == f"{effective:.1f}"
    assert f"120 texts; router {router.hash[:16]} is in {folder}" in printed

    asked = ["the ship and its\tcargo", "", "jury"]
    lines = []
    for text, leaf in zip(asked, router.route(asked), strict=True):
        lines.append(f"{leaf}\t{leaf // 3}/{leaf}\t{' '.join(text.split())}")
    route.run(["ask", "--router", str(folder), *asked])
    assert capsys.readouterr().out.splitlines() == lines
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked) + "\n"))
    route.run(["ask", "--router", str(folder)])
    assert capsys.readouterr().out.splitlines() == lines


def test_a_folder_is_a_text_per_file(tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    (source / "b.txt").write_text("wheat\nbarn\n")
    (source / "a.txt").write_text("ship")
    (source / "below").mkdir()
    assert route.read_texts(source) == ["ship", "wheat\nbarn\n"]


def test_what_cannot_be_used_is_named(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    with pytest.raises(RunError, match=r"cannot read .*texts.txt"):
        fit(texts, tmp_path / "router")
    texts.write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"cannot read .*texts.txt"):
        fit(texts, tmp_path / "router")
    texts.write_text("\n \n")
    with pytest.raises(RunError, match=r"texts.txt has no texts"):
        fit(texts, tmp_path / "router")
    texts.write_text("one\n")
    with pytest.raises(SystemExit):
        fit(texts, tmp_path / "router", "--branching", "1")
    said = capsys.readouterr().err
    assert "--branching: expected a whole number, 2 or more, got '1'" in said
    with pytest.raises(RunError, match="has no router"):
        route.run(["ask", "--router", str(tmp_path / "router"), "one"])
