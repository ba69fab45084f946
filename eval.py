"""Evaluate trained weights, `accelerate launch eval.py RUN`: the script around `brs_detr/evaluate.py`."""

import sys

from brs_detr.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
