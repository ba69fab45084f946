"""Read what `sources.py` lists, frame by frame, and write videos; videos and cameras need PyAV, which is optional.

Frames are decoded one after the other and never kept. A video file is opened here and handed to the decoder, which may
use none but the formats named below: a playlist that calls itself .mp4 could make it read any other file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brs_detr.data.config import Limits
from brs_detr.data.image_io import ImageError, decode_image, read_image
from brs_detr.data.sources import MISSING, Source, has_pyav
from brs_detr.data.web import TIMEOUT, fetch
from brs_detr.user_files import UserFileError, open_regular, require_at_most

# of FFmpeg: containers of video, and what cameras send
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,m4v,h264,hevc,ivf"
STREAM_FORMATS = f"{FORMATS},rtsp,rtp,sdp,hls,mpjpeg,live_flv"
STREAM_PROTOCOLS = "http,https,httpproxy,tcp,tls,crypto,rtsp,rtsps,rtp,srtp,udp,rtmp,rtmps"  # never file
CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
DEFAULT_RATE = Fraction(30)  # frames a second, of a stream that does not say


class VideoError(ImageError):
    """A video or camera that cannot be read, or not to its end; the message names it."""


@dataclass(frozen=True, eq=False)
class Frame:
    """An image, or a frame of a video.

    Attributes:
        source: what it is of.
        pixels: (3, h, w) uint8 RGB.
        index: number of the frame from 0; None for an image.
        time: seconds since the video's begin.
        rate: frames a second of the video.
    """

    source: Source
    pixels: Tensor
    index: int | None = None
    time: float | None = None
    rate: Fraction = DEFAULT_RATE


def read_sources(
    sources: Iterable[Source], limits: Limits, max_frames: int | None = None, images_only: bool = False
) -> Iterator[Frame | ImageError]:
    """Iterate over the images and frames of all sources.

    Args:
        sources: in the order to read them.
        limits: on the sizes of files and images.
        max_frames: of each video or camera; None: all.
        images_only: refuse a URL whose server sends a video.

    Yields:
        A frame; or the error of a source that cannot be read, or of a video that breaks off after its last frame.
    """
    for source in sources:
        try:
            yield from read_source(source, limits, max_frames, images_only)
        except ImageError as error:
            yield error


def read_source(
    source: Source, limits: Limits, max_frames: int | None = None, images_only: bool = False
) -> Iterator[Frame]:
    """Iterate over the frames of one source; an image is one. The arguments are those of `read_sources`.

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
        if images_only:
            raise VideoError(f"{source.name}: the server sends a video, whose frames have no ids in --annotations.")
        source = source._replace(kind="video")
    yield from read_video(source, limits, max_frames)


