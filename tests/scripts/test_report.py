"""Tables of runs: which runs make a row, what it is called, what its figures are."""

import json
import shutil
import statistics
from pathlib import Path

import pytest

from mneme.harness.cli import report_errors
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run.jobs import start_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunDirectory
from mneme.models.diagnosis import NonFiniteError
from scripts.report import report
from scripts.reporting.columns import number, together
from scripts.reporting.entries import differing
from scripts.reporting.runs import ReportError
from tests.harness.conftest import TINY, program

SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=1")


def train(path: Path, *overrides: str) -> RunDirectory:
    return start_run(compose_checked([*TINY, *SHORT, f"run_dir={path}", *overrides]))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three seeds of one mixer, one of another; the first seed was evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        train(folder / f"gdn{seed}", f"seed={seed}")
    train(folder / "swa", "mixer=sliding_window")
    evaluate_command([f"run={folder / 'gdn0'}", "lengths=[1,2]"])
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def made(capsys):
    def make(*arguments) -> str:
        capsys.readouterr()
        report([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return make


def table(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_runs_that_differ_in_the_seed_are_one_row(made, trained):
    first, second = table(made(trained))
    assert list(first) == [
        "mixer", "accuracy (val)", "seeds", "parameters", "state bytes", "training tokens/s",
        "steps", "tokens",
    ]  # fmt: skip
    assert (first["mixer"], first["seeds"]) == ("gated_deltanet", "3")
    assert (second["mixer"], second["seeds"]) == ("sliding_window", "1")
    assert (first["steps"], first["tokens"]) == ("2", "128")


def test_the_figure_is_the_mean_of_the_best_and_the_spread_between_seeds(made, trained):
    rows = [read_metrics(trained / f"gdn{seed}" / "metrics.csv") for seed in range(3)]
    best = [max(row["val/accuracy"] for row in run if "val/accuracy" in row) for run in rows]
    first, second = table(made(trained, "--columns", "best:accuracy,metrics.val/loss"))
    assert first["accuracy (val)"] == (
        f"{statistics.mean(best):.3f} ± {statistics.stdev(best):.3f}"
    )
    assert "±" not in second["accuracy (val)"]
    last = [json.loads((trained / f"gdn{s}/summary.json").read_text()) for s in range(3)]
    losses = [summary["metrics"]["val/loss"] for summary in last]
    assert first["metrics.val/loss"] == (
        f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
    )


def test_rows_are_named_by_what_differs_and_nothing_else(made, runs):
    train(runs / "wide", "mixer.heads=2", "optimizer.lr=1e-2", "checkpoint_every=50")
    rows = table(made(runs))
    assert list(rows[0])[:4] == ["mixer", "mixer.heads", "optimizer.lr", "accuracy (val)"]
    assert [row["mixer.heads"] for row in rows] == ["1", "1", "2"]
    by_hand = made(runs, "--by", "mixer,mixer.heads")
    assert list(table(by_hand)[0])[:3] == ["mixer", "mixer.heads", "accuracy (val)"]
    assert "The rows differ in optimizer.lr, too." in by_hand


def test_a_label_names_a_row_and_makes_it_another(made, runs):
    train(runs / "labeled", "label=again")
    rows = table(made(runs, "--columns", "steps"))
    assert [(row["label"], row["seeds"]) for row in rows] == [("", "3"), ("again", "1"), ("", "1")]
    train(runs / "swa2", "mixer=sliding_window", "label='a window, short'")
    rows = table(made(runs / "labeled", runs / "swa2", "--by", "label"))
    assert [row["label"] for row in rows] == ["again", "a window, short"]


def test_a_run_from_before_there_were_labels_is_one_without(made, runs):
    config = runs / "gdn1" / "config.yaml"
    config.write_text(config.read_text().replace("label: null\n", ""))
    assert "label" not in config.read_text()
    assert table(made(runs))[0]["seeds"] == "3"


@pytest.mark.parametrize(
    ("expression", "first"),
    [
        ("budget.parameters", "gated_deltanet"),
        ("budget.parameters/budget.state_bytes", "sliding_window"),
        ("metrics.val/loss", "sliding_window"),
        ("metrics.val/loss/steps", "gated_deltanet"),
        ("best:loss/steps", "gated_deltanet"),
        ("steps/steps_of_none", "gated_deltanet"),
        ("best:accuracy", "sliding_window"),
    ],
)
def test_rows_are_sorted_by_a_figure_or_a_quotient(made, runs, expression, first):
    budgets = {"gdn": {"parameters": 100, "state_bytes": 10}, "swa": {"parameters": 60}}
    budgets["swa"]["state_bytes"] = 3
    losses = {"gdn0": 1.0, "gdn1": 2.0, "gdn2": 6.0, "swa": 2.5}
    for name, loss in losses.items():
        facts = {"budget": budgets[name[:3]], "metrics": {"val/loss": loss}}
        status = "failed" if expression == "best:accuracy" and name != "swa" else "finished"
        none = {"steps_of_none": 0 if name == "swa" else 1}
        steps = 1 if name == "swa" else 2
        RunDirectory(runs / name).write_summary(steps=steps, status=status, **facts, **none)
    swa, gdn = runs / "swa", sorted(runs.glob("gdn*"))
    for places in ([swa, *gdn], [*gdn, swa]):
        text = made(*places, "--sort", expression)
        assert table(text)[0]["mixer"] == first
        best = "smallest" if "loss" in expression else "largest"
        assert f"- Rows are sorted by {expression}, the {best} first.\n" in text


def test_a_column_may_be_a_quotient_taken_in_each_run(made, runs):
    for seed, bits in enumerate([300, 100, 200]):
        facts = {"metrics": {"val/bits": bits}, "budget": {"parameters": 50 * (seed + 1)}}
        RunDirectory(runs / f"gdn{seed}").write_summary(**facts, nothing=0)
    first, second = table(made(runs, "--columns", "metrics.val/bits/budget.parameters,steps"))
    # 300 / 50, 100 / 100 and 200 / 150
    assert first["metrics.val/bits / parameters"] == "2.778 ± 2.795"
    assert second["metrics.val/bits / parameters"] == ""
    with pytest.raises(ReportError, match="no run has a value for 'steps/nothing'"):
        made(runs, "--columns", "steps/nothing")


def test_a_run_that_did_not_record_its_choices_goes_by_its_class(made, runs):
    for path in runs.glob("gdn*/summary.json"):
        summary = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in summary.items() if k != "choices"}))
    assert table(made(runs))[0]["mixer"] == "GatedDeltaNet"


