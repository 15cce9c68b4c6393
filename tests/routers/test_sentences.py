"""Windows of long texts and their mean, with a stand-in for a package that is not required."""

import re
import sys
from types import ModuleType

import numpy as np
import pytest

from mneme.routers import Router, RouterError, SentenceTransformer
from mneme.routers.sentences import cut


class Pieces(dict):
    def __init__(self, words, **lists):
        super().__init__(lists)
        self.words = words

    def word_ids(self):
        return self.words


class Tokenizer:
    """A piece per two characters of a word."""

    is_fast = True

    def num_special_tokens_to_add(self):
        return 2

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        spans, words = [], []
        for number, word in enumerate(re.finditer(r"\S+", text)):
            for start in range(word.start(), word.end(), 2):
                spans.append((start, min(start + 2, word.end())))
                words.append(number)
        return Pieces(words, offset_mapping=spans)


class Model:
    """Counts letters, and reads no more than `max_seq_length` pieces."""

    max_seq_length = 8
    letters = "abcdefgh"

    def __init__(self, name):
        if name == "missing":
            raise OSError("no such model")
        self.tokenizer = Tokenizer()

    def encode(self, texts, *, normalize_embeddings, show_progress_bar):
        assert normalize_embeddings
        read = [self._beginning(text) for text in texts]
        counts = np.array([[1, *(text.count(a) for a in self.letters)] for text in read], float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def _beginning(self, text):
        most = self.max_seq_length - self.tokenizer.num_special_tokens_to_add()
        spans = self.tokenizer(text, add_special_tokens=False)["offset_mapping"][:most]
        return text[: spans[-1][1]] if spans else ""


@pytest.fixture
def package(monkeypatch):
    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = Model
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


def test_windows_end_where_words_do():
    words = [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4]
    assert cut(words, 4) == [(0, 2), (2, 6), (6, 10), (10, 13)]
    assert cut(words, 13) == [(0, 13)]
    assert cut([0, 0, 0], 1) == [(0, 1), (1, 2), (2, 3)]
    assert cut([], 4) == []


def test_the_vector_of_a_long_text_is_the_mean_of_its_windows(package):
    embedder = SentenceTransformer("letters", window=6)
    embedder.fit([])
    first, second = "aaaa bbbb cccc", "dddd"  # of 6 and 2 pieces
    a, b, both, empty, again = embedder.embed([first, second, f"{first} {second}", "", first])
    mean = 6 * a + 2 * b
    np.testing.assert_allclose(both, mean / np.linalg.norm(mean), atol=1e-6)
    assert np.array_equal(a, again)
    assert empty.tolist() == [1] + [0] * 8
    assert embedder.embed([]).shape == (0, 9)


def test_a_saved_router_refuses_other_weights_of_the_same_name(package, tmp_path, monkeypatch):
    texts = ["aaaa", "bbbb", "cccc", "dddd"]
    router = Router.fit(
        texts, embedder=SentenceTransformer("letters", window=6), branching=2, depth=2
    )
    router.save(tmp_path)
    loaded = Router.load(tmp_path)
    assert loaded.hash == router.hash
    assert np.array_equal(loaded.route(texts), router.route(texts))
    for letters in ("zyxwvuts", "abc"):  # other vectors, and vectors of another length
        monkeypatch.setattr(Model, "letters", letters)
        loaded = Router.load(tmp_path)
        for _ in range(2):  # each time that it is asked
            with pytest.raises(RouterError, match="not the model that this router was fitted"):
                loaded.route(texts)


def test_what_is_missing_is_said(package, monkeypatch):
    with pytest.raises(RouterError, match="cannot load the model missing: no such model"):
        SentenceTransformer("missing").fit([])
    with pytest.raises(RouterError, match="letters reads 6 word pieces; window is 7"):
        SentenceTransformer("letters", window=7).fit([])
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(RouterError, match="pip install sentence-transformers"):
        SentenceTransformer().fit([])
    with pytest.raises(RouterError, match="call fit first"):
        SentenceTransformer().embed([])
