"""Pure functions over tensors, each with a naive form that specifies it and fast forms beside it.

`OPS` lists them all: being in it is being tested and timed.
"""

from ops import attention, gated_delta, short_convolution, test_time
from ops.registry import Op

__all__ = ["OPS", "Op"]

OPS: dict[str, Op] = {
    op.name: op for op in (attention.OP, gated_delta.OP, short_convolution.OP, test_time.OP)
}
