"""A class-incremental stream of features that a frozen encoder might give.

After the class-incremental setting of "Discrete Key-Value Bottleneck",
https://arxiv.org/abs/2207.11240, without its images and encoders. C classes, G clusters in a class,
L latent size, H hidden size, D feature size, N examples.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

LATENT = 8
HIDDEN = 256
OTHER_CLASSES = 10  # unlabelled clusters for each labeled one, as CIFAR-100 has for CIFAR-10

# The first half of a random stream's spawn key, as in `mneme.tasks.base`.
STREAMS = {"encoder": 0, "clusters": 1, "unlabelled": 2, "split": 3, "test": 4}
Stream = Literal["encoder", "clusters", "unlabelled", "split", "test"]


class Labeled(NamedTuple):
    """Features and what they are of.

    Attributes:
        features: `[N, D]` float32.
        labels: `[N]` int64, in `[0, C)`.
    """

    features: Tensor
    labels: Tensor


class ClassIncremental:
    """Features of C classes, of which only some are shown at a time.

    A class is G Gaussian clusters in a latent space, and a feature vector is what a fixed random
    network, `tanh(relu(z A + a) B)`, makes of a latent point z. So a class is in no one place, but
    nearby features are mostly of one cluster, and a linear map of the features tells all classes
    apart. The classes come in S splits: a learner sees split 0, then split 1 without split 0, and
    so on. It is tested on all classes at the end.

    A memory that places its keys before any label is known uses `unlabelled`: the same encoder on
    clusters of other classes, ten times as many. They share no center with the labeled ones.

    This is no `Task`: there are no tokens. What is drawn is a function of the seed, of the split
    and of `n`; data for training and for tests come from independent streams.

    Example, two classes in each of five splits::

        stream = ClassIncremental()
        keys = k_means(stream.unlabelled(10_000))
        for split in range(stream.splits):
            features, labels = stream.split(split, 1_000)  # labels 2 * split and 2 * split + 1
            learn(keys, features, labels)
        features, labels = stream.test(5_000)  # labels 0 to 9

    Args:
        classes: C, a multiple of S.
        splits: S.
        clusters: G.
        features: D.
        spread: standard deviation of a cluster; its center is drawn with a standard deviation of 1.
        seed: all randomness follows from it.
    """

    def __init__(
        self,
        *,
        classes: int = 10,
        splits: int = 5,
        clusters: int = 3,
        features: int = 128,
        spread: float = 0.3,
        seed: int = 0,
    ) -> None:
        counts = {"classes": classes, "splits": splits, "clusters": clusters, "features": features}
        for label, count in counts.items():
            if count < 1:
                raise ValueError(f"{label} ({count}) must be at least 1")
        if classes % splits:
            raise ValueError(f"splits ({splits}) must divide classes ({classes})")
        if not spread >= 0:
            raise ValueError(f"spread ({spread}) must not be negative")
        self.classes = classes
        self.splits = splits
        self.features = features
        self.spread = spread
        self.seed = seed
        rng = self._rng("encoder")
        self._in = rng.normal(size=(LATENT, HIDDEN)) / LATENT**0.5
        self._bias = rng.normal(size=HIDDEN)
        self._out = rng.normal(size=(HIDDEN, features)) * (2 / HIDDEN) ** 0.5
        rng = self._rng("clusters")
        self._centers = rng.normal(size=(classes, clusters, LATENT))
        self._other_centers = rng.normal(size=(OTHER_CLASSES * classes * clusters, LATENT))

    @property
    def chance_level(self) -> float:
        """Test accuracy of guessing among all classes."""
        return 1 / self.classes

    def classes_of(self, split: int) -> range:
        """The labels that occur in a split."""
        if not 0 <= split < self.splits:
            raise ValueError(f"split ({split}) must be in [0, {self.splits})")
        size = self.classes // self.splits
        return range(split * size, (split + 1) * size)

    def unlabelled(self, n: int) -> Tensor:
        """`[n, D]` features of other classes."""
        rng = self._rng("unlabelled")
        return self._features(
            rng, self._other_centers[rng.integers(len(self._other_centers), size=n)]
        )

    def split(self, index: int, n: int) -> Labeled:
        """`n` training examples of split `index`, its classes drawn evenly."""
        return self._labeled(self._rng("split", index), self.classes_of(index), n)

    def test(self, n: int) -> Labeled:
        """`n` test examples of all classes, drawn evenly."""
        return self._labeled(self._rng("test"), range(self.classes), n)

    def _labeled(self, rng: np.random.Generator, classes: range, n: int) -> Labeled:
        labels = rng.integers(classes.start, classes.stop, size=n)
        clusters = rng.integers(self._centers.shape[1], size=n)
        features = self._features(rng, self._centers[labels, clusters])
        return Labeled(features, torch.from_numpy(labels))

    def _features(self, rng: np.random.Generator, centers: Floats) -> Tensor:
        """Encodes a latent point near each center, `[N, L]` to `[N, D]`."""
        latent = centers + self.spread * rng.normal(size=centers.shape)
        hidden = np.maximum(latent @ self._in + self._bias, 0)
        return torch.from_numpy(np.tanh(hidden @ self._out).astype(np.float32))

    def _rng(self, stream: Stream, index: int = 0) -> np.random.Generator:
        key = (STREAMS[stream], index)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
