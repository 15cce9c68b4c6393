"""The benchmark of tables runs in all its parts, and its figures are of what was timed."""

import json
from dataclasses import replace

import pytest

from scripts.benchmarks import sparse

TINY = replace(sparse.QUICK, sub_keys=32, tokens=(8, 16), tables=(2**10, 2**11), rounds=2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows of each part; the peak of memory is measured in this process, by nothing."""
    path = tmp_path_factory.mktemp("bench") / "rows.json"

    def peak(module, name, number):
        assert module == sparse.__name__
        sparse.step(name, number)()
        return 512.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "QUICK", TINY)
        patch.setattr(sparse, "COPIED", 2**12)
        patch.setattr(sparse, "peak_memory", peak)
        sparse.run(["--quick", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    return {part: [row for row in rows if row["part"] == part] for part in sparse.PARTS}


def test_every_contender_makes_steps_of_every_size(measured):
    ours = [row for row in measured["steps"] if row["layer"].startswith("ours")]
    found = {(row["family"], row["layer"], row["tokens"]) for row in ours}
    layers = [("product keys", "ours, lazy"), ("product keys", "ours, rowwise")]
    layers.append(("experts", "ours, lazy"))
    assert found == {(*layer, tokens) for layer in layers for tokens in TINY.tokens}
    for row in ours:
        assert row["seconds"] > 0
        assert row["bar"] is None, "a bar is for others to miss"
        assert row["layer"] != "ours, lazy" or row["times_ours"] == 1


def test_lookups_are_compared_with_those_of_the_smallest_table(measured):
    found = {(row["update"], row["table"]): row for row in measured["lookups"]}
    assert list(found) == [(u, t) for u in ("lazy", "rowwise") for t in TINY.tables]
    assert all(row["nanoseconds"] > 0 for row in found.values())
    assert [found[u, 2**10]["times_smallest"] for u in ("lazy", "rowwise")] == [1, 1]


def test_rates_are_shares_of_that_of_a_copy(measured):
    copy, *reads = measured["bandwidth"]
    assert (copy["call"], copy["share_of_copy"]) == ("copy", 1)
    names = ["sum_rows", "dot_rows", "sum_rows, backward", "dot_rows, backward"]
    assert [(r["call"], r["tokens"]) for r in reads] == [(n, t) for t in (8, 16) for n in names]
    assert all(row["gigabytes_per_second"] > 0 for row in reads)


def test_a_rate_is_bytes_over_seconds():
    key, times = ("sum_rows", 8), {"copy": [1.0, 1.0, 2.0], ("sum_rows", 8): [2.0, 2.0, 2.0]}
    row = sparse._bandwidth_row(key, {"copy": 4e9, key: 2e9}, times)
    assert row["gigabytes_per_second"] == 1
    assert row["share_of_copy"] == 0.25


def test_memory_is_reported_for_the_largest_table(measured):
    (row,) = measured["memory"]
    assert (row["table"], row["peak_gib"]) == (TINY.tables[-1], 0.5)


def test_one_part_may_be_asked_for(monkeypatch):
    asked = []
    parts = {
        part: lambda sizes, part=part: asked.append((part, sizes)) or [] for part in sparse.PARTS
    }
    monkeypatch.setattr(sparse, "MEASURE", parts)
    sparse.run(["--part", "memory"])
    assert asked == [("memory", sparse.FULL)]
