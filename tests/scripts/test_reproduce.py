"""Grids of runs behind tables: what is trained, what is chosen, what an interruption leaves."""

import fcntl
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

import train
from mneme.harness.cli import report_errors
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from scripts.reproduce import main
from scripts.reproducing import processes, reproduction
from scripts.reproducing.grid import Grid, Job
from scripts.reproducing.reproduction import ReproductionError, about, names, read_reproduction
from tests.harness.conftest import TINY
from tests.scripts.test_report import SHORT, table

OPTIONS = [*TINY, *SHORT]
ROWS = {"matrix": ["mixer=gated_deltanet"], "window 4": ["mixer=sliding_window", "mixer.window=4"]}
TABLE = ["--by=label,optimizer.lr", "--columns=best:accuracy,budget.state_bytes"]


class Ended:
    """A process that is over."""

    def __init__(self, status: int) -> None:
        self.status = status

    def poll(self) -> int:
        return self.status

    def send_signal(self, sig: int) -> None:
        raise AssertionError("it is over")


class Place:
    """A folder of reproductions and runs, whose runs are trained in this process."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.started = path, []
        monkeypatch.setattr(reproduction, "FOLDER", path)
        monkeypatch.setattr(processes, "start_process", self.start)
        monkeypatch.setattr(processes, "_POLL", 0.0)

    def write(self, *, name: str = "tiny", **fields) -> None:
        out = [f"--out={self.path / 'table.md'}", "--name=tiny"]
        whole = {"options": OPTIONS, "seeds": [0], "rows": ROWS, "report": [*TABLE, *out]}
        text = yaml.safe_dump({**whole, **fields}, sort_keys=False)
        about = "# Two memories.\n# Seconds.\n\n# Not this.\n"
        (self.path / f"{name}.yaml").write_text(about + text)

    def reproduce(self, *arguments: str, name: str = "tiny") -> int:
        return main([name, "--runs", str(self.path / "runs"), *arguments])

    def run(self, row: str, run: str) -> RunDirectory:
        return RunDirectory(self.path / "runs" / "tiny" / row / run)

    @property
    def table(self) -> list[dict[str, str]]:
        return table((self.path / "table.md").read_text())

    def start(self, command, log, threads) -> Ended:
        """What `train.py` does as a program, without the seconds that it takes to start."""
        self.started.append(command[2:])
        with os.fdopen(os.dup(log), "w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                with report_errors():
                    train.main(list(command[2:]))
            except SystemExit as end:
                return Ended(end.code)
        return Ended(0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two rows, two learning rates, two seeds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        place = Place(tmp_path_factory.mktemp("swept"), monkeypatch)
        place.write(seeds=[0, 1], sweep={"optimizer.lr": [1e-2, 3e-2]})
        assert place.reproduce() == 0
    return place


@pytest.fixture
def made(swept, place):
    """The same, to be changed."""
    shutil.copytree(swept.path, place.path, dirs_exist_ok=True)
    place.write(seeds=[0, 1], sweep={"optimizer.lr": [1e-2, 3e-2]})
    return place


def best_accuracy(run: RunDirectory) -> float:
    return max(row["val/accuracy"] for row in read_metrics(run.metrics) if "val/accuracy" in row)


def test_each_row_has_its_sweep_and_then_its_other_seeds(swept):
    for label, folder in (("matrix", "matrix"), ("window 4", "window_4")):
        rates = {lr: swept.run(folder, f"optimizer.lr={lr}_seed0") for lr in ("0.01", "0.03")}
        chosen = max(rates, key=lambda lr: best_accuracy(rates[lr]))
        runs = {path.parent.name for path in swept.path.glob(f"runs/tiny/{folder}/*/config.yaml")}
        assert runs == {f"optimizer.lr={lr}_seed0" for lr in rates} | {
            f"optimizer.lr={chosen}_seed1"
        }
        config = swept.run(folder, f"optimizer.lr={chosen}_seed1").read_config()
        assert (config["label"], config["seed"], config["task"]["seed"]) == (label, 1, 1)
        assert config["optimizer"]["lr"] == float(chosen)
        row = next(row for row in swept.table if row["label"] == label)
        assert (row["optimizer.lr"], row["seeds"]) == (chosen, "2")
    assert len(swept.started) == 6


def test_the_page_says_how_it_was_made_and_what_was_tried(swept):
    text = (swept.path / "table.md").read_text()
    assert "```bash\npython scripts/reproduce.py tiny\n```" in text
    tried = "optimizer.lr: of 0.01, 0.03, the best of each row in the validation of seed 0."
    assert f"- {tried}\n" in text
    assert text.startswith("<!-- report: tiny -->")


def test_what_has_finished_is_not_trained_again(made):
    before = (made.path / "table.md").read_text()
    assert made.reproduce() == 0
    assert made.started == []
    assert (made.path / "table.md").read_text() == before


@pytest.mark.parametrize("best", ["0.01", "0.03"])
def test_the_best_validation_on_the_first_seed_decides(made, best):
    for lr in ("0.01", "0.03"):
        run = made.run("matrix", f"optimizer.lr={lr}_seed0")
        run.metrics.write_text(f"step,val/accuracy\n1,{0.9 if lr == best else 0.4}\n2,0.5\n")
    grid = Grid(read_reproduction("tiny"), made.path / "runs" / "tiny")
    assert [(job.value, job.seed) for job in grid.reported("matrix")] == [(best, 0), (best, 1)]
    assert [(job.value, job.seed) for job in grid.others("matrix")] == [(best, 1)]


@pytest.mark.parametrize("best", ["0.01", "0.03"])
def test_where_lower_is_better_the_lowest_decides(made, best):
    for lr in ("0.01", "0.03"):
        run = made.run("matrix", f"optimizer.lr={lr}_seed0")
        run.write_config({**run.read_config(), "task": {"_target_": "mneme.tasks.Text"}})
        run.write_summary(monitor="bits_per_byte")
        run.metrics.write_text(f"step,val/bits_per_byte\n1,{1.5 if lr == best else 2.5}\n2,3.0\n")
    grid = Grid(read_reproduction("tiny"), made.path / "runs" / "tiny")
    assert [(job.value, job.seed) for job in grid.reported("matrix")] == [(best, 0), (best, 1)]


def test_a_table_can_be_made_of_what_is_there(made):
    shutil.rmtree(next(made.path.glob("runs/tiny/matrix/*_seed1")))
    assert made.reproduce("--report-only") == 0
    assert made.started == []
    assert [row["seeds"] for row in made.table] == ["1", "2"]


def test_a_run_that_was_stopped_goes_on(made, capsys):
    run = made.run("window_4", "optimizer.lr=0.03_seed0")
    run.write_summary(status="running")
    shutil.rmtree(run.last.parent)
    run.metrics.unlink()
    assert made.reproduce() == 0
    assert [words[0] for words in made.started] == ["resume=auto"]
    assert f"run_dir='{run.path}'" in made.started[0]
    assert run.read_summary()["status"] == "finished"
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("window 4  optimizer.lr=0.03  seed 0  accuracy 0.")
    assert line.endswith(" s  (0 left)")


def test_a_run_that_another_process_trains_is_left_to_it(made):
    run = made.run("matrix", "optimizer.lr=0.01_seed0")
    run.write_summary(status="running")
    with run.path.with_name(f"{run.path.name}.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(ReproductionError, match=f"another process trains {run.path}"):
            made.reproduce()
    assert made.started == []


def test_runs_of_other_options_are_not_taken_for_these(made):
    made.write(seeds=[0, 1], sweep={"optimizer.lr": [1e-2, 3e-2]}, options=[*OPTIONS, "ffn=mlp"])
    with pytest.raises(ReproductionError, match=r"seed0 was made from .* differs in ffn; move it"):
        made.reproduce("--report-only")


def test_a_failed_run_is_named_and_hides_no_other(place, capsys):
    place.write(rows={"odd": ["mixer.heads=3"], **ROWS})
    assert place.reproduce() == 1
    said = capsys.readouterr()
    assert re.match(r"odd  seed 0  failed with exit status 2  \d+ s  \(2 left\)\n", said.err)
    assert f"{place.path}/runs/tiny/odd/seed0.log ends:\n    1 problem in the " in said.err
    assert said.err.endswith(f"\nfailed: {place.path}/runs/tiny/odd/seed0\n")
    assert [row["label"] for row in place.table] == ["matrix", "window 4"]
    text = (place.path / "table.md").read_text()
    assert "- Not in the table, as no run has a result: odd." in text


def test_a_value_that_fails_is_not_chosen_and_the_page_says_so(place):
    place.write(rows={"matrix": ROWS["matrix"]}, sweep={"mixer.heads": [3, 2]})
    assert place.reproduce() == 1
    assert [row["seeds"] for row in place.table] == ["1"]
    assert "- matrix: only mixer.heads=2 has a result." in (place.path / "table.md").read_text()


def test_only_the_rows_asked_for_are_trained(place):
    place.write()
    assert place.reproduce("--rows", "window 4") == 0
    assert len(place.started) == 1
    assert [row["label"] for row in place.table] == ["window 4"]
    with pytest.raises(ReproductionError, match="no row 'windw'; known, nearest first: window 4, "):
        place.reproduce("--rows", "windw")


def test_names_are_listed(place, capsys):
    place.write()
    assert main(["--list"]) == 0
    assert capsys.readouterr().out == "tiny\n    Two memories.\n    Seconds.\n"
    with pytest.raises(ReproductionError, match=r"no reproduction 'tin'; known, .*: tiny"):
        main(["tin"])
    with pytest.raises(ReproductionError, match="name a reproduction; there are: tiny"):
        main([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rowz": {}}, r"rowz: there is no such field; did you mean 'rows'\? \(fields: options, "),
        ({"seeds": [0, "one"]}, r"seeds.1: expected int, got 'one'"),
        ({"seeds": []}, "seeds: needs one at least"),
        ({"seeds": [1, 1]}, "seeds: the same value twice"),
        ({"rows": {"a": None}}, r"rows.a: expected list\[str\], got None"),
        ({"rows": {"a,b": []}}, "rows: 'a,b' may hold letters, "),
        ({"rows": {"a b": [], "a_b": []}}, "'a b' and another have the same folder, a_b"),
        ({"sweep": {"optimizer.lr": [1], "seed": [2]}}, "sweep: needs one option with a list of"),
    ],
)
def test_mistakes_in_a_file(place, fields, message):
    place.write(**fields)
    with pytest.raises(ReproductionError, match=message):
        place.reproduce()


def test_every_mistake_is_in_one_message(place):
    (place.path / "tiny.yaml").write_text("options: 3\nrows: {a: []}\nrest: []\n")
    with pytest.raises(ReproductionError) as error:
        place.reproduce()
    problems = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert problems == ["options", "rest", "seeds", "report"]
    (place.path / "tiny.yaml").write_text("rows:\n  a: []\n  a: []\n")
    with pytest.raises(ReproductionError, match=r"(?s)cannot be read.*duplicate key a"):
        place.reproduce()


def test_options_are_checked_before_anything_is_trained(place):
    place.write(rows={**ROWS, "odd": ["mixer.haeds=3"], "gone": ["mixer=gone"]})
    with pytest.raises(ConfigError, match=r"(?s)rows: odd: mixer.haeds.*rows: gone: mixer=gone"):
        place.reproduce()
    assert place.started == []


def test_as_many_run_at_a_time_as_there_are_slots(tmp_path, monkeypatch):
    class Busy(Ended):
        def poll(self):
            self.status -= 1
            return 0 if self.status < 0 else None

    ended, seen, names = [], [], deque("abcd")
    alive = {}

    def start(command, log, threads):
        name = command[3]
        alive[name] = Busy({"a": 5, "b": 2}.get(name, 3))
        seen.append((name, len(alive), threads))
        return alive[name]

    def end(result):
        del alive[result.job.label]
        ended.append(result.job.label)
        if result.job.label == "b":
            waiting.appendleft(job("first"))

    def job(name):
        return Job(name, None, 0, tmp_path / name, [name])

    monkeypatch.setattr(processes, "start_process", start)
    monkeypatch.setattr(processes, "_POLL", 0.0)
    monkeypatch.setattr(processes, "_cores", lambda: 8)
    waiting = deque(job(name) for name in names)
    processes.run_all(waiting, 2, end)
    assert [name for name, _, _ in seen] == ["a", "b", "first", "c", "d"]
    assert [count for _, count, _ in seen] == [1, 2, 2, 2, 2]
    assert {threads for _, _, threads in seen} == {4}
    assert sorted(ended) == ["a", "b", "c", "d", "first"]


def test_ctrl_c_stops_the_programs_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path, patch)
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path)
    steps = ["trainer.max_steps=120", "trainer.val_check_interval=60"]
    place.write(rows={"matrix": ROWS["matrix"]}, options=[*TINY, *steps])
    run = place.run("matrix", "seed0")

    def press():
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if any(row["step"] >= 5 for row in read_metrics(run.metrics)):
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.01)

    finger = threading.Thread(target=press)
    finger.start()
    status = place.reproduce()
    finger.join()
    assert status == 130
    assert "stopped by SIGINT; the same command goes on from here" in capsys.readouterr().err
    assert run.read_summary()["status"] == "interrupted"
    monkeypatch.setattr(processes, "start_process", place.start)  # one start of a program will do
    assert place.reproduce() == 0
    assert run.read_summary()["resumed"][0]["step"] >= 5
    assert place.table[0]["seeds"] == "1"
    log = run.path.with_name("seed0.log").read_text()
    assert "stopped by SIGINT" in log
    assert log.count("$ train.py resume=auto ") == 2


@pytest.mark.parametrize("name", names())
def test_every_reproduction_that_is_shipped_can_start(name, tmp_path):
    shipped = read_reproduction(name)
    grid = Grid(shipped, tmp_path)
    assert about(name)
    rows = list(shipped.rows)
    for job in [*grid.first(rows[0]), *(grid.first(label)[0] for label in rows[1:])]:
        assert compose_checked(job.overrides).config["label"] == job.label
