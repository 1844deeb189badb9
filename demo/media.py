"""What visitors send: images and short videos, opened within bounds, and made small for the browser."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError

from vtc.eval.images import MAX_BYTES, MAX_PIXELS, open_image

PICTURES = 8
"""Images, or frames of a video, of one prompt."""
SIDE = 2048
"""Pixels of the longer side; larger images are scaled down."""
SHOWN = 1024
"""The longer side of the picture that is sent to the browser."""
LONGEST = 1800
"""Frames of a video, before some are chosen."""
DECODED = 2_000_000_000
"""Pixels of all frames of a video, which are decoded before some are chosen: a minute or so on one core."""
FILMS = (".mp4", ".webm", ".mov", ".mkv", ".avi")
ANIMATED = ("GIF", "PNG", "WEBP")


@dataclass(frozen=True)
class Picture:
    """One image of the prompt."""

    image: Image.Image
    name: str
    """As the visitor knows it: the file's name, with the number of the frame."""


def opened(uploads: Sequence[dict[str, Any]]) -> tuple[Picture, ...]:
    """The pictures of gradio's uploads, in order; a video becomes its frames.

    Raises ValueError, which names the file as the visitor knows it and not where it lies.
    """
    _check_count(len(uploads))
    pictures: list[Picture] = []
    for upload in uploads:
        path = Path(upload["path"])
        name = upload.get("orig_name") or path.name
        try:
            frames = _frames(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name)) from None
        _check_count(len(pictures) + len(frames))
        for number, frame in enumerate(frames, 1):
            pictures.append(Picture(frame, f"{name}, frame {number}" if len(frames) > 1 else name))
    return tuple(pictures)


def _check_count(pictures: int) -> None:
    """Before more files are opened."""
    if pictures > PICTURES:
        raise ValueError(f"These are {pictures} images and frames at least; the limit is {PICTURES} in one prompt.")


def _frames(path: Path) -> list[Image.Image]:
    """A still image alone, or the frames of a short video, made small one by one."""
    if path.is_file() and path.stat().st_size <= MAX_BYTES:  # what is larger is refused as any image is
        if path.suffix.lower() in FILMS:
            return sampled(_small(_film(path), path))
        try:
            with Image.open(path) as image:
                small = image.width * image.height <= MAX_PIXELS
                if small and image.format in ANIMATED and getattr(image, "is_animated", False):
                    return sampled(_small(ImageSequence.Iterator(image), path))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError):
            pass  # `open_image` says why
    image = open_image(path)
    image.thumbnail((SIDE, SIDE))
    return [image]


def _small(frames: Iterable[Image.Image], path: Path) -> Iterator[Image.Image]:
    """RGB copies of at most `SIDE`. Raises ValueError once a video has more than `DECODED` pixels."""
    pixels = 0
    for frame in frames:
        pixels += frame.width * frame.height
        if pixels > DECODED:
            most = f"{DECODED / 1e6:,.0f} megapixels"
            raise ValueError(f"The frames of {path} have more than {most} together: cut it shorter or scale it down.")
        small = frame.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        yield small


def sampled(frames: Iterable[Image.Image], most: int = PICTURES) -> list[Image.Image]:
    """Evenly spaced frames from the first on, more than half of `most` where there are so many; holds no others.

    Raises ValueError for a video of more than `LONGEST` frames.
    """
    kept, step = [], 1
    for number, frame in enumerate(frames):
        if number >= LONGEST:
            raise ValueError(f"This video has more than {LONGEST:,} frames: cut it shorter.")
        if len(kept) == most and number % step == 0:
            kept, step = kept[::2], 2 * step
        if number % step == 0:
            kept.append(frame)
    return kept


def _film(path: Path) -> Iterator[Image.Image]:
    """The frames of a video file."""
    try:
        import av
    except ImportError:
        raise ValueError(
            f"{path} is a video file, and reading it needs PyAV on this server (pip install av); "
            "animated GIF, PNG and WebP work without"
        ) from None
    try:
        with av.open(str(path)) as film:
            for frame in film.decode(video=0):
                if frame.width * frame.height > MAX_PIXELS:
                    raise ValueError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} megapixels")
                yield frame.to_image()
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a video that can be read: {error}") from None


def data_url(image: Image.Image) -> str:
    """The image, scaled down to `SHOWN` where it is larger, for the browser."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((SHOWN, SHOWN))
    kind = "png" if max(image.size) <= 256 else "jpeg"
    small.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
