"""Telemetry of test-time memories: what is recorded is what happened, and the page can be read."""

import csv
import html
import math
import re

import pytest
import torch
from lightning.pytorch.plugins.precision import Precision

from mneme.harness.config.build import build
from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.evaluate.evaluation import evaluate, restore_model
from mneme.harness.evaluate.surprise_page import Section, Token, _scale, page
from mneme.harness.evaluate.telemetry import PIECE, record_trace, tokens_of
from mneme.harness.run.checkpoints import read_checkpoint
from mneme.harness.run.jobs import start_run
from mneme.harness.run.run_directory import RunError, TaskMismatchError
from mneme.layers import recording
from mneme.tasks import ByteTokenizer, LocalFiles, Text

LINE = 'if a < b && c > "é": # naïve {}\n'
SPAN = re.compile(
    r'<span class="t" style="--s:([\d.]+)" title="(\d+: .*?)">(.*?)</span>', re.DOTALL
)
COUNT = 100  # more than a piece, and not a multiple of it; more than a block


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run on text with a memory in both blocks, which nothing here changes but to add to it."""
    folder = tmp_path_factory.mktemp("telemetry")
    (folder / "files").mkdir()
    for i in range(60):
        (folder / "files" / f"{i}.txt").write_text(LINE.format(i) * 100)
    composed = compose_checked([
        "task=text", "mixer=titans_lmm", "ffn=none", "model.d_model=16", "model.n_layers=2",
        f"task.source={{_target_: mneme.tasks.LocalFiles, paths: ['{folder}/files/*.txt']}}",
        f"task.cache_dir={folder / 'cache'}", "logger=csv", "task.seq_len=32",
        "task.batch_size=4", "trainer.max_steps=2", "task.eval_tokens=1000",
        "trainer.enable_progress_bar=false", f"run_dir={folder / 'run'}",
    ])  # fmt: skip
    return start_run(composed)[0]


@pytest.fixture(scope="module")
def read(text_run):
    """The run evaluated with telemetry: the rows of the table, the page, and what was printed."""
    results = evaluate_command([f"run={text_run.path}", "lengths=[1]", f"telemetry={COUNT}"])
    with (text_run.telemetry / "telemetry.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, (text_run.telemetry / "surprise.html").read_text(), results


def model_and_task(run, **changes):
    config = run.read_config()
    model = restore_model(config, read_checkpoint(run.best))
    task = build({**config["task"], **changes})
    task.prepare_data()
    return model, task


def by_hand(run, count=COUNT):
    """The first tokens of the test split read in one call, and what the layers reported."""
    model, task = model_and_task(run)
    stream = torch.tensor(task.store.streams["test"][: count + 1].astype("int64"))
    with torch.inference_mode(), recording() as record:
        logits = model(stream[None, :-1]).y[0]
    bits = torch.nn.functional.cross_entropy(logits, stream[1:], reduction="none") / math.log(2)
    return stream, bits, record.by_layer(model)


def column(rows, name):
    return torch.tensor([float(row[name]) if row[name] else math.nan for row in rows])


def test_the_table_holds_what_the_layers_report(text_run, read):
    rows, _, _ = read
    stream, bits, reports = by_hand(text_run)
    assert [int(row["position"]) for row in rows] == list(range(COUNT))
    assert [int(row["id"]) for row in rows] == stream[:-1].tolist()
    torch.testing.assert_close(column(rows, "bits"), bits, rtol=1e-4, atol=1e-5)
    assert len(reports) == 2
    for layer, named in reports.items():
        assert {"surprise", "inner_lr", "forget", "momentum"} < set(named)
        for name in ("surprise", "inner_lr", "forget", "momentum"):
            value = named[name][0]
            assert value.shape == (COUNT, 2)
            near = {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(column(rows, f"{layer}/{name}"), value.mean(-1), **near)
            for head in (0, 1):
                torch.testing.assert_close(
                    column(rows, f"{layer}/{name}/head{head}"), value[:, head], **near
                )
        assert (named["surprise"] > 0).all()


def test_each_token_has_its_own_cost_beside_that_of_its_target(read):
    rows, _, _ = read
    bits, own = column(rows, "bits"), column(rows, "own_bits")
    assert own[0].isnan(), "nobody predicted the first token"
    assert torch.equal(own[1:], bits[:-1])


def test_the_norm_of_the_weights_stands_at_the_last_token_of_each_call(text_run, read):
    rows, _, _ = read
    model, _ = model_and_task(text_run)
    stream, _, _ = by_hand(text_run)
    for end in (PIECE, COUNT):
        with torch.inference_mode():
            state = model(stream[None, :end]).state
        (fast, *_), *_ = state[0][0]
        squares = torch.stack([w[0].square().sum((-2, -1)) for w in fast.weights])  # [L, H]
        (layer, *_) = [name.split("/")[0] for name in rows[0] if name.endswith("memory_norm")]
        norm = column(rows, f"{layer}/memory_norm")
        torch.testing.assert_close(norm[end - 1], squares.sum(0).sqrt().mean(), rtol=1e-4, atol=0)
        assert (~norm.isnan()).nonzero().flatten().tolist() == [PIECE - 1, COUNT - 1]


def test_the_table_shows_the_text(read):
    rows, _, _ = read
    shown = "".join(row["token"] for row in rows)
    assert shown.startswith("if a < b && c > ")
    assert r"\xc3" in shown, "half a character is a byte"
    assert r"\n" in shown


def test_the_page_shows_every_token_once_per_memory(text_run, read):
    rows, text, _ = read
    sections = text.split("<section>")[1:]
    assert len(sections) == 2
    for section in sections:
        spans = SPAN.findall(section)
        assert len(spans) == COUNT
        layer = html.unescape(re.search("<h2>(.*?)</h2>", section)[1])
        titles = [html.unescape(title) for _, title, _ in spans]
        values = [float(title.rsplit(", ", 1)[1]) for title in titles]
        expected = column(rows, f"{layer}/surprise").tolist()
        assert values == pytest.approx(expected, rel=1e-3)
        shares = [float(share) for share, _, _ in spans]
        assert min(shares) == 0
        assert max(shares) == 1
        assert shares[values.index(max(values))] == 1
        assert shares[values.index(min(values))] == 0
        shown = html.unescape("".join(inner for *_, inner in spans)).replace("·", "")
        stream, _, _ = by_hand(text_run)
        written = bytes(stream[:-1].tolist()).decode(errors="ignore")
        assert shown.replace("↵\n", "\n") == written
        assert section.count("<polyline") >= 3
        for curve in ("surprise", "forget", "memory_norm", "loss of the target (bits)"):
            assert f">{curve}</text>" in section


def test_the_page_is_escaped_and_needs_nothing_else(read):
    _, text, _ = read
    texts = [inner for *_, inner in SPAN.findall(text)]
    titles = [title.split(": ", 1)[1].rsplit(", ", 1)[0] for _, title, _ in SPAN.findall(text)]
    for shown in (texts, titles):
        assert {"&lt;", "&gt;", "&amp;", "&quot;", "a"} < set(shown)
        assert not any(re.search(r'[<>"]|&(?!\w+;)', inner) for inner in shown)
    for outside in ("http", "src=", "href=", "url(", "@import", "<script"):
        assert outside not in text
    assert "prefers-color-scheme: dark" in text


def test_metrics_are_the_same_with_telemetry_and_without(text_run, read):
    _, _, (fresh, carried) = read
    model, task = model_and_task(text_run)
    assert evaluate(model, task, precision=Precision(), carry=False).metrics == fresh.metrics
    assert evaluate(model, task, precision=Precision(), carry=True).metrics == carried.metrics


def test_correlations_and_paths_are_printed(text_run, read, capsys):
    rows, text, _ = read
    evaluate_command([f"run={text_run.path}", "lengths=[1]", f"telemetry={COUNT}"])
    printed = capsys.readouterr().out
    assert f"telemetry of {COUNT} tokens" in printed
    assert str(text_run.telemetry / "surprise.html") in printed
    assert str(text_run.telemetry / "telemetry.csv") in printed
    found = re.findall(r"^  (\S+): own loss (\S+), target's loss (\S+)$", printed, re.M)
    assert len(found) == 2
    for layer, *numbers in found:
        surprise = column(rows, f"{layer}/surprise")
        for number, cost in zip(numbers, ("own_bits", "bits"), strict=True):
            known = ~column(rows, cost).isnan()
            both = torch.stack([surprise[known], column(rows, cost)[known]])
            assert float(number) == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=2e-3)
            assert number in text


def test_nothing_is_recorded_unless_asked_for(train_tiny, capsys):
    run, _ = train_tiny("mixer=titans_lmm")
    evaluate_command([f"run={run.path}", "lengths=[1]"])
    assert not run.telemetry.exists()
    assert "telemetry" not in capsys.readouterr().out


def test_a_recall_task_shows_ids_and_costs_where_something_is_asked(train_tiny):
    run, _ = train_tiny("mixer=titans_lmm")
    evaluate_command([f"run={run.path}", "lengths=[1]", "telemetry=500"])
    with (run.telemetry / "telemetry.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    _, task = model_and_task(run)
    first = next(iter(task.eval_batches("test")))
    assert [row["token"] for row in rows] == [str(i) for i in first.inputs[0].tolist()]
    assert len(rows) == 16, "no more than the first sequence"
    asked = [bool(row["bits"]) for row in rows]
    assert asked == (first.targets[0] != -100).tolist()
    assert not any(row["own_bits"] for row in rows), "answers are not read"


@pytest.mark.parametrize("mixer", ["titans_mac", "titans_mag", "titans_mal", "lattice_decode"])
def test_every_token_is_recorded_once_whatever_is_around_the_memory(train_tiny, mixer):
    heads = [] if mixer == "lattice_decode" else ["mixer.memory.heads=1"]
    run, _ = train_tiny(f"mixer={mixer}", *heads, "trainer.max_steps=3", "task.seq_len=80")
    model, task = model_and_task(run)
    trace = record_trace(model, task, precision=Precision(), split="val", count=70)
    ((_, reports),) = trace.layers.items()
    assert {len(value) for value in reports.values()} == {70}
    assert (reports["surprise"] > 0).all()
    norm = reports["memory_norm"]
    assert norm[PIECE - 1].isfinite().all()
    assert norm[-1].isfinite().all()


def test_the_sequence_goes_on_through_blocks_and_ends_with_its_last_target(text_run):
    model, task = model_and_task(text_run)
    lane = 250  # 1000 targets in 4 lanes; the last block of 32 is filled up
    trace = record_trace(model, task, precision=Precision(), split="test", count=10_000)
    assert trace.ids.tolist() == task.store.streams["test"][:lane].tolist()
    assert trace.bits.isfinite().all()


def test_a_model_without_a_memory_is_refused_before_it_is_evaluated(train_tiny):
    run, _ = train_tiny()
    with pytest.raises(
        TaskMismatchError, match="no layer of this model reports its surprise"
    ) as caught:
        evaluate_command([f"run={run.path}", "telemetry=10"])
    named = str(caught.value).split("mixer=")[1].split(", ")
    assert {"titans_lmm", "titans_mag", "atlas", "ttt_mlp"} <= set(named)
    assert not {"gated_deltanet", "attention", "sliding_window"} & set(named)
    for override in ("atlas", "titans_mag"):
        config = compose_checked([f"mixer={override}"]).config
        assert "TestTimeMemory" in str(config["mixer"])
    assert not run.evaluations.exists()
    assert not run.telemetry.exists()


def test_a_lone_checkpoint_has_nowhere_to_write(train_tiny, tmp_path):
    run, _ = train_tiny("mixer=titans_lmm")
    alone = tmp_path / "some" / "where" / "best.ckpt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(run.best.read_bytes())
    with pytest.raises(RunError, match="no run directory to write to"):
        evaluate_command([f"run={alone}", "lengths=[1]", "telemetry=10"])


@pytest.mark.parametrize(
    ("value", "message"),
    [("-1", "telemetry: expected 0 tokens or more, got -1"), ("all", "telemetry: expected int")],
)
def test_a_number_of_tokens_is_a_number(value, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_command(["run=x", f"telemetry={value}"])


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("aé€".encode(), ["a", "·", "é", "·", "·", "€"]),
        (b"a\xffb", ["a", "\ufffd", "b"]),
        (b"\xe2\x82", ["·", "·"]),
        (b"\xe2a", ["·", "\ufffda"]),
    ],
)
def test_bytes_are_shown_as_the_characters_they_make(tmp_path, data, shown):
    task = Text(source=LocalFiles([str(tmp_path / "*.txt")]), tokenizer=ByteTokenizer())
    tokens = tokens_of(task, torch.tensor([*data, 256]))
    assert [token.text for token in tokens] == [*shown, "⟨256⟩"]


def test_a_page_of_one_token_and_of_equal_values_can_be_drawn():
    for count in (1, 3):
        values = [2.0] * count
        section = Section("a<b", "", values, {"loss": [math.nan] * count, "surprise": values})
        text = page("one", [Token("\x00\n", r"\x00\n")] * count, [section])
        assert text.count('class="t"') == count
        assert "a&lt;b" in text
        assert "\x00" not in text
        assert "nan" not in text


def test_the_scale_says_what_lies_beyond_its_ends():
    labels = re.findall(r">([^<]+)</span>", _scale(1.0, 3.0))
    assert labels[0] == "1 or less"
    assert labels[-1] == "3 or more"
    assert [float(label) for label in labels[1:-1]] == sorted(map(float, labels[1:-1]))
