"""The published Co-DETR and Co-DINO checkpoints by name.

Nothing here needs torch: a misspelled name is answered at once.

The Co-Deformable-DETR files lie in one Google Drive folder of the authors, without published checksums or sizes. Such a
file is checked by its own checksums (a PyTorch file is a zip) and, when it is converted, tensor by tensor. The Co-DINO
files are those of MMDetection, whose names end in the first digits of their SHA-256; all but one it has converted from
those of the authors. Their names say the augmentation of the training, as the authors' do.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

PAGE = "https://github.com/Sense-X/Co-DETR#model-zoo"
DRIVE_FOLDER = "1asWoZ3SuM6APTL9D-QUF_YW9mjULNdh9"
OPENMMLAB = "https://download.openmmlab.com/mmdetection/v3.0/codetr/"


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        name: by which it is asked for; that of its file without ending.
        ap: published AP on COCO val2017, in percent; None: of another dataset.
        epochs: of its training.
        backbone: in the words of its publication.
        url: of the file; "": it lies in `folder`.
        folder: id of a Google Drive folder that holds NAME.pth; "": there is an address.
        sha256: its checksum or the first digits of it; "": not published.
        license: of the project that publishes it.
    """

    name: str
    ap: float | None
    epochs: int
    backbone: str
    url: str = ""
    folder: str = ""
    sha256: str = ""
    license: str = "MIT"


def _deformable(size: str, epochs: int, ap: float, backbone: str) -> Published:
    return Published(f"co_deformable_detr_{size}_coco", ap, epochs, backbone, folder=DRIVE_FOLDER)


def _dino(name: str, digits: str, epochs: int, ap: float | None, backbone: str, path: str = "") -> Published:
    url = f"{OPENMMLAB}{path}{name}-{digits[:8]}.pth"
    return Published(name, ap, epochs, backbone, url, "", digits, "Apache-2.0")


_R50_LSJ = "co_dino_5scale_r50_lsj_8xb2_1x_coco"
TABLE = {
    entry.name: entry
    for entry in (
        _deformable("r50_1x", 12, 49.5, "ResNet-50"),
        _deformable("swin_tiny_1x", 12, 51.7, "Swin-T"),
        _deformable("swin_tiny_3x", 36, 54.1, "Swin-T"),
        _deformable("swin_small_1x", 12, 53.4, "Swin-S"),
        _deformable("swin_small_3x", 36, 55.3, "Swin-S"),
        _deformable("swin_base_1x", 12, 55.5, "Swin-B"),
        _deformable("swin_base_3x", 36, 57.5, "Swin-B"),
        _deformable("swin_large_1x", 12, 56.9, "Swin-L"),
        _deformable("swin_large_900q_3x", 36, 58.5, "Swin-L"),
        _dino("co_dino_5scale_r50_1x_coco", "7481f903", 12, 52.1, "ResNet-50"),
        _dino(_R50_LSJ, "69a72d67", 12, 52.0, "ResNet-50", f"{_R50_LSJ}/"),
        _dino("co_dino_5scale_lsj_r50_3x_coco", "fe5a6829", 36, 54.8, "ResNet-50"),
        _dino("co_dino_5scale_swin_large_1x_coco", "27c13da4", 12, 58.9, "Swin-L"),
        # the page names this file for the 36 epochs of LSJ (60.7 AP), too, which are thus not published there
        _dino("co_dino_5scale_lsj_swin_large_1x_coco", "3af73af2", 12, 59.3, "Swin-L"),
        _dino("co_dino_5scale_swin_large_3x_coco", "d7a6d8af", 36, 60.0, "Swin-L"),
        # of Objects365's 365 classes: where fine-tuning begins
        _dino("co_dino_5scale_swin_large_22e_o365", "0a33e247", 22, None, "Swin-L"),
        _dino(
            "co_dino_5scale_swin_large_16e_o365tococo",
            "614254c94b57acbff6a4448f7aa5d6315f8483b115438796e2606ce7a62712fe",
            16,
            64.1,
            "Swin-L",
        ),
    )
}
"""Every checkpoint by name."""


def find(name: str) -> Published | None:
    """Return the checkpoint of a name, with or without .pth; None if there is none of it."""
    return TABLE.get(name.removesuffix(".pth"))


def nearest(name: str) -> list[str]:
    """List the names that may have been meant, the nearest first."""
    return difflib.get_close_matches(name.removesuffix(".pth").lower(), TABLE, n=3, cutoff=0.6)
