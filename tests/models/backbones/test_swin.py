"""Detection Swin against a slow restatement of the published computation, at sizes that do not divide by the window."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from brs_detr.models.backbones.swin import rename_official_swin, use_published_order
from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.config import BackboneConfig

NAME = "swin_tiny_patch4_window7_224.ms_in1k"
TINY = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4}


@pytest.fixture
def tiny_swin(monkeypatch):
    """Builds a narrow Swin through the public entrance, every parameter random."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, **settings, **TINY))

    def build(**settings):
        torch.manual_seed(1)
        backbone = build_backbone(BackboneConfig(NAME, pretrained=False, **settings))
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return backbone

    return build


def attend(query, key, value, bias):
    """Attention of one window and head, a row at a time."""
    rows = []
    for i in range(len(query)):
        score = (query[i] * key).sum(-1) / math.sqrt(query.shape[-1]) + bias[i]
        rows.append((score.exp() / score.exp().sum())[:, None].mul(value).sum(0))
    return torch.stack(rows)


def regions(length, window, shift):
    """Number of the region each row of the rolled map comes from: rows of two regions do not see each other."""
    number = torch.zeros(length, dtype=torch.long)
    if shift:
        number[length - window :] = 1
        number[length - shift :] = 2
    return number


def windowed_attention(x, attn, window, shift):
    """Pad, roll, attend in each window with the relative bias and the region mask, roll back, crop; (h, w, C)."""
    height, width, channels = x.shape
    full_h, full_w = (math.ceil(side / window) * window for side in (height, width))
    padded = x.new_zeros(full_h, full_w, channels)
    padded[:height, :width] = x
    rolled = padded[(torch.arange(full_h) + shift) % full_h][:, (torch.arange(full_w) + shift) % full_w]
    region = 3 * regions(full_h, window, shift)[:, None] + regions(full_w, window, shift)[None]
    out = torch.empty_like(rolled)
    place = [(i, j) for i in range(window) for j in range(window)]
    table = attn.relative_position_bias_table
    bias = torch.stack(
        [
            torch.stack([table[(a - c + window - 1) * (2 * window - 1) + b - d + window - 1] for c, d in place])
            for a, b in place
        ]
    )
    for top in range(0, full_h, window):
        for left in range(0, full_w, window):
            tokens = rolled[top : top + window, left : left + window].reshape(-1, channels)
            where = region[top : top + window, left : left + window].reshape(-1)
            mask = -100.0 * (where[:, None] != where[None]).to(x.dtype)
            q, k, v = attn.qkv(tokens).reshape(len(tokens), 3, attn.num_heads, -1).unbind(1)
            heads = [attend(q[:, h], k[:, h], v[:, h], bias[..., h] + mask) for h in range(attn.num_heads)]
            out[top : top + window, left : left + window] = attn.proj(torch.cat(heads, 1)).reshape(window, window, -1)
    back = out[(torch.arange(full_h) - shift) % full_h][:, (torch.arange(full_w) - shift) % full_w]
    return back[:height, :width]


def merge(x, downsample):
    """2 x 2 neighbors side by side in the channels, zero rows and columns at odd ends."""
    height, width, channels = x.shape
    even = x.new_zeros(height + height % 2, width + width % 2, channels)
    even[:height, :width] = x
    corners = [even[0::2, 0::2], even[1::2, 0::2], even[0::2, 1::2], even[1::2, 1::2]]
    return downsample.reduction(downsample.norm(torch.cat(corners, -1)))


