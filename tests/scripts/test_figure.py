"""Figures of runs: which points a line has, what is written, what is refused."""

import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mneme.harness.run.metrics_file import MetricsFile
from mneme.harness.run.run_directory import RunDirectory
from scripts.figure import COLORS, bucket, chosen_lines, figure
from scripts.reporting.rows import make_rows
from scripts.reporting.runs import ReportError, find_runs
from tests.harness.test_banks import BANK, train
from tests.scripts.test_report import SHORT

LINES = "dense;fetched:random"
draws = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="needs requirements-figures.txt to draw"
)
DENSE = ("label=dense", "ffn=swiglu", "task.routes=none")
FETCHED = ("label=fetched", *BANK, "task.routes=topic", "task.ask=[topic,random]")


def validated(run: Path, step: int, accuracies: dict[str, float]) -> None:
    """Adds a validation to a run."""
    values = {f"val/accuracy{name}": value for name, value in accuracies.items()}
    MetricsFile(run / "metrics.csv", step).log_metrics(values, step)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of a dense model and one of a bank; the validation at step 3 is the best."""
    folder = tmp_path_factory.mktemp("runs")
    firsts = [
        {"/exposures=0": 0.1, "/exposures=1": 0.2},
        {"/exposures=0": 0.1, "/exposures=1": 0.6, "/exposures=10": 0.8},
    ]
    for seed, first in enumerate(firsts):
        run = train(folder / f"dense{seed}", *SHORT, *DENSE, f"seed={seed}").path
        validated(run, 3, {"": 0.9, **first})
        validated(run, 4, {"": 0.7, "/exposures=0": 1.0, "/exposures=1": 1.0, "/exposures=100": 1})
    run = train(folder / "fetched", *SHORT, *FETCHED).path
    arm = {"/arm=random/exposures=1": 0.25, "/arm=random/exposures=1000": 0.75}
    validated(run, 3, {"": 0.9, "/exposures=1": 0.5, **arm})
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def points(place: Path, *words: str) -> list[dict[int, tuple[float, float]]]:
    lines = chosen_lines(words, make_rows(find_runs([place])), "accuracy")
    return [dict(zip(line.columns, line.points(), strict=True)) for line in lines]


def drawn(place: Path, out: Path, *options: str, lines: str = LINES) -> str:
    figure([str(place), "--lines", lines, "--out", str(out), *options])
    return out.read_text()


def nodes(svg: str, kind: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{kind}"))


def test_points_are_means_over_seeds_of_the_best_validation(trained):
    random, dense, first = points(trained, "fetched:random", "dense", "fetched")
    spread = pytest.approx(0.4 / 2**0.5)
    assert dense == {0: (0.1, 0), 1: (pytest.approx(0.4), spread), 10: (0.8, 0)}
    assert random == {1: (0.25, 0), 1000: (0.75, 0)}
    assert first == {1: (0.5, 0)}


@draws
def test_a_seed_that_did_not_finish_is_left_out_and_named(runs, tmp_path, capsys):
    RunDirectory(runs / "dense0").write_summary(status="running")
    assert points(runs, "dense") == [{0: (0.1, 0), 1: (pytest.approx(0.6), 0), 10: (0.8, 0)}]
    drawn(runs, tmp_path / "figure.svg")
    assert "dense (seeds: 1; seed 0 running at step 4): 0: 0.100, 1-9: " in capsys.readouterr().out


@draws
def test_the_values_are_printed_as_report_shows_them(trained, tmp_path, capsys):
    drawn(trained, tmp_path / "figure.svg")
    assert capsys.readouterr().out.splitlines()[1:] == [
        "dense (seeds: 2): 0: 0.100 ± 0.000, 1-9: 0.400 ± 0.283, 10-99: 0.800 (1 of 2)",
        "fetched:random (seeds: 1): 1-9: 0.250, 1,000-9,999: 0.750",
    ]


@draws
def test_the_file_has_all_words_as_text_and_is_the_same_each_time(trained, tmp_path, monkeypatch):
    svg = drawn(trained, tmp_path / "figures" / "a.svg", "--title", "Facts at $2 or $3")
    words = [node.text for node in nodes(svg, "text")]
    assert words[:4] == ["0", "1-9", "10-99", "1,000-9,999"], "only those that a line has"
    assert words[-3:] == ["Facts at $2 or $3", *LINES.split(";")]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    again = drawn(trained, tmp_path / "b.svg", "--title", "Facts at $2 or $3")
    assert again == svg
    assert " \n" not in svg, "a hook would take it away"


@draws
def test_means_are_drawn_at_their_ticks(trained, tmp_path):
    svg = drawn(trained, tmp_path / "figure.svg", lines="fetched:random")
    ticks = {node.text: (float(node.get("x")), float(node.get("y"))) for node in nodes(svg, "text")}
    style = f"fill: none; stroke: {COLORS[0].lower()}"
    path = next(n.get("d") for n in nodes(svg, "path") if n.get("style", "").startswith(style))
    start, end = (list(map(float, point.split())) for point in re.split("[ML]", path)[1:])
    assert [start[0], end[0]] == pytest.approx([ticks["1-9"][0], ticks["1,000-9,999"][0]])
    height = ticks["0.2"][1] - ticks["0.4"][1]
    assert 0.2 * (start[1] - end[1]) / height == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "dense;fetched:generic",
            r"for 'fetched:generic'; known, nearest first: fetched, fetched:random, dense$",
        ),
        ("dens", r"no run that finished has 'accuracy' by exposures for 'dens'; .* first: dense, "),
        ("dense;", r"by exposures for ''; known"),
        (";".join(["dense"] * 8), f"--lines: at most {len(COLORS)} can be told apart, got 8"),
    ],
)
def test_lines_that_are_not_there(trained, tmp_path, lines, message):
    with pytest.raises(ReportError, match=message):
        drawn(trained, tmp_path / "figure.svg", lines=lines)
    assert not list(tmp_path.iterdir())


def test_other_mistakes(runs, tmp_path, monkeypatch):
    out = tmp_path / "figure.svg"
    with pytest.raises(
        ReportError, match=r"has 'acc' by exposures for 'dense'; .*: \(none at all\)"
    ):
        drawn(runs, out, "--metric", "acc")
    with pytest.raises(ReportError, match="there is no run at"):
        drawn(tmp_path / "nowhere", out)
    config = runs / "dense1" / "config.yaml"
    config.write_text(config.read_text().replace("label: dense", "label: fetched"))
    with pytest.raises(
        ReportError, match=r"several rows have a line 'fetched'; they differ in .*ffn"
    ):
        drawn(runs, out, lines="fetched")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match="needs matplotlib: pip install -r requirements-figures"):
        drawn(runs, out)


@pytest.mark.parametrize(("low", "name"), [(0, "0"), (1, "1-9"), (10, "10-99"), (100, "100-999")])
def test_buckets(low, name):
    assert bucket(low) == name
