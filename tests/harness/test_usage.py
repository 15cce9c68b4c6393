"""The use of tables: what training logs, and what eval.py prints and writes."""

import json
import re
import shutil
from functools import partial
from xml.etree import ElementTree

import pytest
import torch

from mneme.harness.config.build import build
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate import eval_command
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.evaluate.evaluation import restore_model
from mneme.harness.evaluate.usage_page import HEIGHT, LEFT, TOP, WIDTH, print_usage, write_usage
from mneme.harness.run.callbacks import LogUsage
from mneme.harness.run.checkpoints import read_checkpoint
from mneme.harness.run.jobs import start_run
from mneme.harness.run.metrics_file import read_metrics
from mneme.harness.run.run_directory import RunError, TaskMismatchError
from mneme.layers import ProductKeyMemory, Usage, UsageMeter, metering, with_shared_tables
from mneme.models import LanguageModel, SequenceModule
from mneme.models.schedules import Constant
from mneme.tasks.batch import Batch, BatchSet, deal
from mneme.tasks.metrics import RecallMetrics
from tests.harness.conftest import TINY

TABLES = ["ffn=memory_plus", "ffn.sub_keys=4", "ffn.heads=2", "ffn.top_k=3"]


@pytest.fixture(scope="module")
def metered(tmp_path_factory):
    """A run of two blocks that read one table, which nothing here changes but to add to it."""
    path = tmp_path_factory.mktemp("usage") / "run"
    return start_run(compose_checked([*TINY, *TABLES, "callbacks=usage", f"run_dir={path}"]))[0]


def by_hand(run, file, split) -> dict[str, dict[str, float]]:
    """Figures of the model in a checkpoint over a split."""
    config = run.read_config()
    model, task = restore_model(config, read_checkpoint(file)), build(config["task"])
    task.prepare_data()
    with torch.inference_mode(), metering() as meter:
        for batch in task.eval_batches(split):
            model(batch.inputs)
    usage = with_shared_tables(model, meter.by_layer(model))
    return {place: found.metrics() for place, found in usage.items()}


