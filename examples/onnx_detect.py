"""Find objects in an image with an exported detector: numpy, Pillow and onnxruntime, nothing else.

`python -m brs_detr export RUN --out model.onnx`, then `python examples/onnx_detect.py model.onnx image.jpg`
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def resize(image: Image.Image, metadata: dict) -> Image.Image:
    """The image at its test size, its aspect ratio kept, smaller where the detector's input is."""
    width, height = image.size
    factor = min(metadata["long_side"] / max(width, height), metadata["short_side"] / min(width, height))
    if metadata["size"] is not None:
        factor = min(factor, metadata["size"][0] / height, metadata["size"][1] / width)
    size = max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))
    if metadata["antialias"]:
        return image.resize(size, Image.Resampling.BILINEAR)
    stretch = (width / size[0], 0, 0, 0, height / size[1], 0)
    return image.transform(size, Image.Transform.AFFINE, stretch, Image.Resampling.BILINEAR)


def as_input(image: Image.Image, metadata: dict, kind: type) -> tuple:
    """What the detector takes: pixels (1, 3, H, W), the resized image in the top left corner, and its size (1, 2)."""
    resized = resize(image, metadata)
    width, height = resized.size
    pixels = np.zeros((1, 3, *(metadata["size"] or (height, width))), kind)
    pixels[0, :, :height, :width] = np.asarray(resized).transpose(2, 0, 1)
    return pixels, np.array([[height, width]], np.int64)


def to_image(boxes: np.ndarray, image: Image.Image, sizes: np.ndarray) -> np.ndarray:
    """The boxes (n, 4) of a resized image in pixels of the image itself."""
    height, width = sizes[0]
    return boxes * np.array([image.width / width, image.height / height] * 2, np.float32)


def show(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, metadata: dict, threshold: float | None) -> None:
    """Print what is found from a score on, or from that of each class's best F1 in validation."""
    for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
        if score >= (metadata["thresholds"][label] if threshold is None else threshold):
            name = f"{metadata['classes'][label]} (category {metadata['category_ids'][label]})"
            print(f"{score:.4f}  x {x1:.2f} y {y1:.2f} width {x2 - x1:.2f} height {y2 - y1:.2f}  {name}")


def detect(session: onnxruntime.InferenceSession, metadata: dict, image: Image.Image) -> tuple:
    """boxes (n, 4) x1, y1, x2, y2 in pixels of the image, scores (n,), labels (n,); best first."""
    kind = np.uint8 if session.get_inputs()[0].type == "tensor(uint8)" else np.float32
    pixels, sizes = as_input(image, metadata, kind)
    boxes, scores, labels = (array[0] for array in session.run(None, {"pixels": pixels, "sizes": sizes}))
    return to_image(boxes, image, sizes), scores, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="file of `python -m brs_detr export`")
    parser.add_argument("image")
    parser.add_argument("--threshold", type=float, help="lowest score (default: of each class's best F1 in validation)")
    options = parser.parse_args()

    session = onnxruntime.InferenceSession(options.model, providers=onnxruntime.get_available_providers())
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    boxes, scores, labels = detect(session, metadata, Image.open(options.image, formats=["JPEG", "PNG"]).convert("RGB"))
    show(boxes, scores, labels, metadata, options.threshold)


if __name__ == "__main__":
    main()