def read_video(source: Source, limits: Limits, max_frames: int | None = None) -> Iterator[Frame]:
    """Iterate over the frames of a video or camera.

    Args:
        source: a file, a URL or a camera.
        limits: maximum number of pixels of a frame.
        max_frames: end after so many; None: when the video ends.

    Raises:
        VideoError: PyAV is missing, the video cannot be opened or has no frames, or it breaks off; the frames before
            that have been returned.
    """
    if not has_pyav():
        raise VideoError(f"{source.name}: {MISSING}.")
    import av

    count = 0
    try:
        with contextlib.ExitStack() as stack:
            container = _open(source, stack)
            if not container.streams.video:
                raise UserFileError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = _rate(stream)
            for frame in container.decode(stream):
                require_at_most(frame.width * frame.height, limits.max_image_pixels, "data.max_image_pixels", "pixels")
                seconds = count / float(rate) if frame.time is None else float(frame.time)
                yield Frame(source, _pixels(frame), count, round(seconds, 6), rate)
                count += 1
                if max_frames is not None and count >= max_frames:
                    return
    except (av.FFmpegError, OSError, UserFileError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        if count:
            raise VideoError(f"{source.name}: it breaks off after {count} frames: {reason}.") from None
        what = "video" if source.kind != "camera" else "stream" if "://" in source.address else "camera"
        # a server may send files from their begin only, and the index of an mp4 is often at its end
        advice = " If players show it, download it and name the file." if source.address.startswith("http") else ""
        raise VideoError(f"{source.name}: this {what} cannot be read: {reason}.{advice}") from None
    if not count:
        raise VideoError(f"{source.name}: this video has no frames.")


def _open(source: Source, stack: contextlib.ExitStack) -> Any:
    """Open a file, stream or camera; the stack closes it."""
    import av

    if source.kind == "camera" and "://" not in source.address:
        return stack.enter_context(_open_camera(source.address))
    if "://" in source.address:
        options = {"protocol_whitelist": STREAM_PROTOCOLS, "format_whitelist": STREAM_FORMATS, "rtsp_transport": "tcp"}
        return stack.enter_context(av.open(source.address, options=options, timeout=(TIMEOUT, TIMEOUT)))
    file = stack.enter_context(open_regular(source.address))
    if not os.fstat(file.fileno()).st_size:
        raise UserFileError("the file is empty")
    return stack.enter_context(av.open(file, options={"format_whitelist": FORMATS}))


def _open_camera(address: str) -> Any:
    """Open a camera of this machine by its number or device."""
    import av

    kind = CAMERA_FORMATS.get(sys.platform, "v4l2")
    if kind == "v4l2":
        address = f"/dev/video{address}" if address.isdigit() else address
        os.stat(address)  # FFmpeg's own message does not name it
    elif kind == "dshow":  # which knows cameras by name only
        cameras = [one for one in av.enumerate_input_devices("dshow") if "video" in one.media_types]
        if int(address) >= len(cameras):
            raise UserFileError(f"this machine has {len(cameras)} cameras, numbered from 0")
        address = f"video={cameras[int(address)].name}"
    return av.open(address, format=kind)


def _rate(stream: Any) -> Fraction:
    """Return the frames a second that a stream states; some state nothing or nonsense."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(rate) if rate and 0 < rate <= 1000 else DEFAULT_RATE


def _pixels(frame: Any) -> Tensor:
    """Convert a frame to (3, h, w) uint8 RGB, upright as players show it."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise, as `rot90` turns
    return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, turns).transpose(2, 0, 1)))


class VideoWriter:
    """Write images as the frames of an mp4 file, which appears under its name when it is closed.

    Args:
        path: file to write; its folder must exist.
        rate: frames a second.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        import av

        self.path, self.rate = path, rate.limit_denominator(65535)  # the largest that MPEG-4 can state
        # short, since the name itself may be as long as a name can be
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        self._partial = path.with_name(f".{digest}.partial.mp4")
        self._container = av.open(str(self._partial), "w", format="mp4")
        self._stream: Any = None

    def write(self, image: Image.Image) -> None:
        """Append an image; all have the size of the first one, rounded down to even numbers."""
        import av

        if self._stream is None:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self.rate)
            # H.264 stores color at half the resolution
            self._stream.width, self._stream.height = (max(2, side - side % 2) for side in image.size)
            self._stream.pix_fmt = "yuv420p"
        size = (self._stream.width, self._stream.height)
        near = all(0 <= own - side <= 1 for own, side in zip(image.size, size, strict=True))
        image = image.crop((0, 0, *size)) if near else image.resize(size)
        try:
            self._container.mux(self._stream.encode(av.VideoFrame.from_image(image)))
        except OSError:  # of the disk
            raise
        except av.FFmpegError as error:
            self._stream = None  # there is nothing to finish
            reason = (error.strerror or str(error)).rstrip(".")
            raise VideoError(f"{self.path}: this video cannot be written: {reason}. Add --no-images.") from None

    def close(self) -> None:
        """Finish the file and give it its name."""
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if self._stream is not None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)
