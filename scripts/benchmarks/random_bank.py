"""What the benchmark of banks measures: sizes, a bank of random blocks, models that read it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mneme.layers import HierarchicalFFN, LayerFactory, SoftmaxAttention, SwiGLU
from mneme.layers.bank.memory_bank import BankOptions, BankShape
from mneme.models import LanguageModel
from mneme.models.bank import StoredBank, read_manifest, write_bank
from mneme.storage.generations import MANIFEST
from mneme.storage.record_file import Dtype

DTYPE = torch.bfloat16  # of stored blocks
STORED: Dtype = "bfloat16"  # likewise
STD = 0.02  # of random elements
_SHIFTS = 2**20  # elements by which blocks differ


@dataclass(frozen=True)
class BankSizes:
    """What is measured: the model and its bank, and how often.

    Attributes:
        width, layers, heads, vocab: of the model.
        branching: k, of a tree of three levels.
        units: of a path, over all levels.
        gib: that the bank takes on disk, at least.
        raw: bytes that large reads get through in a round.
        paths: that are fetched cold in a round, and blocks of each level that are read.
        prompt: tokens.
        tokens: that are decoded.
        seconds: for which routes are served.
        rounds: of each measurement.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocab: int = 16_384
    branching: int = 16
    units: int = 320
    gib: float = 16.0
    raw: int = 2**28
    paths: int = 8
    prompt: int = 512
    tokens: int = 64
    seconds: float = 60.0
    rounds: int = 9

    @property
    def hidden(self) -> tuple[int, int, int]:
        """Units of each level: just enough at the leaves, and the others above in equal parts."""
        for leaf in range(1, self.units // 3 + 1):
            rest = self.units - leaf
            hidden = (rest - rest // 2, rest // 2, leaf)
            shape = BankShape(self.layers, self.branching, hidden, 3 * self.width)
            if shape.parameters * DTYPE.itemsize >= self.gib * 2**30:
                return hidden
        raise ValueError(
            f"no bank of {self.gib} GiB has {self.units} units in {self.layers} layers"
        )


FULL = BankSizes()
QUICK = BankSizes(
    width=64,
    layers=2,
    heads=2,
    vocab=256,
    branching=4,
    units=48,
    gib=5e-4,
    raw=2**20,
    paths=2,
    prompt=32,
    tokens=8,
    seconds=0.2,
    rounds=3,
)


def prepare(folder: Path, sizes: BankSizes) -> BankShape:
    """Makes the bank, unless it is there.

    Raises:
        ValueError: another bank is there, or there is no bank of such sizes, or no room for it.
    """
    shape = BankShape(sizes.layers, sizes.branching, sizes.hidden, 3 * sizes.width)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if (manifest.shape, manifest.dtype) != (shape, STORED):
            raise ValueError(
                f"the bank in {folder} has other sizes or is not in {STORED}; give another --folder"
            )
        return shape
    numbers = torch.randn(shape.fetched + _SHIFTS, generator=generator()).mul_(STD).to(DTYPE)

    def records(level: int) -> Iterator[Tensor]:
        size = shape.record(level)
        for node in range(shape.nodes(level)):
            start = 7919 * node % _SHIFTS  # so that no two blocks are the same
            yield numbers[start : start + math.prod(size)].view(size)

    write_bank(folder, shape, records, dtype=STORED)
    return shape


def make_models(sizes: BankSizes, bank: StoredBank) -> tuple[LanguageModel, LanguageModel]:
    """A model that reads the bank and one without a bank; they share their weights."""
    shape = bank.shape
    options = BankOptions(branching=shape.branching, hidden=shape.hidden)
    with torch.device("meta"):  # or there would be a bank in memory
        served = _model(sizes, partial(HierarchicalFFN, bank=options))
        base_model = _model(sizes, SwiGLU)
    source = generator()
    weights = {
        name: torch.randn(p.shape, generator=source) * STD if p.ndim > 1 else torch.ones(p.shape)
        for name, p in base_model.named_parameters()
    }
    base_model.load_state_dict(weights, assign=True)
    served.load_state_dict(weights, assign=True, strict=False)
    served.use_part("bank", bank)
    return served.eval(), base_model.eval()


def _model(sizes: BankSizes, feed_forward: LayerFactory) -> LanguageModel:
    attention = partial(SoftmaxAttention, heads=sizes.heads)
    return LanguageModel(
        sizes.width,
        vocab_size=sizes.vocab,
        n_layers=sizes.layers,
        pattern=[[attention, feed_forward]],
    )


def generator() -> torch.Generator:
    """Numbers that are the same each time."""
    return torch.Generator().manual_seed(0)
