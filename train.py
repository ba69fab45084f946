"""Train a detector, `accelerate launch train.py CONFIG`: `brs-detr train` as a script (`brs_detr/train.py`)."""

import sys
from functools import partial

from brs_detr.cli import run_command

main = partial(run_command, "train")

if __name__ == "__main__":
    sys.exit(main())
