"""Evaluates a run: `python eval.py run=<run directory or checkpoint> [task=NAME] [task.seq_len=N]`.

The run's own task is the default; `task=NAME` chooses another and `task.option=value` changes
either. Other options, in configs/eval.yaml, are `lengths=[1,4,16]` (multiples of the task's
length), `carry=[false,true]` (start every block afresh, or go on from the state of the last),
`split=test`, `checkpoint=best` and `telemetry=1000` (show which tokens surprised the memories).
"""

import sys

from mneme.harness.run.signals import listen

if __name__ == "__main__":
    listen()  # before the imports, which take seconds

from mneme.harness.cli import report_errors
from mneme.harness.evaluate.eval_command import evaluate_command

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    with report_errors():
        evaluate_command(sys.argv[1:])
