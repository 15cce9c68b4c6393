"""How chunked forms cut a sequence: chunks of tokens as tiles, tiles in segments.

Shapes: B batch, T time, H heads, D width, C chunk, N chunks, M = B * H memories.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements per tensor of a segment. A larger segment hides the overhead of each call better and a
# smaller one stays in cache; cost is level from 2^18 to 2^19 and rises on both sides.
_SEGMENT_ELEMENTS = 2**19


@dataclass(frozen=True)
class Tiling:
    """Cut of [B, T, H, D] tensors into chunks, taken in segments of several chunks.

    Attributes:
        batch: B.
        tokens: T; the last chunk is padded with zeros, which are neutral for every input.
        heads: H.
        chunk: C.
        width: Largest row of a tile.
        dtype: Dtype of the tiles.
    """

    batch: int
    tokens: int
    heads: int
    chunk: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, k: Tensor, v: Tensor, chunk: int, dtype: torch.dtype) -> "Tiling":
        """The tiling of a sequence with keys [B, T, ..., K] and values [B, T, H, V]."""
        width = max(chunk, k.shape[-1], v.shape[-1])
        batch, tokens, heads, _ = v.shape
        return cls(batch, tokens, heads, chunk, width, dtype)

    @property
    def chunks(self) -> int:
        """Number of chunks, the padded one included."""
        return -(-self.tokens // self.chunk)

    @property
    def all(self) -> slice:
        """The range of chunks that is all of them."""
        return slice(0, self.chunks)

    @property
    def memories(self) -> int:
        """Number of independent states, M."""
        return self.batch * self.heads

    def segments(self, elements: int | None = None) -> list[slice]:
        """Ranges of chunks that are processed together, in order.

        Args:
            elements: of each tensor of a segment, where the usual count does not suit.
        """
        elements = _SEGMENT_ELEMENTS if elements is None else elements
        step = max(1, elements // (self.memories * self.chunk * self.width))
        return [slice(i, min(i + step, self.chunks)) for i in range(0, self.chunks, step)]

    def view(self, x: Tensor, part: slice) -> Tensor:
        """View chunks `part` of x [B, T, H, D] as [N, B, H, C, D]; T must reach their end."""
        span = x[:, part.start * self.chunk : part.stop * self.chunk]
        return span.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)

    def read(self, x: Tensor, part: slice) -> Tensor:
        """Chunks `part` of x [B, T, H, D] as [N, B, H, C, D], a view unless padded or cast."""
        missing = part.stop * self.chunk - self.tokens
        if missing > 0:
            last = x[:, part.start * self.chunk :]
            x = torch.nn.functional.pad(last, (0, 0, 0, 0, 0, missing))
            part = slice(0, part.stop - part.start)
        return self.view(x, part).to(self.dtype)

    def tiles(self, x: Tensor, part: slice) -> Tensor:
        """Copy chunks `part` of x [B, T, H, D] to contiguous tiles [N * M, C, D]."""
        tiles = self.read(x, part).clone(memory_format=torch.contiguous_format)
        return tiles.view(-1, *tiles.shape[-2:])

    def write(self, out: Tensor, tiles: Tensor, part: slice) -> None:
        """Write tiles [N * M, C, D] to chunks `part` of out [B, T, H, D], padding dropped."""
        tiles = tiles.unflatten(0, (-1, self.batch, out.shape[2]))
        if part.stop * self.chunk <= self.tokens:
            self.view(out, part).copy_(tiles)
            return
        start = part.start * self.chunk
        tokens = tiles.permute(1, 0, 3, 2, 4).flatten(1, 2)
        out[:, start:] = tokens[:, : self.tokens - start]
