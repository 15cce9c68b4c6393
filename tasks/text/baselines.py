"""How little a text takes without any learning: floors that a model must beat.

All figures are of the same text that models are scored on.
"""

import gzip
import lzma
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def unigram_nats(train_counts: Sequence[int], tokens: NDArray[np.integer]) -> float:
    """Cost of a text for a guesser that knows only how often each token occurs in training.

    Args:
        train_counts: `[V]`; one is added to each, so that an unseen token has a finite cost.
        tokens: `[N]`, the scored text.
    """
    counts = np.asarray(train_counts, dtype=np.float64) + 1
    return float(-np.log(counts / counts.sum())[tokens].sum())


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of a text for general compressors at their strongest, without any other text.

    Args:
        text: the scored text, its documents joined without separators.

    Returns:
        `gzip` (as `gzip -9`, time stamp zero) and `xz` (as `xz -9`), headers included.
    """
    sizes = {
        "gzip": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "xz": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
