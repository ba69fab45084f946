"""Augmentation that users choose, on top of the policy of a recipe: `data.augment.preset` and `data.augment.custom`.

    light       brightness, contrast and saturation within 20 %: exposure differs from camera to camera.
    strong      those and the hue by the ranges of SimCLR (Chen et al. 2020, appendix A), gray, blur, sensor noise and
                JPEG's losses, each in a part of the images: few images, many cameras. Color must not be the class.
    aerial      a quarter turn and both flips, all eight equally often: seen from above nothing is up. Brightness and
                contrast within 20 %: sun and haze.
    industrial  a half turn, since parts lie either way round (unlike a flip it keeps what is left and right);
                brightness and contrast within 15 %, little blur and noise: lamps age, focus drifts. No color changes:
                the color may be the fault that is looked for.

Turns come before the policy, which then sees images of either orientation; changes of the pixels come after it, on the
small image. The ranges come from the papers and from practice; what they gain has not been measured here.

Random numbers come from the caller's generator, as in `transforms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from brs_detr.data.coco import CocoDetection, Target, Transform
from brs_detr.data.config import Preset
from brs_detr.data.transforms import Size, flip_sample, integer, uniform


@dataclass(frozen=True)
class Strength:
    """What a preset does; factors lie within 1 +- the value, probabilities in [0, 1].

    Attributes:
        turns: multiples of 90 degrees to choose from.
        flip: probability of a horizontal flip, besides the policy's.
        brightness, contrast, saturation: ranges of the factors.
        hue: largest rotation of the hue, as a fraction of the circle.
        gray: probability of a gray image.
        blur: probability of a Gaussian blur.
        max_sigma: its largest standard deviation in pixels; the smallest is 0.1.
        noise: probability of noise.
        max_noise: largest standard deviation of the noise, of 255.
        jpeg: probability of JPEG's losses, at a quality of 40 to 95.
    """

    turns: tuple[int, ...] = (0,)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    max_sigma: float = 1.0
    noise: float = 0.0
    max_noise: float = 0.0
    jpeg: float = 0.0


PRESETS: dict[Preset, Strength] = {
    "none": Strength(),
    "light": Strength(brightness=0.2, contrast=0.2, saturation=0.2),
    "strong": Strength(
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        gray=0.1,
        blur=0.2,
        max_sigma=2.0,
        noise=0.2,
        max_noise=10.0,
        jpeg=0.2,
    ),
    "aerial": Strength(turns=(0, 1, 2, 3), flip=0.5, brightness=0.2, contrast=0.2),
    "industrial": Strength(
        turns=(0, 2),
        brightness=0.15,
        contrast=0.15,
        blur=0.2,
        max_sigma=1.5,
        noise=0.2,
        max_noise=5.0,
    ),
}


class PresetTransforms:
    """Turn and flip an image, apply the policy of a recipe, and change the pixels of its result.

    Args:
        policy: of the recipe: `TrainTransforms`, `SSDTransforms` or `LSJTransforms`.
        strength: of the preset.
        custom: the user's own augmentation, applied first; None without.
    """

    def __init__(self, policy: Transform, strength: Strength, custom: Transform | None = None) -> None:
        self.policy, self.strength, self.custom = policy, strength, custom

    def __call__(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """Augment one image; arguments and result as of `TrainTransforms`."""
        if self.custom is not None:
            image, target = self.custom(image, target, generator)
        turns = self.strength.turns
        image, target = turn_sample(image, target, turns[integer(0, len(turns) - 1, generator)])
        if uniform(generator) < self.strength.flip:
            image, target = flip_sample(image, target)
        image, target = self.policy(image, target, generator)
        return change_pixels(image, self.strength, generator).contiguous(), target

    def connect(self, dataset: CocoDetection) -> None:
        """Let the policy draw other images of the dataset, if it does so."""
        if hasattr(self.policy, "connect"):
            self.policy.connect(dataset)

    def largest_sizes(self, height: int, width: int) -> list[Size]:
        """Return (h, w) of the largest images that one of this size can become, as `TrainTransforms` does.

        Those of a custom augmentation that changes the aspect ratio are not known.
        """
        largest: Callable[[int, int], list[Size]] = self.policy.largest_sizes  # type: ignore[attr-defined]
        turned = largest(width, height) if any(turn % 2 for turn in self.strength.turns) else []
        return [*largest(height, width), *turned]


def turn_sample(image: Tensor, target: Target, turns: int) -> tuple[Tensor, Target]:
    """Turn an image (3, h, w), its boxes and its masks counterclockwise by multiples of 90 degrees; exact."""
    turned, boxes = dict(target), target["boxes"].reshape(-1, 4)
    for _ in range(turns % 4):
        # the point (x, y) of an image of width w comes to (y, w - x)
        x0, y0, x1, y1 = boxes.unbind(1)
        boxes = torch.stack([y0, image.shape[-1] - x1, y1, image.shape[-1] - x0], 1)
        image = torch.rot90(image, 1, (-2, -1))
        if "masks" in turned:
            turned["masks"] = torch.rot90(turned["masks"], 1, (-2, -1)).contiguous()
    return image, {**turned, "boxes": boxes}


def change_pixels(image: Tensor, strength: Strength, generator: torch.Generator) -> Tensor:
    """Change colors, sharpness and noise of an image (3, h, w) uint8.

    Colors come in a random order, as in torchvision's ColorJitter, since they do not commute.
    """
    adjustments = (
        (F.adjust_brightness, strength.brightness),
        (F.adjust_contrast, strength.contrast),
        (F.adjust_saturation, strength.saturation),
    )
    for index in torch.randperm(len(adjustments), generator=generator).tolist():
        adjust, extent = adjustments[index]
        if extent:
            image = adjust(image, 1 + extent * (2 * uniform(generator) - 1))
    if strength.hue:
        image = F.adjust_hue(image, strength.hue * (2 * uniform(generator) - 1))
    if uniform(generator) < strength.gray:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if uniform(generator) < strength.blur:
        sigma = 0.1 + (strength.max_sigma - 0.1) * uniform(generator)
        size = 2 * math.ceil(3 * sigma) + 1  # beyond three standard deviations nothing is left
        if min(image.shape[-2:]) > size // 2:  # it is padded by reflection
            image = F.gaussian_blur(image, [size, size], [sigma, sigma])
    if uniform(generator) < strength.jpeg:
        image = F.jpeg(image, integer(40, 95, generator))
    if uniform(generator) < strength.noise:
        noise = torch.randn(image.shape, generator=generator) * (strength.max_noise * uniform(generator))
        image = (image + noise).round_().clamp_(0, 255).to(torch.uint8)
    return image
