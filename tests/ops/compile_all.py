"""Check that compiling leaves values and gradients alone; print the forms that passed."""

import torch

from mneme.ops import OPS
from tests.ops.calls import EVERY_FORM, gradients, ident, make, results
from tests.ops.closeness import assert_close


def main() -> None:
    for name, form in EVERY_FORM:
        op = OPS[name]
        inputs, eager = make(op, 70), op.forms[form]
        compiled = torch.compile(eager, backend="aot_eager")
        assert_close(results(compiled, inputs), results(eager, inputs), 1e-12)
        assert_close(gradients(compiled, inputs), gradients(eager, inputs), 1e-12)
        print(ident((name, form)))


if __name__ == "__main__":
    main()
