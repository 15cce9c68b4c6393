"""Texts on a few topics, and a router of them."""

import numpy as np
import pytest

from mneme.routers import HashedTfidf, Router

TOPICS = {
    "sea": "harbour ship sail anchor captain tide wave cargo",
    "farm": "wheat barn cow plough field harvest hay tractor",
    "court": "judge law trial verdict witness jury appeal crime",
    "kitchen": "oven butter flour pan onion recipe salt bread",
}


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of 12 words, the topics in turn."""
    rng = np.random.default_rng(seed)
    topics = [words.split() for words in TOPICS.values()]
    return [" ".join(rng.choice(topics[i % len(topics)], 12)) for i in range(count)]


@pytest.fixture(scope="session")
def texts():
    return documents(120)


@pytest.fixture(scope="session")
def router(texts):
    embedder = HashedTfidf(features=512, components=16)
    return Router.fit(texts, embedder=embedder, branching=4, depth=3)
