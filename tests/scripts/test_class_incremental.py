"""What a memory with fixed keys keeps of earlier classes, and other learners do not."""

import math

import pytest

from scripts import class_incremental
from scripts.class_incremental import StreamSizes, learn

SMALL = StreamSizes(unlabelled=3_000, split=400, test=800, epochs=5)


@pytest.fixture(scope="module")
def outcomes():
    return {name: learn(name, 0, SMALL) for name in class_incremental.CLASSIFIERS}


def test_values_under_fixed_keys_keep_earlier_classes(outcomes):
    run = outcomes["key-value bottleneck"]
    assert min(run.learnt) > 0.9
    assert run.drop < 2
    assert run.final > 0.9
    assert run.joint > 0.9
    assert 0 < run.unused < 0.5


@pytest.mark.parametrize("name", ["linear head", "MLP"])
def test_heads_forget_what_they_could_have_known(outcomes, name):
    run = outcomes[name]
    assert run.learnt[0] > 0.9
    assert run.drop > 50
    assert run.final < 0.4 < run.joint
    assert math.isnan(run.unused)


def test_a_run_follows_from_its_seed(outcomes):
    assert learn("key-value bottleneck", 0, SMALL) == outcomes["key-value bottleneck"]


def test_the_table_is_put_into_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(class_incremental, "StreamSizes", lambda: StreamSizes(1_000, 50, 50, 1))
    out = tmp_path / "page.md"
    out.write_text("before\n<!-- report: dkvb -->\n<!-- /report -->\nafter\n")
    class_incremental.run(["--seeds", "0", "1", "--out", str(out)])
    page = out.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| key-value bottleneck",
        "| linear head",
        "| MLP",
    ]
    assert all("±" in row for row in rows[2:])
    assert capsys.readouterr().out.strip() in page
