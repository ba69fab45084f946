"""Which part of a detector's step an operation belongs to, by the file that it is called from.

An operation of the backward pass belongs to the part whose operation is differentiated: autograd numbers its nodes in
the order in which they are made.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

PACKAGE = f"{Path(__file__).resolve().parents[1] / 'brs_detr'}/"

# Files below `brs_detr` and the section that an operation called from them belongs to; the innermost frame that is
# named here decides. A trailing slash stands for a folder.
SECTIONS = {
    "losses/": "losses",
    "assign/hungarian.py": "matching",
    "assign/": "assignment",
    "models/backbones/": "backbone",
    "models/neck.py": "neck",
    "models/transformer/encoder.py": "encoder",
    "models/transformer/two_stage.py": "proposals",
    "models/transformer/decoder.py": "decoder",
    "models/transformer/collaborative.py": "auxiliary queries",
    "models/denoising.py": "denoising",
    "models/heads/rpn.py": "RPN",
    "models/heads/roi.py": "RoI",
    "models/heads/cascade.py": "RoI",
    "models/heads/pooling.py": "RoI",
    "models/heads/mask.py": "masks",
    "models/heads/atss.py": "ATSS",
    "models/brs_detr.py": "model",
    "models/detector.py": "model",
    "models/rcnn.py": "model",
    "models/one_stage.py": "model",
    "ops/targets.py": "data",
    "engine/distributed.py": "optimizer",
    "engine/nonfinite.py": "trainer",
    "engine/trainer.py": "trainer",
}
# In files that several parts share, the class of the method's object decides.
BY_CLASS = {"RPNHead": "RPN", "ATSSHead": "ATSS", "RoIHead": "RoI", "CascadeHead": "RoI"}
SHARED = "models/heads/"
# Functions whose operations belong elsewhere than those of their file.
BY_FUNCTION = {"set_losses": "losses", "normalize": "data", "padding_mask": "data", "gradient_norm": "optimizer"}
OUTSIDE, AUXILIARY = "other", "auxiliary decoder"


class Wait(NamedTuple):
    """A place where the host waits for the device.

    Attributes:
        place: "file:line" of the project; for the backward pass the section that is differentiated.
        operation: which waits.
    """

    place: str
    operation: str

    def __str__(self) -> str:
        """Return both in a line."""
        return f"{self.place} ({self.operation})"


class SectionTracker:
    """Tells the section of the operation that is running, in the forward and the backward pass.

    Args:
        sections: gives the section of a frame, from which an operation of the forward pass is called.
    """

    def __init__(self, sections: Callable[[FrameType | None], str]) -> None:
        self.section_of = sections
        self.starts: list[int] = [-1]  # numbers of autograd nodes from which on each of `names` is the section
        self.names: list[str] = [OUTSIDE]

    def of_forward(self) -> str:
        """Return the section of the code that calls, and note that the autograd nodes from here on are its own."""
        section = self.section_of(sys._getframe(1))
        if section != self.names[-1]:
            # The operation's own node has its number already: it is made before the operation runs.
            self.starts.append(torch.autograd._get_sequence_nr() - 1)
            self.names.append(section)
        return section

    def of_backward(self) -> str:
        """Return the section of the operation that is differentiated; "gradients" for those that add them up."""
        node = torch._C._current_autograd_node()
        # Nodes that add to the gradients of parameters have the largest number that there is.
        if node is None or node._sequence_nr() > 1 << 62:
            return "gradients"
        return self.names[bisect.bisect_right(self.starts, node._sequence_nr()) - 1]


def frames(start: FrameType | None) -> Iterator[tuple[str, FrameType]]:
    """Iterate over the frames inside the package, innermost first, with their files below it."""
    frame = start
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            yield name[len(PACKAGE) :], frame
        frame = frame.f_back


def place() -> str:
    """Return "file:line" of the innermost frame of the package."""
    for name, frame in frames(sys._getframe(1)):
        return f"brs_detr/{name}:{frame.f_lineno}"
    return "outside the package"


def section_of(start: FrameType | None) -> str:
    """Return the section that an operation called from a frame belongs to."""
    in_optimizer, found = False, None
    frame = start
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            found = found or _section_of_frame(name[len(PACKAGE) :], frame)
            if found == "decoder" and frame.f_code.co_name == "aux_losses":
                return AUXILIARY
            if found not in (None, "decoder"):
                return "optimizer" if found == "trainer" and in_optimizer else found
        in_optimizer |= "/torch/optim/" in name
        frame = frame.f_back
    return found or ("optimizer" if in_optimizer else OUTSIDE)


def _section_of_frame(name: str, frame: FrameType) -> str | None:
    """Return the section of a file of the package, or None if its callers decide."""
    if frame.f_code.co_name in BY_FUNCTION:
        return BY_FUNCTION[frame.f_code.co_name]
    for prefix, section in SECTIONS.items():
        if name == prefix or (prefix.endswith("/") and name.startswith(prefix)):
            return section
    if name.startswith(SHARED) and frame.f_code.co_argcount and frame.f_code.co_varnames[0] == "self":
        return BY_CLASS.get(type(frame.f_locals["self"]).__name__, "head")
    return None
