"""A text task without bits per byte, from training to the table of a report."""

import io
import json
import random

import pytest
import sentencepiece

from mneme.harness.config.check import ConfigError
from mneme.harness.config.compose import compose_checked
from mneme.harness.evaluate.eval_command import evaluate_command
from mneme.harness.run.jobs import start_run
from scripts.report import report
from scripts.reporting.runs import read_run
from tests.harness.conftest import TINY

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnr"]


@pytest.fixture
def overrides(tmp_path):
    """Of a run on forty small files, with a vocabulary by SentencePiece's defaults."""
    draw, model, texts = random.Random(0), io.BytesIO(), []
    (tmp_path / "texts").mkdir()
    for index in range(40):
        texts.append("\n".join(" ".join(draw.choices(WORDS, k=10)) for _ in range(40)))
        (tmp_path / "texts" / f"{index}.txt").write_text(texts[-1])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    return [
        *(option for option in TINY if not option.startswith("task.")),
        "task=text_sentencepiece",
        f"task.source={{_target_: mneme.tasks.LocalFiles, paths: ['{tmp_path}/texts/*.txt']}}",
        f"task.tokenizer={{vocab_size: 512, model_file: '{tmp_path}/m.model'}}",
        "task.seq_len=16",
        "task.batch_size=4",
        f"+task.cache_dir={tmp_path}/cache",
        f"run_dir={tmp_path}/run",
    ]


def test_a_lossy_tokenizer_trains_and_withholds_bits_per_byte(overrides, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"--add_dummy_prefix=false.*tokenizer.lossy=true"):
        start_run(compose_checked(overrides))
    run, summary = start_run(compose_checked([*overrides, "+task.tokenizer.lossy=true"]))
    said = capsys.readouterr().out
    assert "for comparison, loss of unigram " in said
    assert "no bits per byte, as the tokenizer is declared to be lossy: " in said
    assert summary["task"]["remark"].startswith("no bits per byte")
    assert run.best.exists()
    evaluations = evaluate_command([f"run={run.path}", "lengths=[1]", "carry=[false]"])
    assert "no bits per byte, as" in capsys.readouterr().out
    kept = [run.config, run.metrics, run.evaluations, run.tokenizer]
    assert [path.name for path in kept if not path.exists()] == []
    for found in (summary["metrics"], evaluations[0].metrics, json.loads(run.summary.read_text())):
        assert "bits_per_byte" not in json.dumps(found)
    report([str(run.path)])
    table = capsys.readouterr().out
    assert f"{read_run(run.path).best['val/loss']:.3f}" in table
    assert "diverged" not in table
