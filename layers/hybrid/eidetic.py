"""Eidetic memory: a bounded number of tokens kept word for word, the worst predicted of all."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mneme.layers.hybrid.key_sets import Blocks, KeySet
from mneme.ops.innovation import best_so_far, innovation


class EideticState(NamedTuple):
    """What is kept, and what decides on the rest.

    Attributes:
        tokens: `[B, N, 2, G, K]`, keys and values, the worst predicted first; N grows up to E.
        score: theirs, `[B, N]`.
        waiting: scores `[B, S]` of the tokens that may yet be kept: those of the current block and
            the one before.
        predictor: the memory `[B, G, K, K]` of `ops/innovation.py`.
    """

    tokens: Float[Tensor, "b n two g k"]
    score: Float[Tensor, "b n"]
    waiting: Float[Tensor, "b s"]
    predictor: Float[Tensor, "b g k k"]


def nothing_kept(like: Float[Tensor, "b s two g k"]) -> EideticState:
    """The state before the first of tokens like those given."""
    batch, _, _, heads, width = like.shape
    score = like.new_zeros(batch, 0, dtype=torch.promote_types(like.dtype, torch.float32))
    return EideticState(like[:, :0], score, score, score.new_zeros(batch, heads, width, width))


def still_waiting(tokens: int, window: int) -> int:
    """Of the tokens since some block began, how many are in the current block or the one before."""
    return tokens if tokens < window else window + tokens % window


def number_kept(seq_len: int, window: int, limit: int) -> int:
    """Tokens kept after `seq_len`: of all blocks but the last two, up to the limit."""
    return min(limit, max(0, seq_len // window - 1) * window)


def scored(
    state: EideticState, k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t g k"]
) -> EideticState:
    """Scores new tokens, by keys without positions and values; they wait."""
    score, predictor = innovation(k, v, state.predictor)
    return state._replace(waiting=torch.cat([state.waiting, score], 1), predictor=predictor)


def select(
    state: EideticState, tokens: Float[Tensor, "b s two g k"], blocks: Blocks, limit: int
) -> tuple[KeySet, EideticState]:
    """What the queries of each block find kept, and the state after the last new token.

    Where block b begins, the tokens of block b - 2 compete with those that are kept.

    Args:
        state: with the scores of all `tokens`.
        tokens: keys and values of those that waited and of the new ones.
        blocks: where the new ones lie.
        limit: E, tokens to keep.
    """
    window, carried, waiting = blocks.window, state.tokens.shape[1], state.waiting
    state = state._replace(waiting=waiting[:, -still_waiting(tokens.shape[1], window) :])
    if not blocks.begun:
        visible = waiting.new_ones(1, blocks.length, carried, dtype=torch.bool)
        return KeySet(state.tokens[:, None].to(tokens.dtype), visible), state
    missing = window + blocks.place + blocks.length - tokens.shape[1]  # w in a text's first block
    rivals = F.pad(waiting, (missing, 0), value=-torch.inf)[:, : blocks.begun * window]
    place, score = best_so_far(
        F.pad(state.score, (0, limit - carried), value=-torch.inf),
        rivals.unflatten(1, (blocks.begun, window)),
    )
    gap = tokens.new_zeros(len(tokens), limit - carried + missing, *tokens.shape[2:])
    source = torch.cat([state.tokens.to(tokens.dtype), gap, tokens], 1)
    found = KeySet(
        _gathered(source, place[:, : blocks.number]),
        _filled(blocks, carried, missing, limit, tokens.device),
    )
    last = min(limit, carried + max(0, blocks.begun * window - missing))
    kept = _gathered(source, place[:, -1:, :last])[:, 0]
    return found, state._replace(tokens=kept, score=score[:, -1, :last])


def _filled(
    blocks: Blocks, carried: int, missing: int, limit: int, device: torch.device
) -> Bool[Tensor, "n w e"]:
    """Which places hold a token, the same for all queries of a block."""
    came = torch.arange(blocks.number, device=device) * blocks.window - missing
    filled = torch.arange(limit, device=device) < carried + came.clamp(min=0)[:, None]
    return filled[:, None].expand(-1, blocks.positions(device).shape[1], -1)


def _gathered(
    source: Float[Tensor, "b s two g k"], place: Int[Tensor, "b n e"]
) -> Float[Tensor, "b n e two g k"]:
    """The tokens of `source` that stand at `place`."""
    index = place.flatten(1)[..., None, None, None].expand(-1, -1, *source.shape[2:])
    return source.gather(1, index).unflatten(1, place.shape[1:])
