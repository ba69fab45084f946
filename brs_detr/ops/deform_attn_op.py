"""Multi-scale deformable attention as one operator of torch: `torch.ops.brs_detr.deformable_attention`.

To torch.compile and torch.export it is a single node with known shapes and a gradient. On CUDA it is computed by the
kernels of `deform_attn_triton`, elsewhere in plain torch. The backward pass begins from the inputs alone: neither
locations nor weights after the softmax are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from brs_detr.ops.deform_attn import deformable_attention, sampling_points
from brs_detr.ops.images import Size, level_sizes


def automatic_attention(
    value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `deform_attn.deformable_attention` by Triton's kernels where they work, and in plain torch elsewhere."""
    if value.is_cuda and kernels_work(value.device.index or 0):
        return fused_attention(value, shapes, references, offsets, logits)
    return deformable_attention(value, shapes, references, offsets, logits)


def fused_attention(
    value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `deform_attn.deformable_attention` by Triton's kernels on CUDA, and in plain torch elsewhere.

    On a CPU plain torch is faster than the operator, since it keeps the samples that the operator reads again for the
    gradient. References that want a gradient get it from plain torch on every device; no model here has any.
    """
    if not value.is_cuda or (references.requires_grad and torch.is_grad_enabled()):
        return deformable_attention(value, shapes, references, offsets, logits)
    return attention_operator(value, shapes, references, offsets, logits)


def attention_operator(
    value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `deform_attn.deformable_attention` by the operator on any device; references get no gradient.

    Arguments, result and errors are described there. Samples are summed in float32, for float64 values in float64.
    """
    if sum(h * w for h, w in shapes) != value.shape[1]:
        raise ValueError(f"levels {list(shapes)} do not hold the {value.shape[1]} tokens of the value tensor")
    sides = [side for shape in shapes for side in shape]
    out: Tensor = torch.ops.brs_detr.deformable_attention(value, sides, references, offsets, logits)
    return out


def _pairs(sides: Sequence[int]) -> list[Size]:
    """Undo the flattening of [(h, w), ...], which an operator's arguments cannot be."""
    return list(zip(sides[::2], sides[1::2], strict=True))


def _attention(value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    # Contiguous, as all results here: a compiler relies on the strides of the shape functions.
    return deformable_attention(value, _pairs(shapes), references, offsets, logits).contiguous()


def _attention_cuda(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    if value.dtype == torch.float64:  # the kernels sum in float32
        return _attention(value, shapes, references, offsets, logits)
    from brs_detr.ops.deform_attn_triton import launch_forward

    return launch_forward(value, _pairs(shapes), references, offsets, logits)


def _attention_shape(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], logits.shape[1], value.shape[2] * value.shape[3])


def _gradients(
    gradient: Tensor, value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return plain_gradients(gradient, value, _pairs(shapes), references, offsets, logits)


def _gradients_cuda(
    gradient: Tensor, value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if value.dtype == torch.float64:
        return _gradients(gradient, value, shapes, references, offsets, logits)
    from brs_detr.ops.deform_attn_triton import launch_backward

    return launch_backward(gradient, value, _pairs(shapes), references, offsets, logits)


def _gradients_shape(
    gradient: Tensor, value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, references, offsets, logits = inputs
    ctx.save_for_backward(value, references, offsets, logits)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
    value, references, offsets, logits = ctx.saved_tensors
    gradients = torch.ops.brs_detr.deformable_attention_backward
    of_value, of_offsets, of_logits = gradients(gradient, value, ctx.shapes, references, offsets, logits)
    return of_value, None, None, of_offsets, of_logits


# By schema and not by `torch.library.custom_op`, a call of which takes 40 us longer (torch 2.15).
_NAME, _GRADIENTS = "brs_detr::deformable_attention", "brs_detr::deformable_attention_backward"
_INPUTS = "Tensor value, SymInt[] shapes, Tensor references, Tensor offsets, Tensor logits"
_TAG = torch.Tag.pt2_compliant_tag
torch.library.define(_NAME, f"({_INPUTS}) -> Tensor", tags=_TAG)
torch.library.define(_GRADIENTS, f"(Tensor gradient, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=_TAG)
torch.library.impl(_NAME, "default", _attention)
torch.library.impl(_NAME, "cuda", _attention_cuda)
torch.library.impl(_GRADIENTS, "default", _gradients)
torch.library.impl(_GRADIENTS, "cuda", _gradients_cuda)
torch.library.register_fake(_NAME, _attention_shape)
torch.library.register_fake(_GRADIENTS, _gradients_shape)
torch.library.register_autograd(_NAME, _backward, setup_context=_keep)


def plain_gradients(
    gradient: Tensor, value: Tensor, shapes: Sequence[Size], references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of value, offsets and logits without autograd, which does not record inside an operator.

    Args:
        gradient: (B, Q, heads * dim) of the result; the others are those of `deform_attn.deformable_attention`.

    Returns:
        Those of value, offsets and logits, in their shapes and dtypes.
    """
    heads = value.shape[2]
    locations, weights = sampling_points(shapes, heads, references, offsets, logits)
    compute = torch.promote_types(value.dtype, torch.float32)
    grids = rearrange(2 * locations.to(compute) - 1, "b q h l p xy -> (b h) l q p xy")
    shares = rearrange(weights.to(compute), "b q h l p -> (b h) l q p")
    arriving = rearrange(gradient.to(compute), "b q (h d) -> (b h) d q 1", h=heads)
    of_tokens, of_grids, of_shares = [], [], []
    for level, (tokens, (h, w)) in enumerate(zip(value.split([h * w for h, w in shapes], dim=1), shapes, strict=True)):
        image = rearrange(tokens.to(compute), "b (y x) h d -> (b h) d y x", y=h, x=w)
        samples = F.grid_sample(image, grids[:, level], padding_mode="zeros", align_corners=False)
        of_shares.append((arriving * samples).sum(1))
        of_samples = arriving * shares[:, level].unsqueeze(1)
        # bilinear, zeros outside, not aligned to corners, gradients of both
        options = (0, 0, False, (True, True))
        of_image, of_grid = torch.ops.aten.grid_sampler_2d_backward(of_samples, image, grids[:, level], *options)
        of_tokens.append(rearrange(of_image, "(b h) d y x -> b (y x) h d", h=heads))
        of_grids.append(of_grid)
    # A location of 0 to 1 is -1 to 1 to `grid_sample`.
    of_locations = rearrange(2 * torch.stack(of_grids, 1), "(b h) l q p xy -> b q h l p xy", h=heads)
    if references.shape[-1] == 2:
        of_offsets = of_locations / level_sizes(shapes, of_locations)[:, None]
    else:
        of_offsets = of_locations / locations.shape[4] * references[:, :, None, :, None, 2:] * 0.5
    of_weights = rearrange(torch.stack(of_shares, 1), "(b h) l q p -> b q h (l p)", h=heads)
    attention = weights.flatten(3)
    # Softmax: each weight's own gradient less the mean of all, weighted.
    of_logits = attention * (of_weights - (attention * of_weights).sum(-1, keepdim=True))
    results = ((torch.cat(of_tokens, 1), value), (of_offsets.flatten(2), offsets), (of_logits.flatten(2), logits))
    of_value, of_offsets, of_logits = (result.to(like.dtype).contiguous() for result, like in results)
    return of_value, of_offsets, of_logits


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_work(index: int, device_type: str = "cuda") -> bool:
    """Try the kernels once a process on device `index` of a type; see `_trial`."""
    # While torch.export traces, every new tensor is a fake, and nothing can be computed.
    return type(torch.empty(0)) is not Tensor or _trial(index, device_type)


@lru_cache
def _trial(index: int, device_type: str) -> bool:
    """Run both kernels once on a small problem and compare them with plain torch; warn if they fail or differ.

    Triton compiles at run time and needs what a system may lack: a GPU that it knows, a C compiler, a writable folder.

    Args:
        index: of the device.
        device_type: "cuda", or "cpu" where Triton interprets its kernels.
    """
    generator, device, shapes = torch.Generator().manual_seed(0), torch.device(device_type, index), [(6, 5), (3, 2)]
    draw = lambda *size: torch.randn(size, generator=generator).to(device)  # noqa: E731
    value, references, gradient = draw(1, 36, 2, 32), draw(1, 7, 2, 4).sigmoid(), draw(1, 7, 64)
    arguments = (value, shapes, references, draw(1, 7, 32), draw(1, 7, 16))
    try:
        from brs_detr.ops.deform_attn_triton import launch_backward, launch_forward

        ours = (launch_forward(*arguments), *launch_backward(gradient, *arguments))
        theirs = (deformable_attention(*arguments), *plain_gradients(gradient, *arguments))
        if all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(ours, theirs, strict=True)):
            return True
        reason = "its results differ from those of plain torch"
    except Exception as error:  # of Triton, of its compiler or of the driver
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"deformable attention: Triton's kernels do not work on {device} ({reason}). Plain torch computes it, with "
        "more time and memory; model.deformable_attention=torch does so without this warning.",
        stacklevel=2,
    )
    return False