@pytest.mark.parametrize(
    ("several", "expected"),
    [
        ([{"a": 1, "b": 1}, {"a": 1, "b": 2}], ["b"]),
        ([{"m": "x", "m.h": 1}, {"m": "y", "m.w": 3}], ["m"]),
        ([{"m": "x", "m.h": 1}, {"m": "x", "m.h": 2}, {"m": "y"}], ["m", "m.h"]),
        ([{"m": "x", "m.n": "p", "m.n.o": 1}, {"m": "x", "m.n": "q"}, {"m": "y"}], ["m", "m.n"]),
        ([{"m": "x", "lr": 1}, {"m": "y", "lr": 2}], ["m", "lr"]),
        ([{"a": 1}], []),
    ],
)
def test_a_choice_accounts_for_what_is_below_it(several, expected):
    assert differing(several) == expected


@pytest.mark.parametrize("ffn", ["swiglu", "none"])
def test_what_a_pattern_repeats_is_named_once(made, tmp_path, ffn):
    for mixer in ("gated_deltanet", "attention"):
        train(tmp_path / mixer, f"mixer={mixer}", f"ffn={ffn}")
    train(tmp_path / "mlp", "mixer=attention", "ffn=mlp")
    assert list(table(made(tmp_path))[0])[:3] == ["mixer", "ffn", "accuracy (val)"]


def test_a_run_that_diverged_is_listed_and_says_so(made, runs):
    with pytest.raises(NonFiniteError):
        train(runs / "high", "optimizer.lr=1e30", "trainer.max_steps=5")
    text = made(runs)
    row = table(text)[1]
    assert row["optimizer.lr"] == "1e+30"
    assert row["seeds"] == "seed 0 diverged"
    assert row["accuracy (val)"] == ""
    assert row["parameters"] == table(text)[0]["parameters"]
    assert "high (seed 0): diverged: the " in text


def test_a_seed_that_did_not_finish_is_named_beside_those_that_did(made, runs):
    RunDirectory(runs / "gdn1").write_summary(status="running")
    text = made(runs)
    assert table(text)[0]["seeds"] == "2; seed 1 running at step 2"
    assert "gdn1 (seed 1): running at step 2" in text


def test_a_job_that_failed_before_it_had_a_config_is_listed(made, runs):
    for name, overrides in (("0", [*TINY, *SHORT, "mixer.heads=3"]), ("1", ["mixer.gone=1"])):
        (runs / name).mkdir()
        job = RunDirectory(runs / name)
        job.write_summary(status="failed", overrides=overrides, error="ConfigError: 3 heads")
    rows = table(made(runs))
    assert (rows[0]["mixer.heads"], rows[0]["seeds"]) == ("3", "seed 0 failed")
    assert rows[1]["mixer"] == "mixer.gone=1", "a config that is no more is named by its command"


