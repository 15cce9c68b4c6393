"""A trained run as a thing to use from a program or a notebook."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

from mneme.harness.config.build import build
from mneme.harness.config.check import Config
from mneme.harness.config.schema import check_config
from mneme.harness.evaluate.evaluation import restore_model
from mneme.harness.run.checkpoints import checkpoint_config, checkpoint_vocabulary, read_checkpoint
from mneme.harness.run.precision import run_precision
from mneme.harness.run.run_directory import RunDirectory, RunError, find_run
from mneme.layers import NO_ROUTE
from mneme.models import LanguageModel, generate
from mneme.routers import Router
from mneme.tasks.base import Codec, Task

_LONGEST_CHARACTER = 4  # bytes of UTF-8, each of which may be a token


class Sampling(TypedDict, total=False):
    """How tokens are drawn, see `LoadedRun.stream`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    route: int | None


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what its tokens mean.

    Attributes:
        directory: the run's files.
        config: the run's, complete.
        model: in evaluation mode, on its device, with weights in the run's type.
        precision: the run's, to compute in: `with run.precision.forward_context(): ...`.
        tokenizer: from text to ids and back; None where tokens are symbols without a text.
        router: of prompts, if the run kept one.
    """

    directory: RunDirectory
    config: Config
    model: LanguageModel
    precision: Precision
    tokenizer: Codec | None
    router: Router | None

    def generate(self, prompt: str, max_new_tokens: int = 100, **sampling: Unpack[Sampling]) -> str:
        """The text that the model goes on with, without the prompt; arguments as of `stream`."""
        return "".join(self.stream(prompt, max_new_tokens, **sampling))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        route: int | None = None,
    ) -> Iterator[str]:
        """The text that the model goes on with, in pieces of whole characters as they come.

        Args:
            prompt: any text of the run's tokenizer; empty for the beginning of a document.
            max_new_tokens: at most so many; a document that ends, ends sooner.
            temperature: 0 for the likeliest token, see `mneme.models.generate`.
            top_k: sample among the k likeliest tokens.
            top_p: sample among the fewest tokens whose probabilities sum to at least this.
            seed: draws the same text again; by default torch's random state goes on.
            route: leaf of the memory bank, or -1 for its generic block; by default the run's
                router decides. Models without a bank have none.

        Raises:
            RunError: the run's tokens have no text, or the prompt or route does not fit the run.
            ValueError: a number outside its range.
        """
        tokens = self._encode(prompt)
        state = self.model.init_state(1, self._route(prompt, route))
        device = tokens.device
        random = None if seed is None else torch.Generator(device).manual_seed(seed)
        decoder = _Decoder(self._codec(), tokens[0, -1:].tolist())
        for _ in range(max_new_tokens):
            with self.precision.forward_context():
                tokens, state = generate(
                    self.model,
                    tokens,
                    1,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    state=state,
                    generator=random,
                )
            token = int(tokens)
            if token == self._codec().end_of_document:
                break
            yield decoder.add(token)
        yield decoder.rest()

    def _codec(self) -> Codec:
        if self.tokenizer is None:
            raise RunError(
                f"{self.directory.path}: tokens of {self.config['task']['_target_']} are symbols, "
                "not text; give ids to mneme.models.generate(run.model, ids, max_new_tokens)"
            )
        return self.tokenizer

    def _encode(self, prompt: str) -> Tensor:
        codec = self._codec()
        try:
            ids = codec.encode(prompt).tolist()
        except ValueError as error:
            raise RunError(f"the prompt {prompt!r}: {error}") from error
        if not ids and codec.end_of_document is not None:
            ids = [codec.end_of_document]
        if not ids:
            raise RunError("the prompt is empty; give it at least one word")
        return torch.tensor([ids], device=next(self.model.parameters()).device)

    def _route(self, prompt: str, given: int | None) -> Tensor | None:
        if not self.model.routed:
            if given is not None:
                raise RunError(
                    f"route: no layer of the model of {self.directory.path} follows one; those of "
                    "ffn=bank do"
                )
            return None
        if given is None:
            given = NO_ROUTE if self.router is None else int(self.router.route([prompt])[0])
        for name, part in self.model.routed.items():
            if not NO_ROUTE <= given < part.leaves:
                raise RunError(
                    f"route {given}: the {name} has leaves 0 to {part.leaves - 1}, or {NO_ROUTE} "
                    "for a sequence without a route"
                )
        return torch.tensor([given], device=next(self.model.parameters()).device)


class _Decoder:
    """Text from ids that come one by one: what a piece says may depend on its neighbors.

    A character may be several tokens, and words have a space between them, so a piece is what the
    text grows by when its tokens are added to those before.
    """

    def __init__(self, codec: Codec, before: list[int]) -> None:
        self._codec, self._before = codec, before
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """What can be said with another token: nothing while a character lacks bytes."""
        self._held.append(token)
        text = self._codec.decode(self._before + self._held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < _LONGEST_CHARACTER:
            return ""
        return self.rest()

    def rest(self) -> str:
        """What was held back, although it may not be whole."""
        known = self._codec.decode(self._before)
        text = self._codec.decode(self._before + self._held)[len(known) :]
        self._before, self._held = (self._held or self._before), []
        return text


def load(
    run: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str | torch.device | None = None,
) -> LoadedRun:
    """See `mneme.load`."""
    directory, file = find_run(run)
    if checkpoint not in ("best", "last"):
        raise RunError(f"checkpoint: expected 'best' or 'last', got {checkpoint!r}")
    file = file or getattr(directory, checkpoint)
    loaded = read_checkpoint(file)
    config = checkpoint_config(loaded)
    check_config(config)
    model = restore_model(config, loaded)
    task: Task = build(config["task"])
    try:
        tokenizer = task.load_tokenizer(directory.path)
    except ValueError as error:
        raise RunError(f"{directory.path}: {error}") from error
    if tokenizer is not None and checkpoint_vocabulary(loaded) != tokenizer.fingerprint:
        raise RunError(f"{directory.path}: its vocabulary is not that of {file.name}")
    return LoadedRun(
        directory=directory,
        config=config,
        model=model if device is None else model.to(device),
        precision=run_precision(config),
        tokenizer=tokenizer,
        router=Router.load(directory.router) if directory.router.exists() else None,
    )
