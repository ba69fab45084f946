"""Evaluate trained weights, `accelerate launch eval.py RUN`: `brs-detr eval` as a script (`brs_detr/evaluate.py`)."""

import sys
from functools import partial

from brs_detr.cli import run_command

main = partial(run_command, "eval")

if __name__ == "__main__":
    sys.exit(main())
