"""Pure functions over tensors, each with a naive form that specifies it and fast forms beside it.

`OPS` lists them all: being in it is being tested and timed.
"""

if __name__ != "mneme.ops":  # under two names, it would be two packages
    raise ImportError("import mneme.ops, not ops")


from mneme.ops import (
    attention,
    delta,
    diagonal_decay,
    diagonal_state_space,
    gated_delta,
    linear_attention,
    long_convolution,
    lstm,
    product_key,
    scalar_decay,
    selective_scan,
    short_convolution,
    slstm,
    table_read,
    test_time,
    tucker,
)
from mneme.ops.registry import Op

__all__ = ["OPS", "Op"]

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        attention.OP,
        delta.OP,
        diagonal_decay.OP,
        diagonal_state_space.OP,
        gated_delta.OP,
        linear_attention.OP,
        long_convolution.OP,
        lstm.OP,
        product_key.OP,
        scalar_decay.OP,
        selective_scan.OP,
        short_convolution.OP,
        slstm.OP,
        table_read.OP,
        test_time.OP,
        tucker.OP,
    )
}
