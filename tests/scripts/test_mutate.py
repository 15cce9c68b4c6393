"""Small changes of a file, and the tests that are asked about each."""

from pathlib import Path

from scripts import mutate
from scripts.mutate import Change, changes_of, draw

SOURCE = '''"""A docstring with 3 > 2."""

NUMBER = 3  # ü
é = NUMBER + 1


def smaller(a: int = 0) -> bool:
    """Says whether 1 < 2."""
    print("ü", a < NUMBER and not a)
    a += 2
    if a > 5:
        raise ValueError(f"{a + 1}")
    return True
'''


def test_every_change_is_where_it_should_be_and_nothing_else_is_changed():
    lines = SOURCE.splitlines()
    changed = set()
    for change in changes_of(Path("layers/some.py"), SOURCE):
        after = change.applied(SOURCE).splitlines()
        (place,) = (i for i in range(len(lines)) if after[i] != lines[i])
        changed.add(after[place].strip())
        assert change.described(SOURCE).splitlines() == [
            f"layers/some.py:{place + 1}",
            f"    - {lines[place].strip()}",
            f"    + {after[place].strip()}",
        ]
    assert changed == {
        "NUMBER = 6  # ü",
        "é = NUMBER - 1",
        "é = NUMBER + 2",
        "def smaller(a: int = 1) -> bool:",
        "pass",
        'print("ü", a <= NUMBER and not a)',
        'print("ü", a < NUMBER or not a)',
        'print("ü", a < NUMBER and a)',
        "a += 4",
        "if a >= 5:",
        "if a > 10:",
        "return False",
    }


def test_numbers_booleans_and_classes_of_a_config_are_changed():
    source = "# 3: no\n_target_: mneme.layers.TestTimeMemory\nheads: 4 # 5\nsilu: true\nlr: 0.5\n"
    changes = changes_of(Path("configs/mixer/some.yaml"), source)
    after = [change.applied(source).splitlines() for change in changes]
    lines = source.splitlines()
    assert [next(a for a, b in zip(one, lines, strict=True) if a != b) for one in after] == [
        "_target_: mneme.layers.DeltaNet",
        "heads: 8 # 5",
        "silu: false",
        "lr: 1.0",
    ]


def test_what_is_drawn_follows_from_the_seed():
    drawn = [draw("routers", 5, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(change.path.parts[0] == "routers" for change in drawn[0])


class Lines:
    """Of a traced run: line to tests."""

    def __init__(self, lines):
        self.lines = lines

    def contexts_by_lineno(self, path):
        return self.lines


def test_the_tests_of_a_line_are_asked_the_nearest_and_quickest_first(monkeypatch):
    seconds = {"tests/a.py::x": 3.0, "tests/b.py::y": 1.0, "tests/test_some.py::z": 500.0}
    suite = object.__new__(mutate.Suite)
    suite.seconds, suite.root = seconds, Path("/root")
    of_call = "tests/b.py::y (call)"  # what a program was started in
    suite.data = Lines({3: [""], 9: ["tests/a.py::x", of_call, "tests/failed.py::w"], 13: []})
    at = {line: sum(map(len, SOURCE.splitlines(keepends=True)[: line - 1])) for line in (3, 9, 13)}
    asked = {line: suite.tests_of(Change(Path("layers/some.py"), at[line], at[line], ""), SOURCE)
             for line in at}  # fmt: skip
    assert asked[9] == ["tests/b.py::y", "tests/a.py::x"]
    assert asked[3] == asked[9], "a constant is read by whoever runs a line of the file"
    suite.data = Lines({9: ["tests/test_some.py::z", "tests/a.py::x"]})
    change = Change(Path("layers/some.py"), at[9], at[9], "")
    assert suite.tests_of(change, SOURCE) == ["tests/test_some.py::z", "tests/a.py::x"]
    monkeypatch.setattr(mutate, "LONGEST", 400.0)
    assert suite.tests_of(change, SOURCE) == []
