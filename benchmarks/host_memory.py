"""Host memory of a COCO-sized dataset: `python benchmarks/host_memory.py [--images N] [--objects N] [--workers N]`.

Writes a json of that size, opens it as training does, and reports the time, the peak while reading, the size of the
arrays, and how the private memory of each worker grows while it goes through the dataset. `--plain` does the last with
a list of Python dictionaries instead, for comparison. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from brs_detr.data.coco import CocoDetection
from brs_detr.data.packed import draw_masks


def write_json(folder: Path, images: int, objects: int) -> None:
    """A json like COCO's; all image entries share a few image files, since only the annotations are measured."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(4):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.jpg")
    boxes = np.round(random.uniform(0, 30, (objects, 4)) + (0, 0, 1, 1), 2).tolist()
    owners = random.integers(0, images, objects).tolist()
    polygon = np.round(random.uniform(0, 64, 60), 2).tolist()
    path = folder / "large.json"
    with path.open("w") as file:
        file.write('{"categories": ' + json.dumps([{"id": i, "name": f"c{i}"} for i in range(1, 81)]) + ', "images": [')
        for i in range(images):
            entry = {"id": i, "file_name": f"{i % 4}.jpg", "height": 64, "width": 64}
            file.write((", " if i else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for i, (box, owner) in enumerate(zip(boxes, owners, strict=True)):
            entry = {"id": i + 1, "image_id": owner, "category_id": 1 + i % 80, "bbox": box, "iscrowd": 0}
            entry |= {"area": box[2] * box[3], "segmentation": [polygon]}
            file.write((", " if i else "") + json.dumps(entry))
        file.write("]}")


def memory(key: str, pid: int | str = "self") -> float:
    """MiB of a line of /proc/PID/smaps_rollup or /proc/PID/status."""
    name = "status" if key.startswith("Vm") else "smaps_rollup"
    lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


class Touch(Dataset):
    """Reads the annotations of one image after the other, but no image; says how much private memory it has."""

    def __init__(self, count: int, touch: Callable[[int], object]) -> None:
        self.count, self.touch = count, touch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.touch(index)
        return os.getpid(), memory("Private") if index % 1000 == 0 else -1.0


def toucher(dataset: CocoDetection) -> Callable[[int], object]:
    """Reads what training reads of an image's annotations."""

    def touch(index: int) -> object:
        packed = dataset.packed
        rows = slice(packed.offsets[index], packed.offsets[index + 1])
        if packed.mask_words is not None:
            draw_masks(packed, np.arange(rows.start, rows.stop), tuple(packed.frames[index].tolist()))
        return packed.boxes[rows].sum() + packed.labels[rows].sum(), dataset.path(index)

    return touch


def plain_toucher(path: Path) -> Callable[[int], object]:
    """The same from lists of Python dictionaries, as many projects keep them."""
    data = json.loads(path.read_text())
    by_image: dict[int, list] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return lambda index: [sum(annotation["bbox"]) + annotation["category_id"] for annotation in by_image[index]]


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--objects", type=int, default=860_001)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="Python dictionaries instead of arrays")
    parser.add_argument("--masks", action="store_true", help="also keep the masks, and draw them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writer = multiprocessing.Process(target=write_json, args=(folder, args.images, args.objects))
        writer.start()
        writer.join()
        path = folder / "large.json"
        print(f"json: {path.stat().st_size / 2**20:,.0f} MiB, {args.images:,} images, {args.objects:,} objects")
        before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
        if args.plain:
            touch, what = plain_toucher(path), "lists of dictionaries"
        else:
            dataset = CocoDetection(path, folder / "images", train=True, masks=args.masks)
            touch = toucher(dataset)
            arrays = [value for value in vars(dataset.packed).values() if value is not None]
            what = f"arrays of {sum(value.nbytes for value in arrays) / 2**20:.0f} MiB"
        print(
            f"{what}: opened in {time.perf_counter() - start:.1f} s ({time.process_time() - cpu:.1f} s of CPU); "
            f"process {before:.0f} -> {memory('VmRSS'):.0f} MiB, peak {memory('VmHWM'):.0f} MiB"
        )
        loader = DataLoader(
            Touch(args.images, touch), 64, num_workers=args.workers, collate_fn=list, persistent_workers=True
        )
        for epoch in range(args.epochs):
            seen: dict[int, list[float]] = {}
            for batch in loader:
                for pid, private in batch:
                    if private >= 0:
                        seen.setdefault(pid, []).append(private)
            growth = [f"{values[0]:.0f} -> {values[-1]:.0f}" for values in seen.values()]
            print(f"epoch {epoch + 1}: private MiB of each worker, first -> last image: {', '.join(growth)}")


if __name__ == "__main__":
    main()
