"""Serving a trained model whose memory bank stays on disk."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from mneme.harness.config.build import TARGET, build
from mneme.harness.config.check import Config
from mneme.harness.config.schema import check_config
from mneme.harness.run.checkpoints import (
    checkpoint_config,
    checkpoint_vocabulary,
    model_weights,
    read_checkpoint,
)
from mneme.harness.run.precision import run_precision
from mneme.harness.run.run_directory import RunDirectory, RunError
from mneme.layers import SharedPart
from mneme.layers.bank.memory_bank import BANK
from mneme.models import LanguageModel, generate
from mneme.models.bank import StoredBank, model_hash
from mneme.routers import Router
from mneme.storage.reading import Read
from mneme.tasks.facts.words import Words


class WithoutBlocks(LanguageModel):
    """A model whose bank has sizes but no elements, until `use_part` gives it another."""

    def _make_part(self, places: Sequence[SharedPart]) -> nn.Module:
        if places[0].name != BANK:
            return super()._make_part(places)
        with torch.device("meta"):
            return super()._make_part(places)


@dataclass(frozen=True)
class ServedModel:
    """What it takes to answer prompts.

    Attributes:
        model: reads `bank`.
        precision: the run's, which the model computes in.
        bank: on disk.
        words: of prompts and answers.
        router: of prompts; None if the run kept none.
    """

    model: LanguageModel
    precision: Precision
    bank: StoredBank
    words: Words
    router: Router | None


@dataclass(frozen=True)
class Answer:
    """One prompt, answered.

    Attributes:
        text: the new words.
        route: the leaf that was read, or -1 for the generic block.
        hits: blocks that were in the cache.
        misses: blocks that were read from files.
        fetch: seconds until all blocks were there.
        prefill: seconds of reading the prompt.
        decode: seconds of each word after the first; None if there is only that.
    """

    text: str
    route: int
    hits: int
    misses: int
    fetch: float
    prefill: float
    decode: float | None


def load(
    run: RunDirectory, checkpoint: Path, bank: Path, *, cache_bytes: int, read: Read
) -> ServedModel:
    """A run's model, whose bank is never in memory, and a bank in a folder for it.

    Of the checkpoint, which is mapped, only the other weights are read: neither the blocks that it
    holds as well, nor what the optimizer kept. No task is built and no router is fitted, as the run
    kept its words and its router.

    Args:
        run: where words and router are.
        checkpoint: `last.ckpt`, which has the weights of when the bank was written.
        bank: its folder.
        cache_bytes: for blocks that were read.
        read: how, see `mneme.storage.reading`.

    Raises:
        RunError: the model reads no bank, or the run has no words.
        StorageError: there is no bank, or it was written for another base model or router.
        RouterError: the router is damaged.
    """
    loaded = read_checkpoint(checkpoint, mapped=True)
    words = _words(run, checkpoint_vocabulary(loaded))
    config = checkpoint_config(loaded)
    check_config(config)
    precision = run_precision(config)
    model = _base_model(config, loaded, len(words), precision)
    if BANK not in model.routed:
        raise RunError(f"{checkpoint}: no layer of this model reads a memory bank")
    router = Router.load(run.router) if run.router.exists() else None
    stored = StoredBank(
        bank,
        router=None if router is None else router.hash,
        base_model=model_hash(model),
        cache_bytes=cache_bytes,
        read=read,
        dtype=next(model.parameters()).dtype,
    )
    model.use_part(BANK, stored)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ServedModel(model.to(device).eval(), precision, stored, words, router)


def _words(run: RunDirectory, vocabulary: str) -> Words:
    try:
        words = Words.load(run.path)
    except ValueError as error:
        raise RunError(
            f"{error}; only runs of tasks with words, such as rare_facts, can be served"
        ) from error
    if words.fingerprint != vocabulary:
        raise RunError(f"the words in {run.path} are not those that the model was trained on")
    return words


def _base_model(
    config: Config, checkpoint: dict[str, Any], vocab_size: int, precision: Precision
) -> LanguageModel:
    """The model of a checkpoint; of its bank, nothing is allocated or read."""
    options = build({key: value for key, value in config["model"].items() if key != TARGET})
    model = WithoutBlocks(vocab_size=vocab_size, **options)
    precision.convert_module(model)
    blocks = {name: t for name, t in model.state_dict().items() if name.startswith(f"{BANK}.")}
    model.load_state_dict(model_weights(checkpoint) | blocks)  # which have no elements to copy
    return model


def answer(
    served: ServedModel, prompt: str, *, route: int, tokens: int, temperature: float
) -> Answer:
    """Goes on with a prompt, with the blocks of a route.

    Raises:
        RunError: a word of the prompt is not known, or there is none.
    """
    ids = _ids(served, prompt)
    reads = replace(served.bank.reads)
    model = served.model
    with torch.inference_mode(), served.precision.forward_context():
        state = model.init_state(1, torch.tensor([route], device=ids.device))
        started = _clock(ids.device)
        new, state = generate(model, ids, 1, temperature=temperature, state=state)
        read = _clock(ids.device)
        more, _ = generate(model, new, tokens - 1, temperature=temperature, state=state)
        ended = _clock(ids.device)
    now = served.bank.reads
    return Answer(
        text=served.words.decode(torch.cat([new, more], dim=1)[0].tolist()),
        route=route,
        hits=now.hits - reads.hits,
        misses=now.misses - reads.misses,
        fetch=now.seconds - reads.seconds,
        prefill=read - started,
        decode=(ended - read) / (tokens - 1) if tokens > 1 else None,
    )


def _clock(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _ids(served: ServedModel, prompt: str) -> Tensor:
    try:
        ids = served.words.encode(prompt)
    except ValueError as error:
        raise RunError(f"the prompt {prompt!r}: {error}") from error
    if not len(ids):
        raise RunError("a prompt is empty; give it at least one word")
    return torch.from_numpy(ids)[None].to(next(served.model.parameters()).device)