def reference(backbone, image, window):
    """The published features of one (3, H, W) image."""
    height, width = (math.ceil(side / 4) * 4 for side in image.shape[1:])
    padded = image.new_zeros(3, height, width)
    padded[:, : image.shape[1], : image.shape[2]] = image
    x = backbone.patch_embed.norm(backbone.patch_embed.proj(padded[None])[0].permute(1, 2, 0))
    maps = []
    for index, stage in enumerate(backbone.layers):
        x = merge(x, stage.downsample) if index else x
        for number, block in enumerate(stage.blocks):
            x = x + windowed_attention(block.norm1(x), block.attn, window, window // 2 if number % 2 else 0)
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        if index:
            maps.append(getattr(backbone, f"norm{index}")(x).permute(2, 0, 1))
    return maps


@pytest.mark.parametrize("size", [(133, 171), (64, 96), (30, 41), (9, 200)])
def test_features_are_the_published_ones_at_any_size(tiny_swin, size):
    backbone = tiny_swin().double().eval()
    image = torch.randn(3, *size, dtype=torch.float64)
    with torch.no_grad():
        for level, expected in zip(backbone(image[None]), reference(backbone, image, 4), strict=True):
            torch.testing.assert_close(level[0], expected, rtol=1e-9, atol=1e-9)


def test_timm_as_it_is_differs(tiny_swin):
    """The repair is needed: without it a map that is no multiple of the window comes out otherwise."""
    torch.manual_seed(2)
    plain = timm.create_model(NAME, pretrained=False, num_classes=0, always_partition=True, strict_img_size=False)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block = plain.layers[0].blocks[1].eval()
    repaired = copy.deepcopy(block)
    use_published_order(repaired)
    fits, ragged = torch.randn(1, 8, 12, 24), torch.randn(1, 9, 11, 24)
    torch.testing.assert_close(block(fits), repaired(fits))
    assert (block(ragged) - repaired(ragged)).abs().max() > 1e-2


def test_images_of_a_batch_do_not_touch(tiny_swin):
    backbone = tiny_swin().eval()
    x = torch.randn(3, 3, 50, 70)
    for together, alone in zip(backbone(x), backbone(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_channels_and_strides_describe_the_maps(tiny_swin):
    backbone = tiny_swin(levels=(4, 8, 16))
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == backbone.channels == [24, 48, 96]
    assert [(64 // m.shape[2], 96 // m.shape[3]) for m in maps] == [(4, 4), (8, 8), (16, 16)]
    assert len(backbone.layers) == 3  # what no map needs is not there, so no parameter waits for a gradient


def test_every_trainable_parameter_gets_a_gradient_and_frozen_stages_none(tiny_swin):
    backbone = tiny_swin(frozen_stages=1, drop_path=0.2)
    sum((m * torch.randn_like(m)).sum() for m in backbone.train()(torch.randn(2, 3, 40, 50))).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (not name.startswith(("patch_embed", "layers.0"))), name
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_stochastic_depth_spares_frozen_stages_and_evaluation(tiny_swin):
    backbone = tiny_swin(drop_path=0.9, frozen_stages=2, levels=(8, 16))
    x = torch.randn(1, 3, 32, 32)
    backbone.train()
    passes = [backbone(x) for _ in range(6)]
    assert all(torch.equal(maps[0], passes[0][0]) for maps in passes)
    assert any(not torch.equal(maps[1], passes[0][1]) for maps in passes)
    backbone.eval()
    assert torch.equal(backbone(x)[1], backbone(x)[1])


def test_stochastic_depth_is_off_unless_asked_for(tiny_swin):
    backbone = tiny_swin().train()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(backbone(x)[2], backbone(x)[2])


def test_recomputed_activations_give_the_same_gradients(tiny_swin):
    settings = {"frozen_stages": 0, "drop_path": 0.5}
    plain, lean = tiny_swin(**settings).double(), tiny_swin(**settings, activation_checkpointing=True).double()
    x = torch.randn(2, 3, 40, 50, dtype=torch.float64)
    for backbone in (plain, lean):
        torch.manual_seed(3)  # of the stochastic depth, which the second pass through a block has to repeat
        sum(m.sigmoid().sum() for m in backbone.train()(x)).backward()
    for a, b in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_copy_computes_the_same(tiny_swin):
    backbone = tiny_swin().eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(backbone)(x)[-1], backbone(x)[-1])


def test_names_of_the_original_checkpoint_become_ours(golden, tiny_swin):
    """The tensor names of the published Swin-T detector cover the backbone exactly, shapes aside."""
    listing = golden.parent / "design" / "state_dict_keys_co_deformable_swint.tsv"
    if not listing.exists():
        pytest.skip(f"{listing.name} is not beside this checkout")
    names = [line.split("\t")[0].strip() for line in listing.read_text().splitlines()]
    official = {n.removeprefix("backbone."): torch.zeros(1) for n in names if n.startswith("backbone.")}
    ours = {n for n in tiny_swin().state_dict() if "blocks.2" not in n}
    renamed = {n for n in rename_official_swin(official) if ".blocks." not in n or int(n.split(".")[3]) < 2}
    assert renamed == ours


def test_another_timm_is_refused_in_one_sentence():
    with pytest.raises(RuntimeError, match="cannot be used for detection"):
        use_published_order(torch.nn.Identity())
