"""Routing tokens to memories or experts, and packing each one's tokens into a sequence of its own.

Shapes: B batch, T time, M memories, k memories of a token, L tokens of a packed sequence.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F


class Routes(NamedTuple):
    """Where tokens go.

    Attributes:
        memory: those of each token, the likeliest first, `[B, T, k]`.
        weight: what each counts for; they sum to one over k.
        probability: of every memory, `[B, T, M]`.
    """

    memory: Int[Tensor, "b t k"]
    weight: Float[Tensor, "b t k"]
    probability: Float[Tensor, "b t m"]


def route(logits: Float[Tensor, "b t m"], k: int) -> Routes:
    """The k likeliest memories of each token, with their probabilities renormalised.

    Args:
        logits: of the router, in at least fp32, in which selection and softmax stay.
        k: memories of a token.
    """
    probability = logits.softmax(-1)
    chosen, index = probability.topk(k, dim=-1)
    return Routes(index, chosen / chosen.sum(-1, keepdim=True), probability)


def balance_loss(routes: Routes) -> Tensor:
    """`M sum_m f_m P_m`, f the tokens of m per token and P its mean probability; k when balanced.

    As in "Switch Transformers" (arXiv 2101.03961), with the k choices of a token added up.
    """
    memories = routes.probability.shape[-1]
    return memories * (load(routes) * routes.probability.mean((0, 1))).sum()


def load(routes: Routes) -> Float[Tensor, " m"]:
    """Tokens of each memory per token; they sum to k."""
    return _members(routes.memory, routes.probability.shape[-1]).to(routes.weight).mean((0, 1))


class Packing(NamedTuple):
    """Tokens of a batch sorted into one sequence per memory and row, in the order of time.

    Sequences lie memory by memory: sequence `m * B + b` holds the tokens of row b that go to m,
    padded at its end.

    Attributes:
        token: which token each place holds, as an index into the flat batch, `[M * B, L]`; the
            first of its row where `present` is false, so that no row ever holds another's.
        present: whether a place holds a token.
        place: where each token's k copies lie, as an index into the flat sequences, `[B, T, k]`.
        tokens: number of them in each sequence, `[M * B]`.
    """

    token: Int[Tensor, "mb l"]
    present: Bool[Tensor, "mb l"]
    place: Int[Tensor, "b t k"]
    tokens: Int[Tensor, " mb"]


def pack(index: Int[Tensor, "b t k"], memories: int, *, multiple: int) -> Packing:
    """How to sort tokens by memory.

    A running count of each memory's tokens gives the places, so that time order holds without a
    sort. Sequences are as long as the fullest one, rounded up to a multiple, or T if that is less:
    a length that hardly depends on the routes leaves the rounding of one token's results alone when
    another token goes elsewhere.

    Args:
        index: memories of each token, different from each other.
        memories: M.
        multiple: of which L is one, unless it is T.
    """
    batch, tokens, _ = index.shape
    members = _members(index, memories)
    order = members.cumsum(1) - 1  # [B, T, M], the place of a token if it goes there
    count = members.sum(1)
    length = min(tokens, -(-_fullest(count, index, multiple) // multiple) * multiple)
    sequence = index * batch + torch.arange(batch, device=index.device)[:, None, None]
    place = sequence * length + order.gather(-1, index)
    flat = torch.arange(batch * tokens, device=index.device).view(batch, tokens, 1)
    token = flat[:, 0].repeat(memories, length).flatten()
    token[place.flatten()] = flat.expand_as(place).flatten()
    present = torch.arange(length, device=index.device) < count.mT.reshape(-1, 1)
    return Packing(token.view(-1, length), present, place, count.mT.flatten())


def packed(x: Num[Tensor, "b t d"], packing: Packing) -> Num[Tensor, "mb l d"]:
    """Tokens in their sequences; places without a token hold the first of their row."""
    rows = x.flatten(0, 1).index_select(0, packing.token.flatten())
    return rows.view(*packing.token.shape, x.shape[-1])


def unpacked(
    y: Float[Tensor, "mb l d"], packing: Packing, weight: Float[Tensor, "b t k"]
) -> Float[Tensor, "b t d"]:
    """What each token's k copies have become, weighted and summed."""
    bags = F.embedding_bag(  # gathers, weights and sums in one pass, and so does its gradient
        packing.place.flatten(0, 1),
        y.flatten(0, 1),
        mode="sum",
        per_sample_weights=weight.flatten(0, 1).to(y.dtype),
    )
    return bags.view(*weight.shape[:2], y.shape[-1])


def _fullest(count: Tensor, index: Tensor, multiple: int) -> int:
    """Tokens of the fullest sequence; where tensors hold no numbers, as if loads were even."""
    tokens, copies = index.shape[1:]
    if tokens <= multiple:
        return tokens
    return -(-tokens * copies // count.shape[1]) if count.is_meta else int(count.max())


def _members(index: Tensor, memories: int) -> Tensor:
    """One where a token goes to a memory, `[B, T, M]`."""
    batch, tokens, _ = index.shape
    return index.new_zeros(batch, tokens, memories).scatter_(-1, index, 1)
