"""The `predict` command: detect objects in images, videos and cameras; write what is found and draw it."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from brs_detr.config import ConfigError
from brs_detr.data.image_io import ImageError
from brs_detr.data.sources import Source, expand
from brs_detr.data.video import Frame, VideoWriter, read_sources
from brs_detr.detections import Detections
from brs_detr.ops.masks import encode_masks
from brs_detr.ops.rle import as_text
from brs_detr.predictor import Predictor
from brs_detr.run.output_dir import require_writable
from brs_detr.run.prediction_files import Labels, convert, drawing_names, id_of, read_image_ids, require_own_labels
from brs_detr.user_files import complain, printable
from brs_detr.viz.boxes import draw_detections

REPORT_EVERY = 100  # frames of a video


def run(options: argparse.Namespace) -> int:
    """Predict every image and frame and return the exit code: 1 if none could be read."""
    folder = options.out / "detections"  # of the drawings, which must not become images of the next start
    sources, drawn = expand(options.sources, folder)
    if drawn:
        say(f"{printable(folder)}: {drawn} images or videos are left out, as drawings are written there.")
    if not sources:
        raise FileNotFoundError(f"{' '.join(options.sources)}: only drawings are in it. Name {folder} to look at them.")
    if options.annotations is not None:
        _require_images(sources)
    drawings = dict(zip((one.name for one in sources), drawing_names([Path(one.stem) for one in sources]), strict=True))
    stems = {name: drawing.with_suffix("") for name, drawing in drawings.items()}
    if options.format == "yolo":
        require_own_labels(sources, stems)
    predictor = Predictor.load(options.weights, device=options.device, overrides=options.overrides)
    if predictor.note and not options.raw_scores:
        say(printable(f"{predictor.note}."))
    if predictor.remark:
        say(predictor.remark)
    labels = Labels(predictor.classes, predictor.category_ids, stems)
    if options.annotations is not None:
        image_ids = read_image_ids(options.annotations, labels, predictor.limits.max_json_bytes)
        labels = labels._replace(image_ids=image_ids)
    require_writable(options.out, "--out")
    partial = options.out / "predictions.partial.jsonl"  # remains if this process is killed
    drawer = None if options.no_images else Drawer(folder, drawings, predictor.classes)
    report = Report(labels)
    with open(partial, "w", encoding="utf-8") as lines:
        try:
            images_only = options.annotations is not None
            items = report.timed(read_sources(sources, predictor.limits, options.max_frames, images_only))
            for frame, found in detect(predictor, items, options):
                lines.write(json.dumps(record(frame, found)) + "\n")
                lines.flush()
                report.add(frame, found)
                if drawer is not None:
                    drawer.draw(frame, found)
        except KeyboardInterrupt:
            if not any(one.kind == "camera" for one in sources):
                raise
        finally:  # also on an error or Ctrl-C: keep the predictions made so far
            try:
                report.close()
                if drawer is not None:
                    drawer.close()
            finally:  # also if a video cannot be finished
                if report.count:
                    convert(partial, options.out, options.format, labels)
                    say(f"saved in {printable(options.out)}")
                partial.unlink(missing_ok=True)
    if not report.count:
        complain(f"nothing was written: none of the {len(sources)} source(s) could be read, for the reasons above.")
        return 1
    return 0


def _require_images(sources: Iterable[Source]) -> None:
    """Refuse videos and cameras, whose frames have no ids in a dataset.

    Raises:
        ConfigError: naming the first one.
    """
    for source in sources:
        if source.kind in ("video", "camera"):
            raise ConfigError(
                f"--annotations: {printable(source.name)} is a {source.kind}, whose frames have no ids there. Name "
                "only images, or leave --annotations out."
            )


def detect(
    predictor: Predictor, items: Iterable[Frame | ImageError], options: argparse.Namespace
) -> Iterator[tuple[Frame, Detections]]:
    """Detect objects in frames, in batches; print the errors among them."""
    shared: dict[str, Any] = {
        "threshold": options.threshold,
        "batch_size": options.batch,
        "raw_scores": options.raw_scores,
    }
    frames = _readable(items)
    # with tiles, a batch is of tiles
    while group := list(islice(frames, 1 if options.tiles else options.batch)):
        if options.tiles is None:
            yield from zip(group, predictor.predict([frame.pixels for frame in group], **shared), strict=True)
            continue
        tiling = {"overlap": options.tile_overlap, "whole_image": options.whole_image}
        for frame in group:
            yield frame, predictor.predict_tiles(frame.pixels, options.tiles, **tiling, **shared)


def _readable(items: Iterable[Frame | ImageError]) -> Iterator[Frame]:
    for item in items:
        if isinstance(item, ImageError):
            say(f"skipped: {item}")
        else:
            yield item


def say(text: object) -> None:
    """Print a line; if nobody reads it any more, as after `| head`, or the disk under it is full, go on without."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class Report:
    """The lines on the terminal: one for each image, and for each video some.

    Args:
        labels: with `image_ids`, an image that has none is named.
    """

    def __init__(self, labels: Labels) -> None:
        self.labels, self.count = labels, 0
        self._video: Source | None = None
        self._frames = self._objects = 0
        self._note = ""
        self._starts: dict[str, float] = {}  # by name of a video when its first frame was read

    def timed(self, items: Iterable[Frame | ImageError]) -> Iterator[Frame | ImageError]:
        """Hand on frames and errors, and start the clock of each video with its first frame."""
        for item in items:
            if isinstance(item, Frame) and item.index is not None:
                self._starts.setdefault(item.source.name, time.monotonic())
            yield item

    def add(self, frame: Frame, found: Detections) -> None:
        """Report an image, or count a frame."""
        self.count += 1
        note = f"; {found.note}" if found.note else ""
        note += ". --threshold sets another" if "its threshold" in found.note else ""
        if frame.index is None:
            self.close()
            known = self.labels.image_ids is None or id_of(frame.source.name, self.labels.image_ids) is not None
            note += "" if known else "; it has no id in --annotations, so its objects are left out"
            say(f"{printable(_shown(frame.source))}: {len(found)} objects{printable(note)}")
            return
        if frame.source != self._video:
            self.close()
            self._video, self._frames, self._objects = frame.source, 0, 0
        self._frames, self._objects, self._note = self._frames + 1, self._objects + len(found), note
        if self._frames % REPORT_EVERY == 0:
            say(f"{printable(_shown(frame.source))}: {self._frames} frames, {self._objects} objects ...")

    def close(self) -> None:
        """Report the video whose frames were counted, if there is one."""
        if self._video is None:
            return
        rate = self._frames / max(time.monotonic() - self._starts[self._video.name], 1e-3)
        note = f" In the last frame{self._note.replace(';', '', 1)}" if not self._objects and self._note else ""
        say(
            f"{printable(_shown(self._video))}: {self._frames} frames, {self._objects} objects, {rate:.1f} frames/s"
            f"{printable(f'.{note}' if note else '')}"
        )
        self._video = None


