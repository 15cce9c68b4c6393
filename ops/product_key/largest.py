"""The largest numbers of each row, through groups where that is quicker."""

from jaxtyping import Float, Int
from torch import Tensor

_GROUPS_PER_KEPT = 4  # fewer groups than this, and finding the best ones costs what they save


def largest(
    scores: Float[Tensor, "*tokens n"], k: int
) -> tuple[Float[Tensor, "*tokens k"], Int[Tensor, "*tokens k"]]:
    """The k largest of each row, the best first, and where they stand; as `scores.topk(k)`.

    No more than k groups hold one of the k largest, and those with the k largest maxima are such.
    On a CPU, where selecting costs ten times what a maximum does, only they are searched if there
    are many more groups than k.
    """
    n = scores.shape[-1]
    sizes = (size for size in (8, 4) if n % size == 0 and n >= _GROUPS_PER_KEPT * k * size)
    size = next(sizes, None)
    if size is None or not scores.is_cpu:
        values, place = scores.topk(k)
        return values, place
    grouped = scores.unflatten(-1, (size, n // size))  # a group is a column: maxima are vectors
    group = grouped.amax(-2).topk(k, sorted=False).indices
    members = grouped.gather(-1, group.unsqueeze(-2).expand(*group.shape[:-1], size, k))
    values, place = members.flatten(-2).topk(k)
    member = place.div(k, rounding_mode="floor")
    return values, member * (n // size) + group.gather(-1, place % k)
