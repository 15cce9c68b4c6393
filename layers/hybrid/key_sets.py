"""Attention whose keys are of several sets, each seen through a window of its own.

The text is cut into blocks of w queries, each of which meets the keys that its queries can see.
Positions count from the first new token: what is carried from earlier calls has negative ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mneme.ops.contract import masked_attention


class KeySet(NamedTuple):
    """Keys and values that the queries of each block may see.

    Attributes:
        tokens: `[B, N, S, 2, G, K]`, S keys and their values for each of N blocks.
        visible: which of them each query sees, `[N, W, S]`.
    """

    tokens: Float[Tensor, "b n s two g k"]
    visible: Bool[Tensor, "n w s"]


@dataclass(frozen=True)
class Blocks:
    """How new tokens lie in blocks.

    A single block holds the new tokens alone; several are whole, filled up at both ends.

    Attributes:
        window: w, tokens of a block.
        place: tokens of the first block that came before.
        length: new tokens.
    """

    window: int
    place: int
    length: int

    @property
    def number(self) -> int:
        """Blocks N that hold new tokens; one if there are none."""
        return max(1, -(-(self.place + self.length) // self.window))

    @property
    def begun(self) -> int:
        """Blocks that begin after the first new token, up to the one of the next call."""
        return (self.place + self.length) // self.window

    def queries(self, q: Float[Tensor, "b t h k"]) -> Float[Tensor, "b n w h k"]:
        """The new tokens' queries by block."""
        if self.number == 1:
            return q[:, None]
        end = self.number * self.window - self.place - self.length
        q = F.pad(q, (0, 0, 0, 0, self.place, end))
        return q.unflatten(1, (self.number, self.window))

    def joined(self, y: Float[Tensor, "b n w d"]) -> Float[Tensor, "b t d"]:
        """What blocks gave, for the new tokens alone."""
        start = 0 if self.number == 1 else self.place
        return y.flatten(1, 2)[:, start : start + self.length]

    def positions(self, device: torch.device) -> Int[Tensor, "n w"]:
        """Positions of the queries by block, from the first new token; negative before it."""
        if self.number == 1:
            return torch.arange(self.length, device=device)[None]
        start = -self.place
        positions = torch.arange(start, start + self.number * self.window, device=device)
        return positions.unflatten(0, (self.number, self.window))

    def seen(self, tokens: Float[Tensor, "b s two g k"], lag: int = 0) -> KeySet:
        """Of carried and new tokens, the w that are `lag` tokens old and older.

        Args:
            tokens: keys and values of carried tokens, then of the new ones.
            lag: age of the youngest token that a query sees; 0 for its own.
        """
        carried, window, device = tokens.shape[1] - self.length, self.window, tokens.device
        if self.number == 1:
            start = max(-carried, 1 - lag - window)
            stop = max(start, self.length - lag)
            at = torch.arange(start, stop, device=device)[None]
            keys = tokens[:, None, carried + start : carried + stop]
        else:
            start = -self.place - lag - window
            size = (self.number + 1) * window
            before, after = -carried - start, start + size - self.length
            at = _in_pairs(torch.arange(start, start + size, device=device), 0, window)
            keys = _in_pairs(F.pad(tokens, (*(0,) * 6, before, after)), 1, window)
        age = self.positions(device)[..., None] - at[:, None]
        known = at[:, None] >= -carried
        return KeySet(keys, (age >= lag) & (age < lag + window) & known)


def attend(q: Float[Tensor, "b n w h k"], sets: Sequence[KeySet]) -> Float[Tensor, "b n w hk"]:
    """One softmax over all sets; every query must see a key.

    Query head h reads key head h // (H / G). Rows of the batch are heads of one call, since what
    is visible is the same for all.
    """
    tokens = torch.cat([s.tokens for s in sets], 2)
    visible = torch.cat([s.visible for s in sets], -1)
    k, v = rearrange(tokens, "b n s two g k -> two n (b g) s k")
    y = masked_attention(rearrange(q, "b n w h k -> n (b h) w k"), k, v, visible[:, None])
    return rearrange(y, "n (b h) w k -> b n w (h k)", h=q.shape[3])


def _in_pairs(x: Tensor, axis: int, window: int) -> Tensor:
    """Blocks along an axis, each joined with the next."""
    blocks = x.unflatten(axis, (-1, window))
    count = blocks.shape[axis] - 1
    first, second = blocks.narrow(axis, 0, count), blocks.narrow(axis, 1, count)
    return torch.cat([first, second], axis + 1)
