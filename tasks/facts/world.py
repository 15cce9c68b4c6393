"""Random facts, and the sequences that tell them.

A fact says which object a subject has under a relation. S subjects in each of two phases of
training, R relations, O objects, k letters in a subject's name from an alphabet of A; N facts in a
batch.
"""

from typing import NamedTuple

import numpy as np
import torch

from mneme.tasks.batch import IGNORE, Batch
from mneme.tasks.recall.sampling import Ints, distinct

START = 0  # the token that every sequence begins with
PHASES = 2


class World(NamedTuple):
    """The facts that were drawn. Fact `s * R + r` is that of subject s and relation r.

    Attributes:
        names: `[2S, k]` letters in `[0, A)`, no two rows alike; the first S are the subjects of the
            first phase.
        objects: `[2S, R]` in `[0, O)`.
        alphabet: A.
    """

    names: Ints
    objects: Ints
    alphabet: int


def alphabet_for(subjects: int, letters: int) -> int:
    """A: the smallest alphabet in which 2S names of `letters` letters can differ."""
    names = PHASES * subjects
    alphabet = max(1, int(names ** (1 / letters)) - 1)  # a root in floating point may be too large
    while alphabet**letters < names:
        alphabet += 1
    return alphabet


def make_world(
    rng: np.random.Generator, *, subjects: int, relations: int, objects: int, letters: int
) -> World:
    """Draws 2S different names, and an object for each of 2S * R facts.

    Any set of names is as likely as any other, and every object is drawn evenly by itself. So a
    fact takes log2(O) bits to know, and nothing tells of it but being told: neither the letters of
    its subject nor other facts. The facts of the first phase do not depend on whether a task has a
    second.

    Args:
        rng: the only source of randomness.
        subjects: S.
        relations: R.
        objects: O.
        letters: k.
    """
    alphabet = alphabet_for(subjects, letters)
    codes = distinct(rng, 1, PHASES * subjects, alphabet**letters)[
        0
    ]  # a name, with letters as digits
    names = codes[:, None] // alphabet ** np.arange(letters, dtype=np.int64) % alphabet
    return World(names, rng.integers(objects, size=(PHASES * subjects, relations)), alphabet)


def tell(world: World, facts: Ints) -> Batch:
    """One sequence per fact: the subject's name and the relation, with the object as the label.

    Tokens: 0 begins every sequence; letter c in place j of a name is `1 + j * A + c`, so that a
    model that cannot tell positions apart can read a name; then come R relations and O objects.
    The object is asked for at the relation's position, and the sequence ends there: the object and
    an end mark would follow, but nothing after them is scored. A subject named (2, 0) has object 2
    under relation 1, with A = 4, k = 2, R = 2, O = 3::

        position   0  1  2  3
        inputs     0  3  5 10
        targets    .  .  . 13     (. is IGNORE)

    Args:
        world: the facts.
        facts: `[N]`, which facts to tell.

    Returns:
        A batch of `[N, k + 2]` with the slice `fact`, `[N]`.
    """
    letters, relations = world.names.shape[1], world.objects.shape[1]
    subject, relation = np.divmod(facts, relations)
    first_relation = 1 + letters * world.alphabet
    inputs = np.full((len(facts), letters + 2), START, dtype=np.int64)
    inputs[:, 1:-1] = 1 + np.arange(letters) * world.alphabet + world.names[subject]
    inputs[:, -1] = first_relation + relation
    targets = np.full_like(inputs, IGNORE)
    targets[:, -1] = first_relation + relations + world.objects[subject, relation]
    slices = {"fact": torch.from_numpy(facts)}
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), slices)
