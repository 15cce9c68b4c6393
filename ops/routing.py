"""Routing tokens to memories or experts, and sorting them by where they go.

Tokens of a memory are dispatched to a sequence of its own (`plan_dispatch`), since their order
counts. For experts, which see each token alone, the copies of all tokens are sorted into one ragged
group per expert (`group`).

Shapes: B batch, T time, M memories (or experts), k memories of a token, L tokens of a packed
sequence, N tokens of a flat batch, C copies of tokens, R rows that hold copies or padding.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from mneme.ops.contract import without_autocast


@without_autocast
def router_logits(
    x: Float[Tensor, "b t d"], weight: Float[Tensor, "m d"]
) -> Float[Tensor, "b t m"]:
    """A router's linear layer in at least fp32, whatever the precision of its input and weight."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))


class Routes(NamedTuple):
    """Where tokens go.

    Attributes:
        memory: those of each token, the likeliest first, `[B, T, k]`.
        weight: what each counts for; they sum to one over k if renormalized.
        probability: of every memory, `[B, T, M]`.
    """

    memory: Int[Tensor, "b t k"]
    weight: Float[Tensor, "b t k"]
    probability: Float[Tensor, "b t m"]


def route(logits: Float[Tensor, "b t m"], k: int, *, renormalize: bool = True) -> Routes:
    """The k likeliest memories of each token, with their probabilities as weights.

    Args:
        logits: of the router, in at least fp32, in which selection and softmax stay.
        k: memories of a token.
        renormalize: divide the weights of a token by their sum.
    """
    probability = logits.softmax(-1)
    weight, index = probability.topk(k, dim=-1)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    return Routes(index, weight, probability)


def spread(routes: Routes) -> Float[Tensor, "b t m"]:
    """Weights of all memories, zero where a token does not go."""
    return torch.zeros_like(routes.probability).scatter(-1, routes.memory, routes.weight)


def balance_loss(routes: Routes) -> Tensor:
    """`M sum_m f_m P_m`, f the tokens of m per token and P its mean probability; k when balanced.

    As in "Switch Transformers" (arXiv 2101.03961), with the k choices of a token added up.
    """
    memories = routes.probability.shape[-1]
    return memories * (load(routes) * mean_over_tokens(routes.probability)).sum()


def load(routes: Routes) -> Float[Tensor, " m"]:
    """Tokens of each memory per token; they sum to k."""
    members = _members(routes.memory, routes.probability.shape[-1])
    return mean_over_tokens(members.to(routes.weight))


def z_loss(logits: Float[Tensor, "b t m"]) -> Tensor:
    """Mean squared log partition of a router's logits, of "ST-MoE" (arXiv 2202.08906)."""
    return mean_over_tokens(logits.logsumexp(-1).square())


def router_telemetry(routes: Routes) -> dict[str, Tensor]:
    """How evenly a router loads the memories, and how sure it is of its choices.

    `load_max` and `load_min` are the shares of all choices that go to the fullest and the emptiest
    memory; `router_entropy` is the mean entropy of the probabilities, in nats.
    """
    share = load(routes) / routes.memory.shape[-1]
    probability = routes.probability.detach()
    entropy = -mean_over_tokens(torch.special.xlogy(probability, probability).sum(-1))
    return {"load_max": share.max(), "load_min": share.min(), "router_entropy": entropy}


def mean_over_tokens(x: Float[Tensor, "b t *m"]) -> Float[Tensor, "*m"]:
    """The mean over batch and time; zeros where there is no token."""
    return x.sum((0, 1)) / max(1, x.shape[0] * x.shape[1])


class Dispatch(NamedTuple):
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


def plan_dispatch(index: Int[Tensor, "b t k"], memories: int, *, multiple: int) -> Dispatch:
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
    return Dispatch(token.view(-1, length), present, place, count.mT.flatten())


def dispatch(x: Num[Tensor, "b t d"], plan: Dispatch) -> Num[Tensor, "mb l d"]:
    """Tokens in their sequences; places without a token hold the first of their row."""
    rows = x.flatten(0, 1).index_select(0, plan.token.flatten())
    return rows.view(*plan.token.shape, x.shape[-1])


def combine(
    y: Float[Tensor, "mb l d"], plan: Dispatch, weight: Float[Tensor, "b t k"]
) -> Float[Tensor, "b t d"]:
    """What each token's k copies have become, weighted and summed."""
    bags = F.embedding_bag(  # gathers, weights and sums in one pass, and so does its gradient
        plan.place.flatten(0, 1),
        y.flatten(0, 1),
        mode="sum",
        per_sample_weights=weight.flatten(0, 1).to(y.dtype),
    )
    return bags.view(*weight.shape[:2], y.shape[-1])


class Groups(NamedTuple):
    """Copies of tokens sorted by expert, those of an expert in the order of tokens.

    Attributes:
        token: which token each row holds, `[R]`; the first where a row is padding.
        place: the row of each copy, in the order of tokens, `[C]`.
        offset: where the copies of each token begin in `place`, `[N]`.
        rows: of each expert, padding included; they sum to R.
    """

    token: Int[Tensor, " r"]
    place: Int[Tensor, " c"]
    offset: Int[Tensor, " n"]
    rows: list[int]


def group(
    expert: Int[Tensor, " c"], copies: Int[Tensor, " n"], experts: int, *, multiple: int
) -> Groups:
    """How to sort copies of tokens by expert, without a limit on how many an expert takes.

    On a GPU this waits for the device once, to learn the sizes of the groups. Where tensors hold no
    numbers (the meta device), loads are taken to be even.

    Args:
        expert: of each copy, the copies of a token next to each other, in the order of tokens.
        copies: of each token; they sum to C.
        experts: M.
        multiple: the rows of an expert are padded to a multiple of this: kernels of matrix products
            treat the rows of an incomplete tile by other sums, and the rounding of one token's
            result would depend on how many others go to its expert.
    """
    count = expert.new_zeros(experts).scatter_add_(0, expert, torch.ones_like(expert))
    padded = -(-count // multiple) * multiple
    rows = _even(len(expert), experts) if expert.is_meta else padded.tolist()
    shift = (padded.cumsum(0) - padded) - (count.cumsum(0) - count)  # of an expert, by padding
    order = expert.argsort(stable=True)  # copies, expert by expert
    place = torch.empty_like(expert)
    place[order] = torch.arange(len(expert), device=expert.device) + shift[expert[order]]
    tokens = torch.arange(len(copies), device=expert.device)
    token = expert.new_zeros(sum(rows))
    token[place] = tokens.repeat_interleave(copies, output_size=len(expert))
    return Groups(token, place, copies.cumsum(0) - copies, rows)


def grouped(x: Float[Tensor, "n d"], groups: Groups) -> Float[Tensor, "r d"]:
    """Tokens in the rows of their experts."""
    return x.index_select(0, groups.token)


def ungrouped(
    y: Float[Tensor, "r d"], groups: Groups, weight: Float[Tensor, " c"]
) -> Float[Tensor, "n d"]:
    """What the copies of each token have become, weighted and summed; zero without any."""
    return F.embedding_bag(  # gathers, weights and sums in one pass, and so does its gradient
        groups.place, y, groups.offset, mode="sum", per_sample_weights=weight.to(y.dtype)
    )


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


def _even(copies: int, experts: int) -> list[int]:
    """Rows of each expert if loads are even and nothing is padded."""
    each, left = divmod(copies, experts)
    return [each + (expert < left) for expert in range(experts)]
