"""The norm of gradients and clipping by it where some are sharded; two processes and more: test_fsdp.py."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

from brs_detr.engine.distributed import clip_gradients, gradient_norm


@pytest.fixture
def mesh():
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def model_of(gradients, mesh=None):
    """Parameters with the gradients given; all but the first of them sharded where there is a mesh."""
    model = nn.ParameterList()
    for index, gradient in enumerate(gradients):
        if mesh is not None and index:
            gradient = distribute_tensor(gradient, mesh, [Replicate()])
        model.append(nn.Parameter(torch.zeros_like(gradient)))
        model[-1].grad = gradient
    return model


def values(model):
    full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return torch.cat([gradient.flatten() for gradient in full])


@pytest.mark.parametrize("most", [0.5, 100.0])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_norm_is_that_of_all_and_gradients_become_at_most_as_long(mesh, sharded, most):
    """Shorter ones stay as they are: clipping never lengthens."""
    gradients = [torch.tensor([3.0]), torch.randn(4, 2), torch.randn(5)]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    model = model_of([gradient.clone() for gradient in gradients], mesh if sharded else None)
    norm = gradient_norm(model)
    torch.testing.assert_close(norm, flat.norm())
    torch.testing.assert_close(values(model), flat)
    clip_gradients(model, norm, most)
    torch.testing.assert_close(values(model), flat * min(1.0, most / flat.norm().item()), rtol=1e-5, atol=1e-6)
