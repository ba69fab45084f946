"""`train.py` with sharded weights on CPUs: `sharded_run.py CONFIG [a.b=value ...]`, under torchrun.

Accelerate shards on GPUs only, torch on CPUs too: here Accelerate is set after its start that
the launch is one of FSDP. Gradients are summed and divided, for gloo sums where it is asked to average in torch 2.8.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import brs_detr.run.launch  # noqa: E402
import train  # noqa: E402


def sharding_accelerator(*, fsdp_plugin, **options):
    accelerator = Accelerator(fsdp_plugin=fsdp_plugin, **options)
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin
    prepare = accelerator.prepare

    def prepare_to_divide(model, optimizer):
        model, optimizer = prepare(model, optimizer)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model, optimizer

    accelerator.prepare = prepare_to_divide
    return accelerator


if __name__ == "__main__":
    torch.set_num_threads(1)
    brs_detr.run.launch.Accelerator = sharding_accelerator
    sys.exit(train.main())
