"""Train a detector, `accelerate launch train.py CONFIG`: the script around `brs_detr/train.py`."""

import sys

from brs_detr.train import main

if __name__ == "__main__":
    sys.exit(main())
