"""Backbones from timm with the feature maps and the normalization that a detector needs.

`build_backbone` builds all of them. ResNets keep the parameter names of torchvision and timm; Swin gets its own module
(`swin.py`), since timm's classification Swin does not compute the published detection features, and so does EVA-02
(`vit.py`), which has one map only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import FeatureListNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from brs_detr.models.backbones.availability import require_reachable
from brs_detr.models.backbones.deformable import make_deformable
from brs_detr.models.backbones.norms import freeze_batch_norm, group_norm_for_batch_norm
from brs_detr.models.backbones.swin import SwinBackbone, rename_official_swin
from brs_detr.models.backbones.vit import ViTBackbone, rename_eva
from brs_detr.models.backbones.weights_io import State, flat_name, load_backbone_weights
from brs_detr.models.config import BackboneConfig

FIRST_STAGE_STRIDE = 4  # maps of a smaller stride belong to the stem


class TimmBackbone(nn.Module):
    """Timm network that returns its feature maps at chosen strides.

    Args:
        features: a network built by timm with `features_only=True`.
        strides: ascending, a subset of the network's own.
        activation_checkpointing: recompute the blocks in the backward pass instead of keeping their activations.

    Attributes:
        channels: of each returned map.
        strides: of each returned map.
        stages: name of the last module of each stage from stride 4 on.
        grain: images are padded to a multiple of so many pixels, and the maps cut to those of the image; 1 for networks
            that take any size, as most do.
        unused: names of the parameters that no returned map depends on, such as those of stages above the last one.

    Raises:
        ValueError: the network takes images of certain sizes only, or returns no tensors.
    """

    def __init__(self, features: nn.Module, strides: Sequence[int], activation_checkpointing: bool = False) -> None:
        super().__init__()
        info = _feature_info(features).info
        picked = {item["reduction"]: item for item in info if item["reduction"] in strides}
        self.strides = list(strides)
        self.channels = [picked[stride]["num_chs"] for stride in strides]
        self.stages = [flat_name(item["module"]) for item in info if item["reduction"] >= FIRST_STAGE_STRIDE]
        self.returned = [flat_name(picked[stride]["module"]) for stride in strides]
        self.channels_last = getattr(getattr(features, "output_fmt", None), "value", "NCHW") == "NHWC"
        self.activation_checkpointing = activation_checkpointing
        # FeatureListNet is a dictionary of modules. They become children of this module, so that their names are those
        # of the published checkpoints, and those above the last wanted map are dropped.
        self.taken_apart = isinstance(features, FeatureListNet)
        if isinstance(features, FeatureListNet):
            for name, module in features.items():
                self.add_module(name, module)
                if flat_name(name) == self.returned[-1]:
                    break
        else:
            self.features = features
        self.grain = 1
        self._try_out(max(item["reduction"] for item in info))
        if activation_checkpointing and not self.taken_apart:
            cast(Any, features).set_grad_checkpointing(True)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        if mode:  # for a completely frozen backbone, keep_frozen_in_eval calls this method with False
            keep_frozen_in_eval(self)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute one (B, c, h, w) map per stride from (B, 3, H, W) normalized images of any size."""
        height, width = x.shape[-2:]
        if self.grain > 1:
            x = F.pad(x, (0, -width % self.grain, 0, -height % self.grain))
        if self.taken_apart:
            maps: list[Tensor] = []
            for name, module in self.named_children():
                x = self._run(flat_name(name), module, x)
                if flat_name(name) in self.returned:
                    maps.append(x)
        else:
            maps = self.features(x)
        if self.channels_last:
            maps = [rearrange(level, "b y x d -> b d y x").contiguous() for level in maps]
        if self.grain == 1:
            return list(maps)
        # Maps end where those of any other backbone would, so that a cell is where its index says.
        return [
            level[..., : -(-height // stride), : -(-width // stride)]
            for level, stride in zip(maps, self.strides, strict=True)
        ]

    def _try_out(self, largest: int) -> None:
        """Set `grain` to 1 or to the largest stride, whichever lets an image of an odd size pass, and `unused`."""
        image = torch.zeros(1, 3, 2 * largest + 1, 3 * largest - 1, device=next(self.parameters()).device)
        self.eval()  # no statistics of this image and no random numbers
        for self.grain in (1, largest):
            try:
                with torch.enable_grad():
                    maps = self(image)
                break
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
        else:
            raise ValueError(
                f"this backbone takes images of certain sizes only ({reason}). Choose one that takes any, such as "
                "resnet50.tv_in1k or a Swin."
            )
        if not all(isinstance(level, Tensor) for level in maps):
            raise ValueError("this backbone returns lists in place of feature maps, like SelecSLS. Choose another one.")
        used = _sources(maps)
        self.unused = {name for name, parameter in self.named_parameters() if parameter not in used}
        self.train()

    def _run(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """Run a module; a stage block by block, with activation checkpointing, if that is on."""
        if not (self.activation_checkpointing and self.training and name in self.stages and torch.is_grad_enabled()):
            out: Tensor = module(x)
            return out
        for block in module if isinstance(module, nn.Sequential) else [module]:
            x = recompute(block, x, use_reentrant=False)
        return x


def _sources(results: Sequence[Tensor]) -> set[Tensor]:
    """Return the parameters that tensors were computed from."""
    nodes = [result.grad_fn for result in results if result.grad_fn is not None]
    seen, sources = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):  # the end of the graph, where a gradient is accumulated
            sources.add(node.variable)
        following = {other for other, _ in getattr(node, "next_functions", ())} - seen
        seen |= following
        nodes += following
    return sources


def build_backbone(config: BackboneConfig) -> SwinBackbone | TimmBackbone | ViTBackbone:
    """Build a backbone by its timm name.

    Returns:
        A module with `.channels`, `.strides` and `forward((B, 3, H, W)) -> list of (B, c, h, w)`.

    Raises:
        ValueError: the name, a stride or a setting does not exist.
        RuntimeError: the weights cannot be downloaded.
    """
    name, norm = config.name, config.norm
    if norm not in ("frozen", "batch", "group"):
        raise ValueError(f"model.backbone.norm={norm} is not known. Choose frozen, batch or group.")
    check_name(name)
    strides, checkpointing = sorted(config.levels), config.activation_checkpointing
    download = config.pretrained and config.checkpoint is None
    if download:
        require_reachable(name)
    architecture = plain_name(name).partition(".")[0]
    rename: Callable[[State], State] | None = None
    if timm.models.is_model_in_modules(architecture, ["swin_transformer"]):
        settings = {"num_classes": 0, **SwinBackbone.TIMM_SETTINGS}
        network = cast(SwinTransformer, _create(name, download, config.drop_path, **settings))
        _require_strides(name, [item["reduction"] for item in network.feature_info], strides)
        backbone: SwinBackbone | TimmBackbone | ViTBackbone = SwinBackbone(network, strides, checkpointing)
        rename = rename_official_swin
    elif architecture.startswith("eva02_"):
        whole = _create(name, download, config.drop_path, num_classes=0, dynamic_img_size=True)
        backbone = ViTBackbone(whole, strides, config.window_size, config.global_every, checkpointing)
        rename = rename_eva
    else:
        backbone = _timm_backbone(name, download, config.drop_path, strides, checkpointing)
    make_deformable(backbone, config.deformable_stages, config.deformable_groups)
    if norm == "group":
        group_norm_for_batch_norm(backbone)
    elif norm == "frozen":
        freeze_batch_norm(backbone, random_weights=not (config.pretrained or config.checkpoint))
    if config.checkpoint is not None:
        load_backbone_weights(backbone, config.checkpoint, rename)
    freeze_stages(backbone, config.frozen_stages)
    for name, parameter in cast(nn.Module, backbone).named_parameters():
        # Without a gradient, they would end a training on several processes at its second step.
        if name in getattr(backbone, "unused", ()):
            parameter.requires_grad_(False)
    if config.channels_last:
        # A convolution passes on the layout of its weights, so the maps have it too. Loading and moving keep it.
        cast(nn.Module, backbone).to(memory_format=torch.channels_last)
    return backbone.train()


def freeze_stages(backbone: nn.Module, count: int) -> None:
    """Stop training the stem and the first `count` stages, batch statistics included; 0 freezes nothing.

    Raises:
        ValueError: the backbone has fewer stages, or no module of its own for one, like HRNet.
    """
    stages: list[str] = cast(Any, backbone).stages
    if not 0 <= count <= len(stages):
        raise ValueError(f"model.backbone.frozen_stages={count}: this backbone has {len(stages)} stages.")
    if count == 0:
        return
    stage = stages[count - 1]
    modules = [module for _, module in backbone.named_modules()]
    names = [flat_name(name.removeprefix("features.")) for name, _ in backbone.named_modules()]
    # Modules are registered in order of use: all up to the stage's last one belong to it or come before it.
    own = [index for index, name in enumerate(names) if name == stage or name.startswith(stage + "_")]
    if not own:
        raise ValueError(
            f"model.backbone.frozen_stages={count}: this backbone has no module for stage {stage}. Set it to 0."
        )
    for module in modules[: own[-1] + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def keep_frozen_in_eval(module: nn.Module) -> None:
    """Put every part without trainable parameters into evaluation mode: no batch statistics, no stochastic depth."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        keep_frozen_in_eval(child)


def plain_name(name: str) -> str:
    """Return a backbone's name in timm's own list; for a name of the hub or a folder, that of its architecture.

    Raises:
        ValueError, RuntimeError, OSError: there is no such backbone, or it cannot be looked up.
    """
    if ":" not in name:
        return name
    config: Any = timm.create_model(name, pretrained=False).pretrained_cfg
    return str(config["architecture"])


def check_name(name: str) -> None:
    """Raise for a name that timm does not know, with the most similar ones.

    Raises:
        ValueError: there is no such network, or no such weights of it.
    """
    if ":" in name:  # hf-hub:... and local-dir:... name a location, not an entry of timm's list
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"model.backbone.name={name}: timm has no such model; did you mean {', '.join(near) or '-'}?")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        near = difflib.get_close_matches(name, tags, n=4, cutoff=0.0)
        raise ValueError(f"model.backbone.name={name}: timm has no such weights. Choose from {', '.join(near) or '-'}.")


def _timm_backbone(name: str, download: bool, drop_path: float, strides: list[int], recomputed: bool) -> TimmBackbone:
    """Build a `TimmBackbone`; a first network, without weights, shows which levels there are."""
    features = _create(name, False, drop_path, features_only=True)
    reductions = _feature_info(features).reduction()
    _require_strides(name, reductions, strides)
    settings: dict[str, Any] = {}
    if not isinstance(features, FeatureListNet):  # unused levels of other wrappers cannot be dropped afterwards
        settings["out_indices"] = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides)
    if download or settings:
        features = _create(name, download, drop_path, features_only=True, **settings)
    return TimmBackbone(features, strides, recomputed)


def _feature_info(network: nn.Module) -> Any:
    """Return timm's description of a network's feature levels."""
    return network.feature_info


def _create(name: str, download: bool, drop_path: float, **settings: Any) -> nn.Module:
    """Create a timm network, with errors that name the setting."""
    try:
        # Given even if 0: some networks of timm have stochastic depth by default.
        return timm.create_model(name, pretrained=download, drop_path_rate=drop_path, **settings)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        if drop_path > 0:
            raise ValueError(f"model.backbone.drop_path: {name} has no stochastic depth. Set it to 0.") from error
        return timm.create_model(name, pretrained=download, **settings)
    except (OSError, RuntimeError) as error:
        if not download:
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RuntimeError(
            f"the pretrained weights of {name} cannot be downloaded ({reason}). Set model.backbone.checkpoint=PATH to "
            "a local file, or model.backbone.pretrained=false to start from random weights."
        ) from error


def _require_strides(name: str, available: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise if a network lacks a map of a wanted stride."""
    if missing := sorted(set(wanted) - set(available)):
        raise ValueError(
            f"model.backbone.name={name} has maps of stride {sorted(set(available))}, but model.backbone.levels "
            f"needs {missing}. Use a network with pyramid features, such as resnet50.tv_in1k, or other levels."
        )