def test_training_logs_the_use_of_every_layer_and_table_at_each_validation(metered):
    rows = [row for row in read_metrics(metered.metrics) if "val/loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    expected = {
        f"usage/{place}/{name}": value
        for place, figures in by_hand(metered, metered.last, "val").items()
        for name, value in figures.items()
    }
    assert len(expected) == 3 * 9, "two layers and their table"
    for row in rows:
        assert {name for name in row if name.startswith("usage/")} == set(expected)
        assert row["usage/tables.memory_plus/tokens"] == 8 * 16
    assert {name: rows[-1][name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def evaluated(metered, capsys, monkeypatch):
    """The run evaluated with usage=true: what was printed."""
    monkeypatch.setenv("COLUMNS", "200")
    evaluate_command([f"run={metered.path}", "usage=true", "lengths=[1,2]"])
    return capsys.readouterr().out


def test_evaluation_prints_and_writes_the_use_at_the_first_length(metered, evaluated):
    written = json.loads((metered.usage / "usage.json").read_text())
    expected = by_hand(metered, metered.best, "test")
    assert list(written) == list(expected)
    _, printed = evaluated.split("use of the rows of tables")
    assert all(name in printed for name in ("usage_top1", "kl_reads", "rows_99", "tokens"))
    for place, figures in expected.items():
        assert place in printed
        assert written[place] == pytest.approx(figures, rel=1e-6)
    for name in next(iter(expected.values())):
        (row,) = (line for line in printed.splitlines() if f"│ {name} " in line)
        cells = [float(cell.replace(",", "")) for cell in row.split("│")[2:-1]]
        assert cells == pytest.approx([figures[name] for figures in expected.values()], rel=1e-3)
    page = (metered.usage / "usage.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == list(expected)
    assert len(curves(page)) == 3
    assert str(metered.usage / "usage.html") in printed


def test_recorded_evaluations_are_made_without_a_meter(metered, monkeypatch):
    heard, results, evaluate = [], [], eval_command.evaluate
    monkeypatch.setattr(UsageMeter, "add", lambda *_: heard.append(True))
    monkeypatch.setattr(eval_command, "_report_usage", lambda *_: None)

    def listened(*args, **kwargs):
        heard.clear()
        result = evaluate(*args, **kwargs)
        results.append((result, bool(heard)))
        return result

    monkeypatch.setattr(eval_command, "evaluate", listened)
    recorded = evaluate_command([f"run={metered.path}", "usage=true", "lengths=[1,2]"])
    assert [metered for _, metered in results] == [False, False, True]
    assert recorded == [result for result, metered in results if not metered]
    assert results[-1][0].seq_len == 16


def test_usage_of_a_checkpoint_without_its_run_is_refused(metered, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    file = shutil.copy(metered.best, tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(RunError, match=r"usage: .* is no run directory to write to"):
        evaluate_command([f"run={file}", "usage=true"])


def test_a_model_without_tables_is_refused_before_it_trains(tmp_path):
    with pytest.raises(ConfigError, match="usage: no layer of this model reads a table"):
        start_run(compose_checked([*TINY, "callbacks=usage", f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_the_option_of_before_is_answered_by_the_one_of_today():
    with pytest.raises(ConfigError, match="usage: this option is callbacks=usage now") as caught:
        compose_checked([*TINY, "usage=true"])
    assert len(caught.value.problems) == 1


def test_a_validation_that_fails_leaves_no_meter_behind():
    memory = ProductKeyMemory(8, heads=1, top_k=2, sub_keys=4)
    callback, tokens = LogUsage(), torch.randn(1, 3, 8)
    batch = Batch(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.long), {})
    callback.on_validation_batch_start(None, None, batch, 0)
    memory(tokens)
    callback.on_exception()
    memory(tokens)
    (usage,) = callback.meter.by_layer(memory).values()
    assert usage.tokens == 3


def test_a_model_without_tables_is_refused_before_it_is_evaluated(train_tiny, monkeypatch):
    run, _ = train_tiny()
    monkeypatch.setattr(eval_command, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    with pytest.raises(TaskMismatchError, match="usage: no layer of this model reads a table"):
        evaluate_command([f"run={run.path}", "usage=true"])


# Several processes


@pytest.mark.parametrize("batches", [1, 3, 4])
def test_copies_that_even_out_the_ranks_are_not_metered(batches):
    torch.manual_seed(0)
    memory = partial(ProductKeyMemory, heads=2, top_k=2, sub_keys=4)
    model = LanguageModel(8, vocab_size=11, n_layers=1, pattern=[[memory]]).eval()
    tokens = torch.randint(11, (batches, 2, 5))
    series = BatchSet(lambda: (Batch(t, t, {}) for t in tokens))

    def use(rank: int, ranks: int) -> dict[str, Usage]:
        module = SequenceModule(
            model,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            schedule=Constant(),
            metrics=partial(RecallMetrics, {}),
        )
        callback = LogUsage()
        with torch.no_grad():
            for i, batch in enumerate(deal(series, rank, ranks)):
                callback.on_validation_batch_start(None, module, batch, i)
                module.validation_step(batch, i)
                callback.on_validation_batch_end()
        return callback.meter.by_layer(model)

    (whole,), *parts = (use(0, 1).values(), *(use(rank, 2) for rank in range(2)))
    assert list(parts[0]) == list(parts[1]), "they are added up layer by layer"
    assert whole.tokens == batches * 2 * 5
    assert sum(usage.tokens for part in parts for usage in part.values()) == whole.tokens
    totals = sum(usage.totals for part in parts for usage in part.values())
    torch.testing.assert_close(totals, whole.totals)


# The page


def curves(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", page, re.DOTALL)]


def drawn(folder, mass: list[float]) -> tuple[list[tuple[float, float]], list[str], str]:
    """Points of the curve of a histogram, the labels, and the dashed line."""
    totals = torch.tensor([mass] * 3, dtype=torch.float64)
    files = write_usage(folder / "usage", {"a<b>&c": Usage(totals, 7)}, "one & two")
    page = files[1].read_text()
    assert "<h2>a&lt;b&gt;&amp;c</h2>" in page
    assert "<h1>one &amp; two</h1>" in page
    assert "nan" not in page
    ((curve),) = curves(page)
    line, even = (element.get("points") for element in curve.iter("polyline"))
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    return points, [text.text for text in curve.iter("text")], even


def test_the_curve_of_a_histogram_worked_out_by_hand(tmp_path):
    points, labels, even = drawn(tmp_path, [2, 8, 0, 4, 2])  # of the mean of 16/5: 5/2, 5/4, 5/8
    across = [0, 0.4307, 0.6826, 0.8614]  # log(rank) / log(5)
    down = [0, 0.0502, 0.1003, 0.1003]  # log10(1, 2, 4, 4) / 6 decades
    expected = [(LEFT + WIDTH * x, TOP + HEIGHT * y) for x, y in zip(across, down, strict=True)]
    assert len(points) == 4, "an unused row has no place on a logarithmic axis"
    for point, wanted in zip(points, expected, strict=True):
        assert point == pytest.approx(wanted, abs=0.1)
    assert labels[1:] == ["2.5", "2.5e-06", "row 1, the most used", "5"]
    level = TOP + HEIGHT * 0.0663  # log10(5/2) / 6
    assert even == f"{LEFT:.1f},{level:.1f} {LEFT + WIDTH:.1f},{level:.1f}"


@pytest.mark.parametrize("mass", [[0, 0, 0], [3], [0]])
def test_tables_without_reads_and_of_one_row_can_be_drawn(tmp_path, mass):
    points, _, _ = drawn(tmp_path, mass)
    assert len(points) == sum(share > 0 for share in mass)


def test_a_large_table_is_drawn_with_few_points(tmp_path):
    points, labels, _ = drawn(tmp_path, [1.0] * 100_000)
    assert len(points) <= 200
    assert points[-1] == (LEFT + WIDTH, TOP)
    assert labels[-1] == "100,000"


def test_the_use_of_a_single_table_is_printed(capsys):
    usage = Usage.empty(3)
    usage.add(torch.tensor([[[0, 1]]]), torch.ones(1, 1, 2))
    print_usage({"layers.0": usage})
    assert "usage_top1" in capsys.readouterr().out
