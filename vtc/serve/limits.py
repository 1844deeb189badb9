"""What a server takes, and how much it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may be, and how many there may be."""

    body: int = 16 * 2**20
    """Bytes of a request, images in base64 included."""
    pixels: int = 16_000_000
    """Of all images of a request."""
    images: int = 8
    new_tokens: int = 512
    """Of an answer; also where a request names none."""
    waiting: int = 64
    """Requests that are answered or wait for it; one more is told when to come again."""
    seconds: float = 30
    """Until a request, or an image behind a URL, has to be here."""
    urls: bool = False
    """Whether images are fetched from http and https addresses."""


@dataclass(frozen=True)
class Sizes:
    """What the engine holds."""

    cache: int = 16_384
    """Tokens of the paged KV cache, in whole blocks."""
    page: int = 16
    """Tokens of one of its blocks; only whole blocks are shared."""
    batch: int = 1024
    """Tokens of one step of the decoder."""
    requests: int = 64
    """Requests of one step."""
    remembered: int = 16_384
    """Visual tokens of images that may come again."""
    tower: int = 16
    """Images that go through the vision tower at once."""
