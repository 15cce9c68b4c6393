"""Language modelling over files.

B examples or lanes, T positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mneme.tasks.base import IGNORE, Batch, BatchSet, EvalSplit, Facts, Task
from mneme.tasks.metrics import Metrics, TextMetrics
from mneme.tasks.text.baselines import compressed_bits_per_byte, unigram_nats
from mneme.tasks.text.corpus import Source
from mneme.tasks.text.store import TokenStore, prepare_store
from mneme.tasks.text.tokenizer import Ids, Tokenizer


class Text(Task):
    """Predict the next token of a text; scored in bits per byte, or by the loss per token.

    **Training** batches are windows of `seq_len + 1` tokens from random places of the training
    split: the first `seq_len` are inputs, the last `seq_len` targets. For the text "abcdef" with
    one token per byte, `seq_len = 4` and a window that starts at 1::

        inputs   b c d e
        targets  c d e f
        bytes    1 1 1 1

    **Evaluation** scores the first `eval_tokens` targets of a held-out split (all of it, if it is
    shorter), each exactly once and the first of a block like any other, whatever the block
    length and batch size. The text is cut into `batch_size` contiguous lanes, and each batch
    continues the lanes of the one before: an evaluator that goes through `eval_batches` itself may
    carry a model's state from batch to batch, or start each block afresh, on the same tokens.
    (The dataloaders deal batches to ranks in turn, so on several ranks they only serve the
    latter.)

    Documents follow one another with an end-of-document token between them, and neither training
    nor evaluation resets or masks anything there. That token is charged for and stands for no
    byte, which makes bits per byte very slightly pessimistic.

    A text is only scored in bits per byte if its tokens stand for exactly its bytes, which is
    checked over the whole corpus. A tokenizer that was declared to be `lossy` is scored by its loss
    per token instead, which compares models with the same tokenizer only.

    Splits are made by file: see `split_documents`. Tokens are prepared on first use and cached.

    Args:
        source: where the text comes from.
        tokenizer: how it becomes tokens.
        seq_len: T, length of training windows and, unless `eval_batches` is given another, of
            evaluation blocks; default 256.
        batch_size: windows in a batch and, unless `eval_batches` is given another, lanes in
            evaluation; default 16.
        eval_tokens: targets to score per evaluation; the default, 262,144, takes seconds.
        seed: all randomness of the training data follows from it; evaluation has none. Default 0.
        cache_dir: where prepared tokens are kept: by default `$MNEME_CACHE`, or
            `~/.cache/mneme` if that is not set.
    """

    name = "text"
    monitor = "bits_per_byte"
    monitor_mode: Literal["min", "max"] = "min"
    continues = True

    def __init__(
        self,
        *,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int = 256,
        batch_size: int = 16,
        eval_tokens: int = 262_144,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            vocab_size=tokenizer.vocab_size, seq_len=seq_len, batch_size=batch_size, seed=seed
        )
        self.source = source
        self.tokenizer = tokenizer
        self.eval_tokens = eval_tokens
        self.monitor = "loss" if tokenizer.lossy else "bits_per_byte"
        self.cache_dir = Path(cache_dir) if cache_dir else None

    @cached_property
    def store(self) -> TokenStore:
        """The prepared tokens; made when first asked for."""
        return prepare_store(self.source, self.tokenizer, self.cache_dir)

    def prepare_data(self) -> None:
        """Fills the cache; Lightning calls it in one process of each machine."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokens and checks that there are enough of them.

        Raises:
            ValueError: too few, a document that cannot be read, or one that the tokenizer changes.
        """
        held = self.store.meta.splits["train"].tokens
        if held < self.seq_len + 1:
            raise ValueError(
                f"the train split holds {held} tokens, fewer than one window of seq_len + 1 = "
                f"{self.seq_len + 1}: lower seq_len or give a larger corpus"
            )
        held_out: tuple[EvalSplit, EvalSplit] = ("val", "test")
        for split in held_out:
            self._check_lanes(split, self.seq_len, self.batch_size)
            if not self.store.token_bytes.numpy()[self._scored(split)].any():
                raise ValueError(
                    f"what is scored of the {split} split holds no text: its "
                    f"{self.store.meta.splits[split].files} files are empty, or the first ones; "
                    "leave empty files out of the corpus"
                )

    @property
    def chance_level(self) -> float:
        """`monitor` on the validation text under training frequencies of single tokens."""
        return self._baselines[f"val_unigram_{self.monitor}"]

    @property
    def vocabulary(self) -> str:
        """The tokenizer's fingerprint."""
        return self.store.meta.fingerprint

    def save_tokenizer(self, folder: Path) -> None:
        """Puts the tokenizer's model there, where it has one."""
        self.tokenizer.save(folder)

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """The tokenizer with the vocabulary that a run kept."""
        return self.tokenizer.load(folder)

    def baselines(self, split: EvalSplit) -> dict[str, float]:
        """`monitor`, on the text that is scored, of unigram counts and of two compressors.

        There is no such figure of compressors for a lossy tokenizer: they send all of the text.
        """
        suffix = f"_{self.monitor}"
        named = (name for name in self._baselines if name.startswith(f"{split}_"))
        return {
            name.removeprefix(f"{split}_").removesuffix(suffix): self._baselines[name]
            for name in named
            if name.endswith(suffix)
        }

    @property
    def remark(self) -> str:
        """Why there are no bits per byte, where there are none."""
        if not self.tokenizer.lossy:
            return ""
        lost = self.store.meta.loss
        found = f"in this corpus, {lost}" if lost else "it changes nothing in this corpus"
        return f"no bits per byte, as the tokenizer is declared to be lossy: {found}"

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        meta = self.store.meta
        sizes = {
            f"{split}_{unit}": getattr(size, unit)
            for split, size in meta.splits.items()
            for unit in ("files", "bytes", "tokens")
        }
        return {
            **super().facts(),
            "source": meta.source,
            "corpus_hash": meta.corpus_hash,
            "tokenizer": meta.tokenizer,
            "tokenizer_fingerprint": meta.fingerprint,
            **({"remark": self.remark} if self.remark else {}),
            **sizes,
            **self._baselines,
        }

    def metrics(self) -> Metrics:
        """A fresh accumulator."""
        return TextMetrics(lossless=not self.tokenizer.lossy)

    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed, the index and the corpus."""
        stream = self.store.streams["train"]
        last = len(stream) - self.seq_len
        starts = self.rng("train", index).integers(last, size=self.batch_size)
        windows = stream[starts[:, None] + np.arange(self.seq_len + 1)]  # [B, T + 1]
        tokens = torch.from_numpy(windows.astype(np.int64))
        return self._batch(tokens[:, :-1], tokens[:, 1:])

    def eval_batches(
        self, split: EvalSplit, seq_len: int | None = None, batch_size: int | None = None
    ) -> BatchSet:
        """The fixed text of `split`, as blocks that continue `batch_size` lanes.

        Row b of each batch continues row b of the batch before. Where a lane is not a multiple
        of the block length, or the last lanes are shorter, positions are padded and unscored.

        Args:
            split: `"val"` or `"test"`.
            seq_len: block length, the task's own by default; may be longer than in training.
            batch_size: number of lanes, the task's own by default.
        """
        length = self.seq_len if seq_len is None else seq_len
        lanes = self.batch_size if batch_size is None else batch_size
        self._check_lanes(split, length, lanes)
        return BatchSet(partial(self._blocks, split, length, lanes))

    def scored_tokens(self, split: EvalSplit) -> int:
        """How many targets an evaluation scores; the split's first token is no target."""
        return min(self.eval_tokens, self.store.meta.splits[split].tokens - 1)

    def _scored(self, split: EvalSplit) -> Ids:
        """The targets of an evaluation, in order."""
        return self.store.streams[split][1 : self.scored_tokens(split) + 1].astype(np.int64)

    def _blocks(self, split: EvalSplit, length: int, lanes: int) -> Iterator[Batch]:
        stream, scored = self.store.streams[split], self.scored_tokens(split)
        lane = -(-scored // lanes)  # targets per lane, rounded up: only the last ones are shorter
        starts = lane * np.arange(lanes)[:, None]
        for first in range(0, lane, length):
            step = np.arange(first, first + length)
            place = starts + step  # [B, T] where in the text each input stands
            inputs = stream[np.minimum(place, scored)].astype(np.int64)
            targets = stream[np.minimum(place + 1, scored)].astype(np.int64)
            targets[(step >= lane) | (place >= scored)] = IGNORE
            yield self._batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _batch(self, inputs: Tensor, targets: Tensor) -> Batch:
        scored = targets != IGNORE
        sizes = self.store.token_bytes[targets.clamp(min=0)] * scored
        return Batch(inputs.contiguous(), targets.contiguous(), {"bytes": sizes})

    def _check_lanes(self, split: EvalSplit, length: int, lanes: int) -> None:
        if length < 1 or lanes < 1:
            raise ValueError(f"seq_len ({length}) and batch_size ({lanes}) must be at least 1")
        scored = self.scored_tokens(split)
        if scored < lanes * length:
            held = self.store.meta.splits[split].tokens
            raise ValueError(
                f"{lanes} lanes of at least one block of {length} tokens need {lanes} * {length} "
                f"= {lanes * length} targets, but {scored} are scored in the {split} split (it "
                f"holds {held} tokens; eval_tokens is {self.eval_tokens}): lower batch_size or "
                "seq_len, or give a larger corpus or eval_tokens"
            )

    @cached_property
    def _baselines(self) -> dict[str, float]:
        """What it costs to send the scored text by other means, for each held-out split."""
        held_out: tuple[EvalSplit, EvalSplit] = ("val", "test")
        facts: dict[str, float] = {}
        for split in held_out:
            tokens = self._scored(split)
            nats = unigram_nats(self.store.meta.train_counts, tokens)
            facts[f"{split}_scored_tokens"] = len(tokens)
            if self.tokenizer.lossy:
                facts[f"{split}_unigram_loss"] = nats / len(tokens)
                continue
            text = self.tokenizer.decode_bytes(tokens)
            facts[f"{split}_scored_bytes"] = len(text)
            costs = {"unigram": nats / (math.log(2) * len(text)), **compressed_bits_per_byte(text)}
            facts |= {f"{split}_{name}_bits_per_byte": cost for name, cost in costs.items()}
        return facts
