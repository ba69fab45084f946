"""BRS-DETR: Co-DETR trained with the Bucketed Rank & Sort loss.

`brs_detr.load(...)` gives a predictor; `brs_detr.api` has `train` and `evaluate` too. Importing the package imports
neither torch nor any of them: `brs_detr.losses` needs only torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brs_detr.api import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name == "load":
        return importlib.import_module("brs_detr.api").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
