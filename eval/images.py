"""Image files in, overlays out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

from vtc.grey import in_8_bits

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
DARK = 0.15
"""Brightness that a dropped patch keeps, so that one still sees what was dropped."""


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder by name, unopened. Raises ValueError where there is no folder or no image."""
    if not folder.is_dir():
        raise ValueError(f"no such folder of images: {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"no image ({', '.join(sorted(SUFFIXES))}) in {folder}")
    return files


def open_image(path: Path) -> Image.Image:
    """An RGB image, upright by its EXIF orientation. Refuses, with the reason, what is no image or is too large."""
    if not path.is_file():  # also keeps pipes and devices out, which would block or never end
        raise ValueError(f"no such image file: {path}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size / 2**20:.1f} MB; the limit is {MAX_BYTES // 2**20} MB")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before a pixel is decoded
                raise ValueError(
                    f"{path} has {image.width} x {image.height} pixels; the limit is {MAX_PIXELS / 1e6:.0f} megapixels"
                )
            return in_8_bits(ImageOps.exif_transpose(image), str(path)).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than {MAX_PIXELS / 1e6:.0f} megapixels") from None
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
        raise ValueError(f"{path} is a damaged image: {error}") from None


def check_picture_path(path: Path) -> None:
    """Refuse, before any work is done, a path that no picture can be written to."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: name an image file, for example picture.png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.absolute().parent}")


def seen_box(size: tuple[int, int], image_processor: Any) -> tuple[int, int, int, int]:
    """The part of a (width, height) image that the model sees: (left, top, right, bottom) in pixels.

    CLIP's processor scales the shortest edge and crops the centre; others squeeze the whole image in.
    """
    width, height = size
    edge = dict(getattr(image_processor, "size", None) or {}).get("shortest_edge")
    crop = dict(getattr(image_processor, "crop_size", None) or {}).get("height")
    if not (getattr(image_processor, "do_center_crop", False) and edge and crop):
        return 0, 0, width, height
    side = min(width, height) * crop / edge
    seen_width, seen_height = round(min(side, width)), round(min(side, height))
    left, top = (width - seen_width) // 2, (height - seen_height) // 2
    return left, top, left + seen_width, top + seen_height


def overlay(image: Image.Image, kept: Tensor, tokens: int, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """`image` with the patches of dropped tokens dark, at its own size.

    `kept` holds the raster indices of the tokens that stayed, of the `tokens` of a square patch grid over `box`
    (default: the whole image). What lies outside the box was never seen by the model and is dark as well.
    Raises ValueError where the tokens make no square grid (several crops, merged patches).
    """
    side = math.isqrt(tokens)
    if side * side != tokens or not tokens:
        raise ValueError(f"an overlay needs a square grid of patches, but this image has {tokens} visual tokens")
    left, top, right, bottom = box or (0, 0, *image.size)
    cells = bytearray(tokens)
    for index in kept.tolist():
        cells[index] = 255
    grid = Image.frombytes("L", (side, side), bytes(cells))
    mask = Image.new("L", image.size, 0)
    mask.paste(grid.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    return Image.composite(image, image.point(lambda value: round(value * DARK)), mask)
