"""A trained run as a program or a notebook uses it."""

import random
import shutil

import pytest
import torch

import mneme
from mneme.harness.config.compose import compose_checked
from mneme.harness.run.jobs import start_run
from mneme.harness.run.run_directory import RunError
from mneme.models import generate
from scripts.sample import sample
from tests.harness.conftest import TINY

TOKENIZERS = {
    "bytes": "task.tokenizer={_target_: mneme.tasks.ByteTokenizer}",
    "sentencepiece": "task.tokenizer={_target_: mneme.tasks.SentencePieceTokenizer, "
    "vocab_size: 512}",
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def run(request, tmp_path_factory):
    """A run whose corpus and cache are gone, and which lies elsewhere than where it was trained."""
    place, draw = tmp_path_factory.mktemp("loading"), random.Random(0)
    (place / "texts").mkdir()
    for index in range(40):
        text = " ".join(draw.choices(["naïve", "memory", "straße", "of", "a", "door"], k=300))
        (place / "texts" / f"{index}.txt").write_text(text)
    start_run(
        compose_checked(
            [
                *(option for option in TINY if not option.startswith("task.")),
                "task=text",
                f"task.source={{_target_: mneme.tasks.LocalFiles, paths: ['{place}/texts/*.txt']}}",
                TOKENIZERS[request.param],
                "task.seq_len=16",
                "task.batch_size=4",
                f"+task.cache_dir={place}/cache",
                f"run_dir={place}/before",
            ]
        )
    )
    shutil.rmtree(place / "texts")
    shutil.rmtree(place / "cache")
    shutil.move(place / "before", place / "run")
    return mneme.load(place / "run")


@pytest.mark.parametrize("prompt", ["a naïve d", ""])
def test_text_is_what_the_tokens_of_the_model_say(run, prompt):
    ids = run.tokenizer.encode(prompt).tolist() or [run.tokenizer.end_of_document]
    new, _ = generate(run.model, torch.tensor([ids]), 40, temperature=0)
    tokens = [*new[0].tolist(), run.tokenizer.end_of_document]
    tokens = tokens[: tokens.index(run.tokenizer.end_of_document)]
    said = run.tokenizer.decode([*ids, *tokens])
    assert prompt + run.generate(prompt, 40, temperature=0) == said
    seeded = [run.generate(prompt, 40, seed=1) for _ in range(2)]
    assert seeded[0] == seeded[1] != run.generate(prompt, 40, seed=2)


def test_characters_come_whole(run, monkeypatch):
    """A character of several tokens is one piece; bytes that are none are not waited for."""
    ids = [*run.tokenizer.encode("straße").tolist(), *run.tokenizer.encode("ñ").tolist()]
    said = iter([[token] for token in ids])
    monkeypatch.setattr(
        "mneme.harness.evaluate.loading.generate",
        lambda *_, **__: (torch.tensor([next(said)]), None),
    )
    pieces = list(run.stream("a", len(ids)))
    assert "".join(pieces) == "straßeñ"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_the_program_prints_prompt_and_text(run, capsys):
    place = run.directory.path
    sample([f"run={place}", "prompt=a, door=(", "tokens=5", "temperature=0", "checkpoint=best"])
    assert capsys.readouterr().out == f"a, door=({run.generate('a, door=(', 5, temperature=0)}\n"


def test_what_does_not_fit_is_refused(run, train_tiny):
    with pytest.raises(RunError, match=r"route: no layer of the model of .* follows one"):
        run.generate("a", route=0)
    with pytest.raises(ValueError, match="temperature"):
        run.generate("a", temperature=-1)
    with pytest.raises(RunError, match="expected 'best' or 'last', got 'first'"):
        mneme.load(run.directory.path, checkpoint="first")
    symbols = mneme.load(train_tiny()[0].path)
    assert symbols.tokenizer is None
    with pytest.raises(RunError, match="are symbols, not text"):
        symbols.generate("a")