class Drawer:
    """Writes drawings of the detections: of an image a png, of a video an mp4 at its frame rate.

    Args:
        folder: to write to.
        names: by name of a source the path of its drawing in the folder; that of a video gets another ending.
        classes: names of the labels.
    """

    def __init__(self, folder: Path, names: Mapping[str, Path], classes: list[str]) -> None:
        self.folder, self.names, self.classes = folder, names, classes
        self._video: Source | None = None
        self._writer: VideoWriter | None = None

    def draw(self, frame: Frame, found: Detections) -> None:
        """Draw the detections of an image, or append a frame with them to its video."""
        canvas = Image.fromarray(frame.pixels.permute(1, 2, 0).numpy())
        target = self.folder / self.names[frame.source.name]
        target.parent.mkdir(parents=True, exist_ok=True)
        if frame.index is None:
            self.close()
            draw_detections(canvas, found.as_tensors(), None, self.classes, threshold=0.0).save(target)
            return
        if self._writer is None or frame.source != self._video:
            self.close()
            self._video = frame.source
            self._writer = VideoWriter(target.with_suffix(".mp4"), frame.rate)
        # as large as the frame: players show a video in its own size
        drawn = draw_detections(canvas, found.as_tensors(), None, self.classes, threshold=0.0, min_side=1, legend=False)
        self._writer.write(drawn)

    def close(self) -> None:
        """Finish the video that is being written, if there is one."""
        if self._writer is not None:
            writer, self._writer, self._video = self._writer, None, None
            writer.close()


def _shown(source: Source) -> str:
    """Name a source on the terminal: a file as it was given."""
    return source.address if source.kind == "image" or "://" not in source.address else source.name


def record(frame: Frame, found: Detections) -> dict[str, Any]:
    """Convert the detections of an image or frame to a record of `run/prediction_files.py`."""
    width, height = found.image_size
    entry: dict[str, Any] = {"file_name": frame.source.name, "width": width, "height": height}
    if frame.index is not None:
        entry |= {"frame": frame.index, "time": frame.time}
    return entry | {"objects": describe(found)}


def describe(found: Detections) -> list[dict]:
    """Convert detections to dictionaries with class names and category ids; boxes are (x, y, w, h) in image pixels.

    Masks, if there are any, become COCO's compressed run lengths, `segmentation`. Scores have six digits, not decimals:
    those of ranking losses are small, and equal scores would lose the order that AP depends on.
    """
    objects = []
    for one in found:
        x1, y1, x2, y2 = one["box"]
        box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
        score = float(f"{one['score']:.6g}")
        objects.append({"name": one["name"], "category_id": one["category_id"], "score": score, "bbox": box})
    if found.masks is not None:
        for entry, runs in zip(objects, encode_masks(torch.from_numpy(found.masks)), strict=True):
            entry["segmentation"] = as_text(runs)
    return objects