def test_a_repeated_run_is_no_second_seed_and_is_mentioned(made, runs):
    shutil.copytree(runs / "gdn1", runs / "again")
    RunDirectory(runs / "again").write_summary(started="2100-01-01T00:00:00+00:00")
    text = made(runs)
    assert table(text)[0]["seeds"] == "3"
    assert "gdn1 is left out (accuracy 0." in text
    assert "a later run has its config and seed 1" in text


def test_evaluations_are_columns(made, trained):
    words = "eval:accuracy@32,eval:accuracy@2x,eval:loss@16:fresh,eval:state_bytes@16"
    text = made(trained, "--columns", words)
    first, second = table(text)
    rows = [json.loads(line) for line in (trained / "gdn0/evaluations.jsonl").open()]
    assert first["accuracy at 32 (test)"] == f"{rows[1]['metrics']['accuracy']:.3f} (1 of 3)"
    assert first["accuracy at 2x (test)"] == first["accuracy at 32 (test)"]
    assert first["loss at 16 (test)"] == f"{rows[0]['metrics']['loss']:.3f} (1 of 3)"
    assert first["state_bytes at 16 (test)"].startswith(f"{rows[0]['state_bytes']:,}")
    assert second["accuracy at 32 (test)"] == ""
    assert "Evaluated: " in text


def test_the_latest_evaluation_counts_and_the_split_is_the_one_asked_for(made, runs):
    evaluate_command([f"run={runs / 'gdn0'}", "lengths=[1]", "split=val"])
    first, _ = table(made(runs, "--columns", "eval:accuracy@16", "--split", "val"))
    best, _ = table(made(runs / "gdn0", runs / "swa"))
    assert first["accuracy at 16 (val)"] == f"{best['accuracy (val)']} (1 of 3)"
    assert list(table(made(runs, "--split", "test"))[0])[1] == "accuracy (test)"
    rows = [json.loads(line) for line in (runs / "gdn0/evaluations.jsonl").open()]
    newer = {**rows[0], "metrics": {"accuracy": 0.625}}
    last = {**newer, "metrics": {"accuracy": 0.5}, "checkpoint": "last.ckpt"}
    with (runs / "gdn0/evaluations.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in (newer, last))
    first, _ = table(made(runs, "--columns", "eval:accuracy@16"))
    assert first["accuracy at 16 (test)"] == "0.625 (1 of 3)"


def test_evaluations_of_unlike_tasks_are_not_passed_over(made, runs):
    evaluate_command([f"run={runs / 'gdn1'}", "task.test_examples=4"])
    text = made(runs, "--columns", "eval:accuracy@16")
    assert "not all were evaluated alike; they differ in task.test_examples" in text
    assert "evaluated alike" not in made(runs, "--columns", "eval:accuracy@32")


def test_provenance_is_below_and_commits_are_told_apart(made, runs):
    for path in runs.glob("*/summary.json"):
        RunDirectory(path.parent).write_summary(commit="a" * 40, command="train.py -m seed=0,1")
    text = made(runs)
    assert "; commit aaaaaaaaaaaa." in text
    assert text.count("train.py -m seed=0,1") == 1
    assert "torch" in text
    RunDirectory(runs / "swa").write_summary(
        commit="b" * 40 + "+changes", command="train.py run_dir=/x/swa"
    )
    text = made(runs)
    apart = (
        "**not all from one commit** (aaaaaaaaaaaa: 3, bbbbbbbbbbbb with uncommitted changes: 1)"
    )
    assert apart in text
    assert "\npython train.py\n" in text, "where a run wrote is left out of its command"


def test_one_command_can_stand_for_those_of_every_run(made, runs):
    for i, path in enumerate(runs.glob("*/summary.json")):
        RunDirectory(path.parent).write_summary(command=f"train.py seed={i}")
    text = made(runs, "--made-by", "make table", "--note", "Two rows.", "--note", "No more.")
    assert text.endswith("```bash\nmake table\n```\n")
    assert "\n- Two rows.\n- No more.\n- Trained: " in text
    rows = [json.loads(line) for line in (runs / "gdn0/evaluations.jsonl").open()]
    lines = [json.dumps({**row, "command": "eval.py run=runs/gdn0"}) for row in rows]
    (runs / "gdn0/evaluations.jsonl").write_text("\n".join(lines))
    text = made(runs, "--made-by", "make table", "--columns", "eval:accuracy@32")
    assert text.endswith("```bash\npython eval.py run=RUN\nmake table\n```\n")


def test_a_run_knows_when_it_started(made, trained):
    started = json.loads((trained / "swa/summary.json").read_text())["started"]
    assert f"Trained: {started[:10]}" in made(trained / "swa")


def test_a_file_is_made_and_then_only_its_table_is_replaced(made, runs, tmp_path):
    out = tmp_path / "docs" / "results.md"
    options = ("--out", out, "--name", "mqar")
    made(runs / "swa", *options, "--title", "MQAR")
    created = out.read_text()
    assert created.startswith("<!-- report: mqar -->\n\n### MQAR\n\n| mixer |")
    assert created.endswith("<!-- /report -->\n")
    prose = (
        "# Results\n\nBefore | it.\n\n{}\nAfter it.\n<!-- report: b -->\nkept\n<!-- /report -->\n"
    )
    out.write_text(prose.format(created))
    made(runs, *options)
    text = out.read_text()
    start, end = text.index("<!-- report: mqar -->"), text.index("<!-- /report -->")
    assert (text[:start] + "{}" + text[end + len("<!-- /report -->\n") :]) == prose
    assert "sliding_window" in text[start:end]
    assert "gated_deltanet" in text[start:end]
    assert "MQAR" not in text[start:end]


@pytest.mark.parametrize(
    "text",
    [
        "prose only\n",
        "<!-- report: table -->\nno end\n",
        "<!-- report: table -->\n<!-- report: other -->\n<!-- /report -->\n",
        "<!-- report: table -->\n<!-- /report -->\n<!-- report: table -->\n<!-- /report -->\n",
    ],
)
def test_a_file_without_its_markers_is_left_alone(made, trained, tmp_path, text):
    out = tmp_path / "prose.md"
    out.write_text(text)
    with pytest.raises(ReportError, match="needs the line <!-- report: table --> once"):
        made(trained, "--out", out)
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "best:acuracy"], r"'best:acuracy'; known, nearest first: best:accuracy, "),
        (["--columns", "paramters"], r"nearest first: budget.parameters, "),
        (["--columns", "eval:accuracy@99"], r"eval.py run=RUN adds .* first: eval:accuracy@\d"),
        (
            ["--sort", "best:acuracy/steps"],
            r"--sort: no run has a value for 'best:acuracy/steps'; ",
        ),
        (["--sort", "hardware"], r"--sort: hardware is not a number: '"),
        (["--sort", "steps/hardware"], r"steps/hardware: hardware is not a number: '"),
        (["--by", "mixr"], r"--by: no run has the option 'mixr'; known, nearest first: mixer, "),
        (["--by", "task"], r"--by task: these leave rows with equal names; .* differ in mixer"),
    ],
)
def test_mistakes_in_the_command(made, trained, arguments, message):
    with pytest.raises(ReportError, match=message):
        made(trained, *arguments)


