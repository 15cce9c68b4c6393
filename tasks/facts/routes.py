"""Which leaf of a memory bank a document or a question reads.

S subjects, R relations, F facts, L leaves, N documents, T words of each.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from mneme.routers import Clustering, HashedTfidf, Router, report
from mneme.tasks.base import Facts
from mneme.tasks.batch import NO_ROUTE
from mneme.tasks.facts.base import DOCUMENT_STREAM, ROUTE_STREAM, require_at_least_one, stream
from mneme.tasks.facts.library import Library, ask_for, write
from mneme.tasks.recall.sampling import Ints

Routes = Literal["router", "topic", "random", "none"]
Arm = Literal["question", "document", "topic", "random", "generic"]

# The arms that mean something to a model trained under each kind of routes, the default first. The
# leaves of a router and of the topics are numbered differently, so neither fits the other's bank.
ARMS: dict[Routes, tuple[Arm, ...]] = {
    "router": ("question", "document", "random", "generic"),
    "topic": ("topic", "random", "generic"),
    "random": ("random", "generic"),
    "none": ("generic",),
}


@dataclass(frozen=True)
class RoutingOptions:
    """The tree whose leaves are routes, and the router that is fitted to documents.

    Attributes:
        branching: k, children of each node; at least 2.
        depth: p, levels; there are k ** p leaves.
        components: elements of a text's vector at most. With about as many as there are surnames,
            leaves tell the surnames of a topic apart.
        texts: the router is fitted to documents of at most so many subjects, the first by rank.
        balance: while the router is fitted, a node with more than so many times its even share of
            texts is split. HMB has 1.5. With it k-means ended in three seeds of 34 with two fields
            in a node, so that most questions missed their documents; with 1.2 in none.
        folder: a router that was saved, as in a run's `router/`, to use instead of fitting one.
            Another machine may round otherwise, and then fits a router with another hash.

    Raises:
        ValueError: an option is out of range.
    """

    branching: int = 4
    depth: int = 3
    components: int = 160
    texts: int = 4000
    balance: float = 1.2
    folder: str | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.branching < 2:
            raise ValueError(f"branching ({self.branching}) must be at least 2")
        require_at_least_one(depth=self.depth, components=self.components, texts=self.texts)
        if not 1 < self.balance <= self.branching:
            raise ValueError(
                f"balance ({self.balance}) must be above 1 and at most branching "
                f"({self.branching}), which is no limit"
            )

    @property
    def leaves(self) -> int:
        """L = branching ** depth."""
        return int(self.branching**self.depth)


class LibraryRoutes:
    """The routes of a library's documents in training, and of questions under each arm.

    `RareFacts` says what the kinds and the arms are. A subject's document is drawn once, in a
    random stream of its own, when a route is first asked for; then the router is fitted and used.

    Args:
        library: what documents are about.
        kind: of training's routes.
        options: the tree and the router.
        document_words: T.
        seed: of documents, of the router and of what is drawn.
    """

    def __init__(
        self,
        library: Library,
        kind: Routes,
        options: RoutingOptions,
        *,
        document_words: int,
        seed: int,
    ) -> None:
        self.library = library
        self.kind = kind
        self.options = options
        self.document_words = document_words
        self.seed = seed

    @cached_property
    def documents(self) -> list[str]:
        """The text of one document about each subject, S of them."""
        subjects = np.arange(len(self.library.topic))
        rng = stream(self.seed, DOCUMENT_STREAM)
        return self._texts(write(self.library, rng, subjects, self.document_words))

    @cached_property
    def router(self) -> Router:
        """Fitted to the documents of the first subjects, by rank, or the one that was saved.

        Raises:
            ValueError: the saved one cannot be read, or has another tree.
        """
        options = self.options
        if options.folder is not None:
            return _load(options.folder, options)
        return Router.fit(
            self.documents[: options.texts],
            embedder=HashedTfidf(components=options.components, seed=self.seed),
            branching=options.branching,
            depth=options.depth,
            seed=self.seed,
            clustering=Clustering(limit=options.balance / options.branching),
        )

    @cached_property
    def of_subjects(self) -> Ints:
        """`[S]`: the leaf of all documents about a subject, where the kind gives them one."""
        if self.kind == "router":
            return self.router.route(self.documents)
        assert self.kind == "topic"
        return topic_routes(self.library, self.options.leaves)

    def of_documents(self, subjects: Ints, rng: np.random.Generator) -> Ints | None:
        """`[N]`: the leaves of training documents about these subjects; None if there are none."""
        if self.kind == "none":
            return None
        if self.kind == "random":
            return rng.integers(self.options.leaves, size=len(subjects))
        return self.of_subjects[subjects]

    def of_questions(self, arm: Arm) -> Ints:
        """`[F]`: the leaf of each fact's question under an arm that fits the kind."""
        subjects, relations = self.library.objects.shape
        facts = subjects * relations
        if arm == "generic":
            return np.full(facts, NO_ROUTE, dtype=np.int64)
        if arm == "random":
            return stream(self.seed, ROUTE_STREAM).integers(self.options.leaves, size=facts)
        if arm == "question":
            return self.router.route(self._texts(ask_for(self.library, np.arange(facts))[0]))
        return np.repeat(self.of_subjects, relations)

    def facts(self) -> Facts:
        """What to record with a run: for a router also how well it works.

        `route_agreement_level1` is the share of facts whose question has the node of level 1 that
        the documents of its subject have: a fact that is learnt in a node's block is out of reach
        of other questions. `leaf_share_largest` is the share of subjects in the fullest leaf.
        """
        options = {
            f"routing_{name}": value
            for name, value in asdict(self.options).items()
            if name != "folder"
        }
        if self.kind != "router":
            return {"routes": self.kind, **options}
        found = report(
            self.of_questions("document"),
            branching=self.options.branching,
            depth=self.options.depth,
            others=self.of_questions("question"),
        )
        agreement = enumerate(found.agreement or (), start=1)
        return {
            "routes": self.kind,
            **options,
            "router": self.router.hash,
            **{f"route_agreement_level{level}": share for level, share in agreement},
            "leaf_share_largest": found.levels[-1].largest,
            "leaf_share_smallest": found.levels[-1].smallest,
        }

    def _texts(self, ids: Ints) -> list[str]:
        return [self.library.words.decode(row) for row in ids.tolist()]


