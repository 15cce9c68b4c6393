"""Vectors of norm 1 for every text, whatever the texts and the options."""

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from mneme.routers import HashedTfidf, RouterError
from tests.routers.conftest import documents


def fitted(texts, **options) -> HashedTfidf:
    embedder = HashedTfidf(**options)
    embedder.fit(texts)
    return embedder


def test_vectors_are_those_of_scikit_learns_parts(texts):
    hashing = HashingVectorizer(n_features=512, alternate_sign=False, norm=None)
    weighted = TfidfTransformer().fit_transform(hashing.transform(texts))
    expected = TruncatedSVD(6, random_state=3).fit_transform(weighted)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = fitted(texts, features=512, components=6, seed=3).embed(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)


def test_restored_embedders_give_the_same_bits(texts):
    embedder = fitted(texts, components=7, analyzer="char_wb", ngrams=(2, 3))
    again = HashedTfidf.restore(embedder.options(), embedder.arrays())
    assert again.options() == embedder.options()
    assert np.array_equal(again.embed(texts), embedder.embed(texts))


@pytest.mark.parametrize(
    ("count", "options"),
    [(3, {}), (1, {}), (40, {"features": 4}), (40, {"features": 1, "components": 1})],
    ids=["few texts", "one text", "few features", "one feature"],
)
def test_there_may_be_fewer_texts_or_features_than_components(count, options):
    texts = documents(count)
    vectors = fitted(texts, **options).embed([*texts, "and others"])
    assert vectors.shape[1] <= min(count, options.get("features", 2**14))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_equal_texts_have_one_direction():
    embedder = fitted(["salt and bread"] * 9)
    assert embedder.embed(["bread"]).tolist() == [[pytest.approx(1, abs=1e-6)]]


def test_a_text_without_known_words_gets_the_usual_direction(texts):
    embedder = fitted(texts)
    usual = embedder.arrays()["usual"]
    assert np.linalg.norm(usual) == pytest.approx(1, abs=1e-6)
    for vector in embedder.embed(["", "?!", "quasar nebula"]):
        assert np.array_equal(vector, usual)
    known, mixed = embedder.embed(["harbour", "quasar harbour nebula"])
    np.testing.assert_allclose(known, mixed, atol=1e-6)  # unknown words do not count beside others
    assert not np.allclose(known, usual)


def test_so_does_a_text_whose_words_no_axis_has():
    embedder = fitted(["salt bread"] * 9 + ["harbour"], components=1)
    assert np.array_equal(embedder.embed(["harbour"])[0], embedder.arrays()["usual"])


def test_what_cannot_be_is_refused():
    with pytest.raises(RouterError, match="none of 2 texts has a word"):
        fitted(["", "..."])
    with pytest.raises(RouterError, match="call fit first"):
        HashedTfidf().embed(["a"])
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        HashedTfidf(components=0)
    with pytest.raises(ValueError, match="analyzer must be"):
        HashedTfidf(analyzer="char")
    with pytest.raises(ValueError, match="ngrams must be"):
        HashedTfidf(ngrams=(2, 1))
