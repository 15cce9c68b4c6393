"""Long-tail facts: a few are told all the time, most hardly ever.

S subjects, R relations, O objects, k letters in a subject's name.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from mneme.tasks.base import Batch, BatchSet, EvalSplit, Facts
from mneme.tasks.facts.base import WORLD_STREAM, FactTask, Zipf, require_at_least_one, stream
from mneme.tasks.facts.metrics import Exposures, FactMetrics
from mneme.tasks.facts.world import PHASES, World, alphabet_for, make_world, tell
from mneme.tasks.metrics import Metrics
from mneme.tasks.recall.sampling import Ints


class ZipfFacts(FactTask):
    """S * R random facts to be learnt by heart: see `tell` for the sequences.

    Every example of a training batch is drawn by itself: a subject of rank i = 1 ... S with
    probability proportional to (i + i0) ** -a, and any of the relations. Names are random, so
    letters say nothing about ranks. Evaluation asks for every fact, whether it was told or not: as
    no fact follows from others there is nothing to hold out, and `"val"` and `"test"` are the same.
    The order is random, so a limited number of validation batches is a fair sample.

    A name has several letters because an embedding of whole subjects would be a table of their
    facts. The embedding of objects stores no facts by itself, but a model that ties it to its
    output has fewer parameters; compare models that do the same.

    With `second_phase_after`, training goes on to the facts of S other subjects, as many and as
    frequent, and those of the first are not told again. `accuracy/phase=0` is then what has been
    kept, in the last validation rather than in the one where accuracy over both was best.

    Args:
        subjects: S; default 20,000.
        relations: R; default 2.
        objects: O; default 256.
        power, offset: of the frequencies; see `Zipf`.
        subject_tokens: k; default 2.
        counted_batches: see `FactTask`; default 1000.
        second_phase_after: so many training batches tell the facts of the first phase, those after
            them the facts of the second; by default there is no second.
        batch_size: facts in a batch; default 1024.
        seed: all randomness of the data follows from it; default 0.
    """

    name = "facts"

    def __init__(
        self,
        *,
        subjects: int = 20_000,
        relations: int = 2,
        objects: int = 256,
        power: float = 1.0,
        offset: float = 0.0,
        subject_tokens: int = 2,
        counted_batches: int = 1000,
        second_phase_after: int | None = None,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> None:
        require_at_least_one(subjects=subjects, relations=relations, subject_tokens=subject_tokens)
        if second_phase_after is not None and not 0 < second_phase_after < counted_batches:
            raise ValueError(
                f"second_phase_after ({second_phase_after}) must be from 1 to counted_batches - 1 "
                f"= {counted_batches - 1}, so that both phases are trained on"
            )
        letters = subject_tokens * alphabet_for(subjects, subject_tokens)
        super().__init__(
            zipf=Zipf(subjects, power, offset),
            objects=objects,
            counted_batches=counted_batches,
            vocab_size=1 + letters + relations + objects,
            seq_len=subject_tokens + 2,
            batch_size=batch_size,
            seed=seed,
        )
        self.subjects = subjects
        self.relations = relations
        self.second_phase_after = second_phase_after

    @property
    def phases(self) -> int:
        """How many phases training has."""
        return 1 if self.second_phase_after is None else PHASES

    @cached_property
    def world(self) -> World:
        """The names of all subjects and their facts, of both phases."""
        return make_world(
            stream(self.seed, WORLD_STREAM),
            subjects=self.subjects,
            relations=self.relations,
            objects=self.objects,
            letters=self.seq_len - 2,
        )

    @cached_property
    def exposures(self) -> Exposures:
        """How training tells each fact of its phases, counted over `counted_batches`."""
        one_phase = self.subjects * self.relations
        exposures = self.count_exposures(self.phases * one_phase)
        odds = np.tile(np.repeat(self.zipf.odds / self.relations, self.relations), self.phases)
        phase = torch.arange(self.phases).repeat_interleave(one_phase)
        return Exposures(torch.from_numpy(exposures), torch.from_numpy(odds), phase)

    def draw(self, index: int) -> Ints:
        """The facts that training batch `index` tells, `[N]`."""
        rng = self.rng("train", index)
        subject = self.zipf.draw(rng, self.batch_size)
        second = self.second_phase_after is not None and index >= self.second_phase_after
        subject += self.subjects * second
        return subject * self.relations + rng.integers(self.relations, size=self.batch_size)

    def train_batch(self, index: int) -> Batch:
        """Training batch `index`: a pure function of the seed and the index."""
        return tell(self.world, self.draw(index))

    def eval_batches(self, split: EvalSplit) -> BatchSet:
        """Every fact of every phase once, in an order that is the same for both splits."""

        def batches() -> Iterator[Batch]:
            facts = self.phases * self.subjects * self.relations
            order = self.order(facts)
            for start in range(0, facts, self.batch_size):
                yield tell(self.world, order[start : start + self.batch_size])

        return BatchSet(batches)

    def metrics(self) -> Metrics:
        """A fresh accumulator."""
        return FactMetrics(self.exposures, range(self.vocab_size - self.objects, self.vocab_size))

    def facts(self) -> Facts:
        """What to record with a run, so that its results can be read later."""
        return super().facts() | {
            "relations": self.relations,
            "subject_tokens": self.seq_len - 2,
            "second_phase_after": str(self.second_phase_after),
        }
