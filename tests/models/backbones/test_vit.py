"""EVA-02 with windows against timm's own network and against slow restatements of what Co-DETR's ViT-L computes."""

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva

from brs_detr.models.backbones.timm_backbone import build_backbone
from brs_detr.models.backbones.vit import Pyramid, ViTBackbone
from brs_detr.models.build import build_model
from brs_detr.models.config import BackboneConfig, BRSDETRConfig, CoDINOConfig
from brs_detr.models.one_stage_config import RetinaNetConfig

NAME = "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"
TINY = {"embed_dim": 64, "depth": 4, "num_heads": 4, "img_size": 56}  # 4 x 4 patches of 14 pixels
LEVELS = (4, 8, 16, 32, 64)


def randomize(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


@pytest.fixture
def tiny_eva(monkeypatch):
    """Builds a narrow EVA-02 of four blocks through the public entrance, every parameter random."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, **{**settings, **TINY}))

    def build(**settings):
        torch.manual_seed(1)
        changes = {"levels": LEVELS, "frozen_stages": 0, "window_size": 4, "global_every": 2, **settings}
        return randomize(build_backbone(BackboneConfig(NAME, pretrained=False, **changes)))

    return build


def timm_network(**changes):
    """timm's EVA-02 without a class token, on squares of 64 pixels."""
    torch.manual_seed(1)
    settings = {
        "img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 4 * 2 / 3,
        "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": 16,
        "num_classes": 0, "class_token": False, "dynamic_img_size": True, **changes,
    }  # fmt: skip
    return randomize(Eva(**settings)).double().eval()


def before_the_norm(backbone, x):
    """The map (B, h, w, C) that the last block returns."""
    kept = []
    handle = backbone.out_norm.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    with torch.no_grad():
        backbone(x)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize(("window", "global_every"), [(24, 1), (4, 5), (4, 2)])
@pytest.mark.parametrize("fused", [False, True])
def test_with_one_window_on_the_map_it_is_the_network_of_timm(window, global_every, fused):
    plain = timm_network(qkv_fused=fused)
    backbone = ViTBackbone(copy.deepcopy(plain), [16], window, global_every).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = plain.forward_intermediates(x, indices=[3], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(before_the_norm(backbone, x).flatten(1, 2), expected, rtol=1e-9, atol=1e-9)


def rotated(x, shape):
    """Rotary embedding of (N, d): half of the channels turn with the row, half with the column, pair by pair."""
    rows, columns = shape
    cells = [(i / rows * 16, j / columns * 16) for i in range(rows) for j in range(columns)]
    out, half = torch.empty_like(x), x.shape[1] // 2
    for n, place in enumerate(cells):
        for axis in range(2):
            for k in range(half // 2):
                angle = place[axis] * 10000 ** (-2 * k / half)
                a, b = x[n, axis * half + 2 * k], x[n, axis * half + 2 * k + 1]
                out[n, axis * half + 2 * k] = a * math.cos(angle) - b * math.sin(angle)
                out[n, axis * half + 2 * k + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(tokens, attn, shape):
    """Attention among the cells (N, C) of one window, head by head."""
    q, k, v = attn.q_proj(tokens), tokens @ attn.k_proj.weight.T, attn.v_proj(tokens)
    heads = []
    for own in torch.arange(tokens.shape[1]).chunk(attn.num_heads):
        scores = rotated(q[:, own], shape) @ rotated(k[:, own], shape).T / math.sqrt(len(own))
        heads.append(scores.softmax(1) @ v[:, own])
    return attn.proj(torch.cat(heads, 1))


def reference(backbone, image, window, global_every):
    """The published map (h, w, C) of one (3, H, W) image."""
    patches = image.unfold(1, 16, 16).unfold(2, 16, 16)
    kernel = backbone.patch_embed.proj
    x = torch.einsum("cyxij,dcij->yxd", patches, kernel.weight) + kernel.bias
    rows, columns, channels = x.shape
    x = x + backbone.positions(rows, columns)[0]
    for index, block in enumerate(backbone.blocks):
        side = (rows, columns) if index % global_every == global_every - 1 else (window, window)
        padded = x.new_zeros(rows + -rows % side[0], columns + -columns % side[1], channels)
        padded[:rows, :columns] = block.norm1(x)
        for top in range(0, rows, side[0]):
            for left in range(0, columns, side[1]):
                part = padded[top : top + side[0], left : left + side[1]]
                part[:] = attention(part.reshape(-1, channels), block.attn, side).reshape(part.shape)
        x = x + padded[:rows, :columns]
        normed, mlp = block.norm2(x), block.mlp
        x = x + mlp.fc2(mlp.norm(F.silu(mlp.fc1_g(normed)) * mlp.fc1_x(normed)))
    return x


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (32, 96)])
def test_windows_and_their_padding_are_the_published_ones(tiny_eva, size):
    backbone = tiny_eva().double().eval()
    image = torch.randn(3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(backbone, image, 4, 2)
    torch.testing.assert_close(before_the_norm(backbone, image[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_what_a_window_has_beside_the_map_is_attended_to(tiny_eva):
    """Without queries all cells of a window count the same: 12 of the map, and 4 beside it, which are the bias."""
    attn = (block := tiny_eva(global_every=5).double().blocks[0]).attn
    with torch.no_grad():
        attn.q_proj.weight.zero_(), attn.q_proj.bias.zero_()
    x = torch.randn(1, 3, 4, 64, dtype=torch.float64)
    values = (12 * attn.v_proj(x).mean((0, 1, 2)) + 4 * attn.v_proj.bias) / 16
    found = block.attend(x, torch.rand(16, 32, dtype=torch.float64))
    torch.testing.assert_close(found, attn.proj(values).expand(1, 3, 4, 64), rtol=1e-9, atol=1e-9)


def test_positions_are_resized_without_a_filter_and_without_the_class_token(tiny_eva):
    backbone = tiny_eva()
    assert backbone.pos_embed.shape == (1, 17, 64)
    assert torch.equal(backbone.positions(4, 4).flatten(1, 2), backbone.pos_embed[:, 1:])
    for size in ((6, 10), (2, 3), (4, 5)):
        expected = resample_abs_pos_embed(backbone.pos_embed, list(size), num_prefix_tokens=1, antialias=False)
        torch.testing.assert_close(backbone.positions(*size).flatten(1, 2), expected[:, 1:])


def layer_norm(x, norm):
    """LayerNorm over the channels of each cell of (c, h, w), eps 1e-6."""
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def published_pyramid(x, parts):
    """The maps p2 to p6 of (c, h, w): what happens to it, one operation after the other."""
    steps = {
        "p2": "double conv1 gelu double conv5 gelu conv8 gelu conv11",
        "p3": "double conv1 gelu conv4 gelu conv7",
        "p4": "conv0 gelu conv3",
        "p5": "pool conv1 gelu conv4",
        "p6": "pool conv1/2 gelu conv4 gelu conv7",
    }
    maps = []
    for name, text in steps.items():
        out, part = x, parts.get_submodule(name)
        for step in text.split():
            if step == "double":
                out = out.repeat_interleave(2, 1).repeat_interleave(2, 2)
            elif step == "gelu":
                out = out * (1 + torch.erf(out / math.sqrt(2))) / 2
            elif step == "pool":
                out = F.max_pool2d(out[None], 3, 2, 1)[0]
            else:
                number, _, stride = step.removeprefix("conv").partition("/")
                weight = part[int(number)].weight
                out = F.conv2d(out[None], weight, None, int(stride or 1), weight.shape[-1] // 2)[0]
                out = layer_norm(out, part[int(number) + 1])
        maps.append(out)
    return maps


def test_the_pyramid_is_the_published_one():
    torch.manual_seed(0)
    pyramid = randomize(Pyramid(16, 8, LEVELS)).double()
    x = torch.randn(16, 6, 8, dtype=torch.float64)
    for ours, expected in zip(pyramid(x[None]), published_pyramid(x, pyramid), strict=True):
        torch.testing.assert_close(ours[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (100, 170), (33, 64), (96, 128)])
def test_maps_of_any_image_have_the_cells_of_their_strides(tiny_eva, size):
    backbone = tiny_eva().eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = backbone(x)
        padded = backbone(F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32)))
    assert backbone.strides == list(LEVELS) and backbone.channels == [256] * 5
    for level, whole, stride in zip(maps, padded, LEVELS, strict=True):
        assert level.shape == (2, 256, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert torch.equal(level, whole[..., : level.shape[2], : level.shape[3]])


def test_images_of_a_batch_do_not_touch(tiny_eva):
    backbone = tiny_eva().eval()
    x = torch.randn(3, 3, 50, 70)
    for together, alone in zip(backbone(x), backbone(x[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_every_trainable_parameter_gets_a_gradient_and_frozen_blocks_none(tiny_eva):
    backbone = tiny_eva(frozen_stages=2, drop_path=0.2, levels=(8, 32))
    sum((m * torch.randn_like(m)).sum() for m in backbone.train()(torch.randn(2, 3, 40, 50))).backward()
    frozen = ("patch_embed", "pos_embed", "blocks.0.", "blocks.1.")
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert {name for name, _ in backbone.pyramid.named_children()} == {"p3", "p5"}


def test_stochastic_depth_spares_frozen_blocks_and_drops_images_not_windows(tiny_eva):
    backbone = tiny_eva(drop_path=0.9, frozen_stages=2, global_every=5).train()
    assert not any(block.training for block in backbone.blocks[:2]) and backbone.blocks[3].training
    block, x = backbone.blocks[3], torch.randn(16, 8, 8, 64)  # four windows an image
    unchanged = (block(x, backbone.rope.get_embed([4, 4])) - x).abs().amax((3,)) == 0
    assert torch.equal(unchanged.flatten(1).any(1), unchanged.flatten(1).all(1)) and unchanged.any()


def test_recomputed_activations_give_the_same_gradients(tiny_eva):
    plain, lean = tiny_eva(drop_path=0.5).double(), tiny_eva(drop_path=0.5, activation_checkpointing=True).double()
    x = torch.randn(2, 3, 40, 50, dtype=torch.float64)
    for backbone in (plain, lean):
        torch.manual_seed(3)  # of the stochastic depth, which the second pass through a block has to repeat
        sum(m.sigmoid().sum() for m in backbone.train()(x)).backward()
    for a, b in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_patches_of_16_pixels_see_what_those_of_14_did():
    """An image of 14 pixels a side that is enlarged to 16 gives the same cell."""
    torch.manual_seed(0)
    network = timm_network(patch_size=14, img_size=56)
    small = torch.randn(5, 3, 14, 14, dtype=torch.float64)
    expected = network.patch_embed.proj(small)
    large = F.interpolate(small, size=(16, 16), mode="bicubic", antialias=True)
    ours = ViTBackbone(network, [16]).double().patch_embed(large)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_timm_and_one_of_the_authors_start_the_same_backbone(tiny_eva, tmp_path):
    settings = {"num_classes": 10, "dynamic_img_size": True}
    network = randomize(timm.create_model(NAME, pretrained=False, **settings))
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, tmp_path / "timm.safetensors")
    words = {".q_proj.bias": ".q_bias", ".v_proj.bias": ".v_bias", "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"}
    words |= {"mlp.norm.": "mlp.ffn_ln."}
    theirs = {"rope.freqs_cos": torch.zeros(4)}
    for name, value in state.items():
        for ours, original in words.items():
            name = name.replace(ours, original)
        theirs[name] = value
    torch.save({"module": theirs}, tmp_path / "original.pt")
    built = []
    for file in ("timm.safetensors", "original.pt"):
        config = BackboneConfig(NAME, checkpoint=str(tmp_path / file), levels=LEVELS, frozen_stages=0)
        built.append(build_backbone(config).state_dict())
    taken = {name for name in built[0] if name.startswith("blocks.")} | {"pos_embed", "patch_embed.proj.bias"}
    assert all(torch.equal(built[0][name], state[name]) for name in taken)
    assert all(torch.equal(built[1][name], built[0][name]) for name in taken | {"patch_embed.proj.weight"})
    assert built[0]["patch_embed.proj.weight"].shape[-2:] == (16, 16)
    kernel = ViTBackbone(copy.deepcopy(network), [16]).patch_embed.proj.weight
    torch.testing.assert_close(built[0]["patch_embed.proj.weight"], kernel)  # as from a download


@pytest.mark.parametrize("detector", [BRSDETRConfig, CoDINOConfig])
def test_a_query_detector_takes_the_pyramid_as_it_is_and_trains_all_of_it(tiny_eva, detector):
    settings = BackboneConfig(NAME, pretrained=False, levels=LEVELS, frozen_stages=0, window_size=4)
    small = {"backbone": settings, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 32, "queries": 10}
    model = build_model(detector(**small, levels=5, rpn=replace(detector().rpn, proposals=40)), 3)
    assert not list(model.neck.parameters())
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(64, 90), (50, 96)]]
    boxes = [torch.tensor([[10.0, 10, 40, 40]]), torch.zeros(0, 4)]
    targets = [{"boxes": own, "labels": torch.zeros(len(own), dtype=torch.long)} for own in boxes]
    losses = sum(model(images, targets).values())
    losses.backward()
    assert losses.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(model.eval()(images)) == 2
    maps = model.backbone(torch.randn(1, 3, 64, 96))
    assert all(torch.equal(a, b) for a, b in zip(model.neck(maps), maps, strict=True))
    narrow = build_model(detector(**small, levels=6, dim=64), 3).neck
    assert [m.shape[1] for m in narrow(maps)] == [64] * 6


def test_a_one_stage_detector_puts_its_feature_pyramid_on_top(tiny_eva):
    settings = BackboneConfig(NAME, pretrained=False, frozen_stages=0, window_size=4)
    model = build_model(RetinaNetConfig(backbone=settings), 3).eval()
    assert [len(layers) for layers in (model.neck.projections, model.neck.extra)] == [3, 2]
    assert len(model([torch.zeros(3, 70, 50, dtype=torch.uint8)])) == 1


def test_networks_and_strides_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=r"model\.backbone\.levels: .* not \[2, 128\]"):
        ViTBackbone(timm_network(), [2, 4, 128])
    other_blocks = timm_network()
    other_blocks.blocks[1] = torch.nn.Identity()
    without_rotations, without_positions = timm_network(use_rot_pos_emb=False), timm_network(use_abs_pos_emb=False)
    for network in (torch.nn.Identity(), other_blocks, without_rotations, without_positions):
        with pytest.raises(RuntimeError, match="cannot be used as an EVA-02 backbone"):
            ViTBackbone(network, [16])
