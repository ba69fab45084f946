"""BRS-DETR: Co-DETR trained with the Bucketed Rank & Sort loss.

`brs_detr.load(...)` gives a predictor, `brs_detr.train(...)` and `brs_detr.evaluate(...)` run a training and an
evaluation; see `brs_detr.api`. Importing the package imports none of them: `brs_detr.losses` needs only torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brs_detr.api import evaluate, load, train

__version__ = "0.1.0"
__all__ = ["evaluate", "load", "train"]


class CallableModule(ModuleType):
    """The modules `brs_detr.train` and `brs_detr.evaluate`, which may be called as the functions of `brs_detr.api`.

    A module that is imported becomes an attribute of its package, over a function of the same name.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function of `brs_detr.api` with the module's name."""
        return getattr(importlib.import_module("brs_detr.api"), self.__name__.rpartition(".")[2])(*arguments, **options)


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name == "load":
        return importlib.import_module("brs_detr.api").load
    if name in ("train", "evaluate"):
        return importlib.import_module(f"brs_detr.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
