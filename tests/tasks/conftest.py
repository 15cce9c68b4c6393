"""Small corpora, made on the spot."""

import numpy as np
import pytest

from mneme.tasks import ByteTokenizer, LocalFiles, Text

WORDS = ["memory", "slot", "writes", "reads", "Größe", "naïve", "記憶", "\tx = 1", "()", "  "]


@pytest.fixture
def corpus_dir(tmp_path):
    """Forty files of some 900 bytes; names are such that all splits occur by hash."""
    folder = tmp_path / "corpus"
    rng = np.random.default_rng(0)
    for index in range(40):
        path = folder / f"part{index % 3}" / f"{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [" ".join(rng.choice(WORDS, size=8)) for _ in range(20)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def source(corpus_dir):
    return LocalFiles([f"{corpus_dir}/**/*.txt"])


@pytest.fixture
def make_text(source, tmp_path):
    """Builds a small text task; keyword arguments override its defaults."""

    def make(**options):
        defaults = {"seq_len": 16, "batch_size": 4, "eval_tokens": 1000}
        parts = {"source": source, "tokenizer": ByteTokenizer(), "cache_dir": tmp_path / "cache"}
        return Text(**(parts | defaults | options))

    return make
