"""What one process cannot do, none does: processes that wait for each other in a step would wait for ever."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from brs_detr.exit_codes import ExitCode, Interruption


def raise_together(mine: Interruption | None, accelerator: Accelerator) -> None:
    """Raise in every process where some process was interrupted; every process calls this at the same point.

    Args:
        mine: what this process met, or None.
        accelerator: of the launch.

    Raises:
        Interruption: with what that process said and its exit code; of several the highest, so that being told to
            stop comes before what a stop may bring about.
    """
    if accelerator.num_processes == 1:
        if mine is not None:
            raise mine
        return
    code = torch.tensor(0 if mine is None else int(mine.code), dtype=torch.float32, device=accelerator.device)
    if accelerator.reduce(code, reduction="sum").item() == 0:
        return
    met = gather_object([(-1, 0, "") if mine is None else (accelerator.process_index, int(mine.code), str(mine))])
    process, worst, text = max(met, key=lambda entry: entry[1])
    raise Interruption(f"process {process}: {text}", ExitCode(worst)) from mine