def test_a_place_without_runs_is_named(made, tmp_path):
    with pytest.raises(ReportError, match=f"no runs in {tmp_path}"):
        made(tmp_path)
    with pytest.raises(ReportError, match=r"there is no run at .*nowhere"):
        made(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["summary.json", "evaluations.jsonl"])
def test_entries_of_another_kind_are_refused_by_name(made, runs, file):
    entries = runs / "gdn0" / file
    first, *others = entries.read_text().splitlines() if file.endswith("l") else ["", ""]
    row = json.loads(first or entries.read_text())
    for hardware in (None, ["a CPU"]):  # null: it was not known
        changed = json.dumps({**row, "hardware": hardware})
        entries.write_text("\n".join([changed, *others]) + "\n")
        if hardware is None:
            made(runs, "--columns", "eval:accuracy@32")
    with pytest.raises(ReportError, match=r"hardware is \['a CPU'\], which this project did not"):
        made(runs, "--columns", "eval:accuracy@32")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, "0.250"),
        (0.0, "0.000"),
        (3e-5, "3.00e-05"),
        (1234567, "1,234,567"),
        (173056.0, "173,056"),
        (float("nan"), "nan"),
    ],
)
def test_numbers(value, expected):
    assert number(value) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0, 1.0], "1.000 ± 0.000"),
        ([0.5, 0.7], "0.600 ± 0.141"),
        ([40, 40], "40"),
        (["cpu", "cpu", "gpu"], "cpu, gpu"),
        ([True], "true"),
    ],
)
def test_seeds_together(values, expected):
    assert together(values, measured=True) == expected


def test_the_program_prints_a_table_or_one_message(trained, tmp_path, capsys):
    done = program("scripts/report.py", str(trained), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert table(done.stdout)
    with pytest.raises(SystemExit) as end, report_errors():
        report([str(tmp_path)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("no runs in")
    assert len(said.splitlines()) == 1
    with pytest.raises(SystemExit):
        report(["--help"])
    assert "eval:METRIC@LENGTH" in capsys.readouterr().out