def _load(folder: str, options: RoutingOptions) -> Router:
    router = Router.load(folder)
    if (router.branching, router.depth) != (options.branching, options.depth):
        raise ValueError(
            f"the router in {folder} has {router.branching} children at each of {router.depth} "
            f"levels; set branching={router.branching} and depth={router.depth}, not "
            f"{options.branching} and {options.depth}"
        )
    return router


def topic_routes(library: Library, leaves: int) -> Ints:
    """The leaf of each subject, `[S]`, from its topic and names rather than from a text.

    Subjects stand in the order of their topics, then surnames, then given names, and leaves are
    stretches of that order that are as long as each other, up to one subject. So the subjects of a
    topic are together as far up the tree as they fill it: each of 16 topics has a node of level 2
    for itself where branching is 4.
    """
    given, surname = library.names.T
    routes = np.empty(len(given), dtype=np.int64)
    order = np.lexsort((given, surname, library.topic))
    routes[order] = np.arange(len(given)) * leaves // len(given)
    return routes


def arms_of(ask: Sequence[Arm] | None, routes: Routes) -> tuple[Arm, ...]:
    """The arms to ask under, checked; by default the first that fits the routes.

    Raises:
        ValueError: there are none, one stands there twice, or one does not fit.
    """
    fitting = ARMS[routes]
    if ask is None:
        return fitting[:1]
    if not ask or len(set(ask)) < len(ask):
        raise ValueError(f"ask ({list(ask)}) must name one arm or more, each once")
    if wrong := [arm for arm in ask if arm not in fitting]:
        raise ValueError(
            f"ask names {wrong[0]!r}, but with routes={routes!r} a fact can be asked under "
            f"{', '.join(fitting)}: training knows no other leaves"
        )
    return tuple(ask)
