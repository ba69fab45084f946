"""One small dataset written in every layout that `data=` takes, for tests."""

import json
import shutil
from pathlib import Path

from brs_detr.data.synthetic import make_dataset

LAYOUTS = ("coco", "roboflow", "yolo", "voc", "single")
FRACTION = 0.25


def write_layouts(folder, split, images=16):
    """Draw scenes and write them in all layouts.

    Args:
        folder: gets a folder per layout.
        split: `(content of a json, fraction) -> {"train": ..., "val": ...}`, as the layout `single` is split.
        images: their number.

    Returns:
        by layout the settings of section `data` that name it.
    """
    drawn = Path(make_dataset(folder / "drawn", train=images, val=1, image_size=64, seed=3))
    data = json.loads((drawn / "annotations" / "train.json").read_text())
    # VOC has no order of classes but the alphabet's: here the others have the same
    names = sorted(entry["name"] for entry in data["categories"])
    rank = {entry["id"]: names.index(entry["name"]) for entry in data["categories"]}
    for annotation in data["annotations"]:
        annotation["category_id"] = 3 + 10 * rank[annotation["category_id"]]
    data["categories"] = [{"id": 3 + 10 * i, "name": name} for i, name in enumerate(names)]
    parts, image_folder = split(data, FRACTION), drawn / "images" / "train"
    for name, write in (("coco", _coco), ("roboflow", _roboflow), ("yolo", _yolo), ("voc", _voc)):
        write(folder / name, parts, image_folder)
    (folder / "single").mkdir()
    shutil.copytree(image_folder, folder / "single" / "images")
    (folder / "single" / "all.json").write_text(json.dumps(data))
    settings = {name: [f"data={folder / name}"] for name in ("coco", "roboflow", "yolo", "voc")}
    return settings | {"single": [f"data={folder / 'single' / 'all.json'}", f"data.val_fraction={FRACTION}"]}


def _copy(data, source, target):
    target.mkdir(parents=True, exist_ok=True)
    for image in data["images"]:
        shutil.copy(source / image["file_name"], target / image["file_name"])


def _of(data, image):
    return [entry for entry in data["annotations"] if entry["image_id"] == image["id"]]


def _coco(root, parts, image_folder):
    (root / "annotations").mkdir(parents=True)
    for split, data in parts.items():
        _copy(data, image_folder, root / f"{split}2017")
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data))
        (root / "annotations" / f"captions_{split}2017.json").write_text('{"images": [], "annotations": []}')


def _roboflow(root, parts, image_folder):
    """With the category 0 that such exports have."""
    for split, data in parts.items():
        folder = root / {"val": "valid"}.get(split, split)
        _copy(data, image_folder, folder)
        ids = {entry["id"]: i for i, entry in enumerate(data["categories"], 1)}
        group = {"id": 0, "name": "shapes", "supercategory": "none"}
        own = [{"id": ids[e["id"]], "name": e["name"], "supercategory": "shapes"} for e in data["categories"]]
        objects = [{**a, "category_id": ids[a["category_id"]]} for a in data["annotations"]]
        content = {"info": {}, "licenses": [{}], "categories": [group, *own], "images": data["images"]}
        (folder / "_annotations.coco.json").write_text(json.dumps(content | {"annotations": objects}))


def _yolo(root, parts, image_folder):
    for split, data in parts.items():
        _copy(data, image_folder, root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        ids = [entry["id"] for entry in data["categories"]]
        for image in data["images"]:
            lines = []
            for entry in _of(data, image):
                (x, y, w, h), width, height = entry["bbox"], image["width"], image["height"]
                numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                lines.append(
                    " ".join([str(ids.index(entry["category_id"])), *(f"{number:.12f}" for number in numbers)])
                )
            (root / "labels" / split / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    names = json.dumps([entry["name"] for entry in parts["train"]["categories"]])
    (root / "data.yaml").write_text(f"path: ../somewhere/else\ntrain: images/train\nval: images/val\nnames: {names}\n")


def _voc(root, parts, image_folder):
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, data in parts.items():
        _copy(data, image_folder, root / "JPEGImages")
        stems = [Path(image["file_name"]).stem for image in data["images"]]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))
        names = {entry["id"]: entry["name"] for entry in data["categories"]}
        for image in data["images"]:
            objects = ""
            for entry in _of(data, image):
                x, y, w, h = entry["bbox"]
                corners = {"xmin": x, "ymin": y, "xmax": x + w, "ymax": y + h}
                box = "".join(f"<{key}>{value!r}</{key}>" for key, value in corners.items())
                objects += f"<object><name>{names[entry['category_id']]}</name><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
            text = f"<annotation><filename>{image['file_name']}</filename>{size}{objects}</annotation>"
            (root / "Annotations" / image["file_name"]).with_suffix(".xml").write_text(text)
