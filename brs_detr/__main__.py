"""`python -m brs_detr COMMAND`, the same as `brs-detr COMMAND`; see `brs_detr.cli`."""

import sys

from brs_detr.cli import main

sys.exit(main())
