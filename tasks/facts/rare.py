"""Rare facts in routed documents: what a hierarchical memory bank is for.

S subjects, R relations, F = S * R facts, O objects, T words of a document, L leaves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mneme.tasks.base import IGNORE, Batch, BatchSet, EvalSplit, Facts
from mneme.tasks.facts.arms import ArmMetrics
from mneme.tasks.facts.base import WORLD_STREAM, FactTask, Zipf, stream
from mneme.tasks.facts.library import (
    LibraryOptions,
    ask_for,
    make_library,
    shortest_document,
    write,
)
from mneme.tasks.facts.metrics import Exposures
from mneme.tasks.facts.routes import Arm, LibraryRoutes, Routes, RoutingOptions, arms_of
from mneme.tasks.facts.words import Words
from mneme.tasks.metrics import Metrics
from mneme.tasks.recall.sampling import Ints


class RareFacts(FactTask):
    """Documents that tell R facts of a subject each, and the route that each is read by.

    Training is language modelling: each sequence is one document (see `write`), about a subject
    of rank i = 1 ... S drawn with probability proportional to (i + i0) ** -a, and every next word
    is scored. So filler words are learnt too, and a fact is one word of some thirty. Evaluation
    asks every fact (see `ask_for`), whether it was told or not, and `"val"` and `"test"` are the
    same: no fact follows from others. The order is random, so a limited number of validation
    batches is a fair sample. After the experiments with rare facts of "Pretraining with
    hierarchical memories: separating long-tail and common knowledge" (arXiv 2510.02375), which has
    web text and the atomic numbers of elements in place of a drawn world.

    **Routes.** `Batch.route` has the leaf of a memory bank for each sequence. `routes` says how
    training makes it:

    - "router": the router's leaf of a document about the same subject, which is drawn once and
      routed before training. So all documents of a subject have one route, that of another text
      than the one in the batch, and questions have no part in it.
    - "topic": an oracle of as many leaves; see `topic_routes`.
    - "random": any leaf, drawn for each document anew. Blocks then hold nothing of their own.
    - "none": no routes; `Batch.route` is None.

    **Arms.** Evaluation asks each fact once under each of `ask`, in the same batch, so that one
    trained model is scored under several routes:

    - "question": the router's leaf of the question's own text, as in use.
    - "document": the leaf that training gave to documents of the subject. An oracle, as a question
      does not say it.
    - "topic": the same for `routes="topic"`.
    - "random": a leaf drawn for each fact.
    - "generic": `NO_ROUTE`. With `routes="none"` it is the only arm, and gives no routes.

    Args:
        library: how many subjects, relations, objects and words there are.
        routing: the tree, and the router. Fitting takes about a second, when first asked for.
        routes: of training; default "router".
        ask: the arms; the first is the one that `accuracy` is of. By default one: "question",
            "topic", "random" or "generic", in the order of `routes` above.
        power, offset: of the frequencies; see `Zipf`.
        counted_batches: see `FactTask`; default 1000.
        document_words: T, default 33. A training sequence reads all words but the last, so
            `seq_len` is T - 1.
        batch_size: documents in a training batch, and about so many questions in one of
            evaluation; default 128.
        seed: all randomness of the data follows from it, the router's too; default 0.

    Raises:
        ValueError: an option is out of range, or documents are too short for their facts.
    """

    name = "rare_facts"

    def __init__(
        self,
        *,
        library: LibraryOptions | None = None,
        routing: RoutingOptions | None = None,
        routes: Routes = "router",
        ask: Sequence[Arm] | None = None,
        power: float = 1.0,
        offset: float = 0.0,
        counted_batches: int = 1000,
        document_words: int = 33,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        options = library or LibraryOptions()
        needed = shortest_document(options.relations)
        if document_words < needed:
            raise ValueError(
                f"document_words ({document_words}) must be at least {needed}, which the "
                f"{options.relations} facts of a document can take"
            )
        super().__init__(
            zipf=Zipf(options.subjects, power, offset),
            objects=options.objects,
            counted_batches=counted_batches,
            vocab_size=options.vocab_size,
            seq_len=document_words - 1,
            batch_size=batch_size,
            seed=seed,
        )
        self.options = options
        self.arms = arms_of(ask, routes)
        self.library = make_library(stream(seed, WORLD_STREAM), options)
        self.document_words = document_words
        tree = routing or RoutingOptions()
        self.routing = LibraryRoutes(
            self.library, routes, tree, document_words=document_words, seed=seed
        )
        self.leaves = None if routes == "none" else tree.leaves

    @property
    def tokenizer(self) -> Words:
        """From text to token ids and back."""
        return self.library.words

    @property
    def vocabulary(self) -> str:
        """A hash of all words."""
        return self.tokenizer.fingerprint

    def save_tokenizer(self, folder: Path) -> None:
        """Writes `words.txt` and, if training has a router's routes, the router to `router/`."""
        self.tokenizer.save(folder)
        if self.router is not None:
            self.routing.router.save(folder / "router")

    def load_tokenizer(self, folder: Path) -> Words:
        """The words that a run kept."""
        return Words.load(folder)

    @property
    def router(self) -> str | None:
        """The hash of the router, if training has its routes."""
        return self.routing.router.hash if self.routing.kind == "router" else None

    @cached_property
    def exposures(self) -> Exposures:
        """How training tells each fact, counted over `counted_batches`."""
        relations = self.options.relations
        facts = self.options.subjects * relations
        return Exposures(
            times=torch.from_numpy(self.count_exposures(facts)),
            odds=torch.from_numpy(np.repeat(self.zipf.odds, relations)),
            phase=torch.zeros(facts, dtype=torch.int64),
        )

    def draw(self, index: int) -> Ints:
        """The facts that training batch `index` tells: all of each subject, `[batch_size * R]`."""
        subjects = self.zipf.draw(self.rng("train", index), self.batch_size)
        relations = self.options.relations
        return (subjects[:, None] * relations + np.arange(relations)).reshape(-1)

    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed and the index."""
        rng = self.rng("train", index)
        subjects = self.zipf.draw(rng, self.batch_size)  # as in `draw`
        text = torch.from_numpy(write(self.library, rng, subjects, self.document_words))
        route = self.routing.of_documents(subjects, rng)
        return Batch(
            inputs=text[:, :-1].contiguous(),
            targets=text[:, 1:].contiguous(),
            slices={"subject": torch.from_numpy(subjects)},
            route=None if route is None else torch.from_numpy(route),
        )

    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """Every fact once under each arm, in an order that is the same for both splits."""

        def batches() -> Iterator[Batch]:
            order = self.order(len(self.exposures.times))
            each = max(1, self.batch_size // len(self.arms))
            for start in range(0, len(order), each):
                yield self.question(order[start : start + each])

        return BatchSet(batches)

    def question(self, facts: Ints) -> Batch:
        """Asks for facts `[N]` under each arm, arm after arm; the slices are `fact` and `arm`."""
        arms = len(self.arms)
        said, answers = ask_for(self.library, facts)
        inputs = torch.from_numpy(said).repeat(arms, 1)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1] = torch.from_numpy(answers).repeat(arms)
        slices = {
            "fact": torch.from_numpy(facts).repeat(arms),
            "arm": torch.arange(arms).repeat_interleave(len(facts)),
        }
        route = (
            None
            if self.leaves is None
            else torch.from_numpy(self._question_routes[:, facts].reshape(-1))
        )
        return Batch(inputs, targets, slices, route)

    @cached_property
    def _question_routes(self) -> Ints:
        """`[arms, F]`: the leaf of each question."""
        return np.stack([self.routing.of_questions(arm) for arm in self.arms])

    def metrics(self) -> Metrics:
        """A fresh accumulator."""
        objects = range(self.vocab_size - self.objects, self.vocab_size)
        return ArmMetrics(self.exposures, objects, self.arms)

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        world = asdict(self.options)
        return super().facts() | world | self.routing.facts() | {"ask": " ".join(self.arms)}
