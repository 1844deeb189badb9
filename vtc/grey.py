"""Grey pictures of more than 8 bits a pixel."""

from __future__ import annotations

from PIL.Image import Image


def in_8_bits(image: Image, name: str) -> Image:
    """Grey of 16 bits scaled to 8, where Pillow would clip it to white. Any other image as it is.

    Raises ValueError, which says `name`, for grey of 32 bits or of floating point: nobody knows which value is white.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    grey = image if image.mode == "F" else image.convert("I")
    low, high = grey.getextrema()
    if grey.mode == "F" or low < 0 or high > 65535:  # type: ignore[operator]
        raise ValueError(f"{name} has grey values from {low:g} to {high:g}; save it with 8 or 16 bits a pixel")
    return grey.point(lambda value: value / 257 + 0.5).convert("L")
