"""Read what `sources.py` lists, one image or frame after the other; what cannot be read is said and passed over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError, decode_image, read_image
from brs_detr.data.sources import Source
from brs_detr.data.video import Frame, read_video
from brs_detr.data.web import fetch


def read_sources(
    sources: Iterable[Source], limits: Limits, max_frames: int | None = None
) -> Iterator[Frame | ImageError]:
    """Iterate over the images and frames of all sources.

    Args:
        sources: in the order to read them.
        limits: on the sizes of files and images.
        max_frames: of each video or camera; None: all.

    Yields:
        A frame; or the error of a source that cannot be read, or of a video that breaks off after its last frame.
    """
    for source in sources:
        try:
            yield from read_source(source, limits, max_frames)
        except ImageError as error:
            yield error


def read_source(source: Source, limits: Limits, max_frames: int | None = None) -> Iterator[Frame]:
    """Iterate over the frames of one source; an image is one.

    Raises:
        ImageError: it cannot be read, or not to its end.
    """
    if source.kind == "image":
        yield Frame(source, read_image(source.address, limits=limits))
        return
    if source.kind == "url":
        content = fetch(source.address, source.name, limits)
        if content is not None:
            yield Frame(source, decode_image(content, source.name, limits))
            return
        source = source._replace(kind="video")
    yield from read_video(source, limits, max_frames)
