"""The feature pyramid against a cell-by-cell restatement and torchvision's, at sizes that do not divide by 2."""

import math

import pytest
import torch
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from brs_detr.models.neck import FPN, ChannelMapper, pyramid_strides

CHANNELS, DIM = (6, 10, 12), 8


def feature_maps(dtype=torch.float32, batch=2, size=(27, 21)):
    """Maps as a stride-2 network makes them of an image that is not padded."""
    torch.manual_seed(1)
    maps, (h, w) = [], size
    for c in CHANNELS:
        maps.append(torch.randn(batch, c, h, w, dtype=dtype))
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    return maps


def convolve(x, layer, stride=1):
    """(c, h, w) through a 1x1 or 3x3 convolution, one output cell at a time."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    reach = weight.shape[-1] // 2
    rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    out = x.new_zeros(weight.shape[0], len(rows), len(columns))
    for i, y in enumerate(rows):
        for j, z in enumerate(columns):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < x.shape[1] and 0 <= z + dx < x.shape[2]:
                        out[:, i, j] += weight[:, :, dy + reach, dx + reach] @ x[:, y + dy, z + dx]
            out[:, i, j] += bias
    return out


def slow_pyramid(fpn, features):
    """Outputs of one image, (c, h, w) per level."""
    sums = [convolve(x, layer) for x, layer in zip(features, fpn.projections, strict=True)]
    for level in reversed(range(len(sums) - 1)):
        for y in range(sums[level].shape[1]):
            for x in range(sums[level].shape[2]):
                sums[level][:, y, x] += sums[level + 1][:, y // 2, x // 2]
    maps = [convolve(x, layer) for x, layer in zip(sums, fpn.outputs, strict=True)]
    if fpn.source == "pool":
        while len(maps) < fpn.num_levels:
            maps.append(maps[-1][:, ::2, ::2])
        return maps
    source = features[-1] if fpn.source == "c5" else maps[-1]
    for extra in fpn.extra:
        source = convolve(source, extra, stride=2)
        maps.append(source)
        source = source.clamp(min=0) if fpn.relu else source
    return maps


def with_biases(fpn):
    """Give every convolution biases, which start at zero."""
    for name, parameter in fpn.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return fpn


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("extra", ["pool", "c5", "p5"])
def test_equals_the_cell_by_cell_pyramid(extra, relu):
    fpn = with_biases(FPN(CHANNELS, DIM, 5, extra, relu).double())
    features = feature_maps(torch.float64, batch=1, size=(9, 7))
    for fast, slow in zip(fpn(features), slow_pyramid(fpn, [f[0] for f in features]), strict=True):
        torch.testing.assert_close(fast[0], slow)


@pytest.mark.parametrize("extra", ["pool", "c5"])
def test_equals_torchvision_with_the_same_weights(extra):
    last = LastLevelMaxPool() if extra == "pool" else LastLevelP6P7(CHANNELS[-1], DIM)
    reference = with_biases(FeaturePyramidNetwork(CHANNELS, DIM, last))
    fpn = FPN(CHANNELS, DIM, 4 if extra == "pool" else 5, extra)
    pairs = [*zip(fpn.projections, reference.inner_blocks), *zip(fpn.outputs, reference.layer_blocks)]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs[0].state_dict())
    if extra == "c5":
        fpn.extra[0].load_state_dict(last.p6.state_dict())
        fpn.extra[1].load_state_dict(last.p7.state_dict())
    features = feature_maps()
    expected = reference({str(level): x for level, x in enumerate(features)})
    for ours, theirs in zip(fpn(features), expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_c5_is_read_where_it_is_as_wide_as_the_pyramid():
    fpn = FPN(CHANNELS, CHANNELS[-1], 4, "c5")
    features = feature_maps()
    torch.testing.assert_close(fpn(features)[3], fpn.extra[0](features[-1]))


def test_first_weights_are_xavier_and_biases_zero():
    torch.manual_seed(0)
    fpn = FPN((64, 512), 128, 4, "c5")
    for layer in (*fpn.projections, *fpn.outputs, *fpn.extra):
        area = layer.kernel_size[0] ** 2
        bound = math.sqrt(6 / (area * layer.in_channels + area * layer.out_channels))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


@pytest.mark.parametrize("extra", ["pool", "c5", "p5"])
def test_number_and_size_of_the_maps_follow_the_strides(extra):
    for levels in (3, 4, 6):
        fpn = FPN(CHANNELS, DIM, levels, extra)
        strides = pyramid_strides((8, 16, 32), levels)
        maps = fpn(feature_maps(size=(math.ceil(202 / 8), math.ceil(167 / 8))))
        assert fpn.num_levels == len(maps) == len(strides) == levels
        assert [m.shape[-2:] for m in maps] == [(math.ceil(202 / s), math.ceil(167 / s)) for s in strides]


@pytest.mark.parametrize("extra", ["pool", "c5", "p5"])
def test_every_parameter_gets_a_gradient(extra):
    fpn = FPN(CHANNELS, DIM, 5, extra)
    sum((m * torch.randn_like(m)).sum() for m in fpn(feature_maps())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fpn.parameters())


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="already has 3 levels"):
        FPN(CHANNELS, DIM, 2)
    with pytest.raises(ValueError, match="Choose pool, c5 or p5"):
        FPN(CHANNELS, DIM, 5, "P6")
    with pytest.raises(ValueError, match="already has 3 levels"):
        ChannelMapper(CHANNELS, DIM, 2)


def test_strides_of_a_pyramid_double():
    assert pyramid_strides([4, 8, 16, 32], 5) == (4, 8, 16, 32, 64)
    assert pyramid_strides([8], 1) == (8,)
