"""Images out of requests: bounded before a pixel is decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
import time

from PIL import Image, ImageOps, UnidentifiedImageError

from vtc.grey import in_8_bits
from vtc.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
ADDRESSES = ("http://", "https://")
NARROW = 200
"""How many times its shorter side the longer one of an image is at most, as with Qwen-VL's processors: others bring the
shorter side to a size of theirs, and a strip takes all memory."""


def images(urls: list[str], limits: Limits) -> list[Image.Image]:
    """The RGB images behind data URLs, and behind http addresses where those are allowed.

    Raises ValueError, with the reason, for what is no image, too large, or not to be fetched.
    """
    left, found, end = limits.pixels, [], time.monotonic() + limits.seconds
    for url in urls:
        found.append(_decoded(_content(url, limits, end), left))
        left -= found[-1].width * found[-1].height
    return found


def _content(url: str, limits: Limits, end: float) -> bytes:
    if match := re.match(r"data:image/[\w.+-]+;base64,", url):
        try:
            return base64.b64decode(url[match.end() :], validate=True)
        except binascii.Error as error:
            raise ValueError(f"the image is no base64: {error}") from None
    if url.startswith(ADDRESSES):
        if not limits.urls:
            raise ValueError("this server fetches no URLs: send the image as data:image/...;base64,...")
        return _fetched(url, limits, end)
    raise ValueError("an image is a data URL: data:image/...;base64,...")


def _fetched(url: str, limits: Limits, end: float) -> bytes:
    """What stands at a public address, without redirections, read from the very address that was found to be public.

    As the bytes come: what is compressed could become any number of them. `end` is when all images have to be here.
    """
    import httpx

    try:
        at = httpx.URL(url)
        host = at.raw_host.decode()
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
    except (OSError, UnicodeError, httpx.InvalidURL) as error:
        raise ValueError(f"{url[:100]} cannot be found: {error}") from None
    if not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise ValueError(f"{host} is no public address")

    async def read() -> bytes:
        content, extensions = b"", {"sni_hostname": host}
        headers = {"host": at.netloc.decode(), "accept-encoding": "identity"}
        async with (
            asyncio.timeout(end - time.monotonic()),
            httpx.AsyncClient(timeout=None, trust_env=False) as client,
            client.stream("GET", at.copy_with(host=addresses[0]), headers=headers, extensions=extensions) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"{host} answers {response.status_code}")
            if (packed := response.headers.get("content-encoding", "identity")) != "identity":
                raise ValueError(f"{host} sends the image as {packed[:20]}: send it as data:image/...;base64,...")
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limits.body:
                    raise ValueError(f"the image at {host} has more than {limits.body} bytes")
        return content

    try:
        return asyncio.run(read())
    except TimeoutError:
        raise ValueError(f"the image at {host} was not here after {limits.seconds:g} s") from None
    except httpx.HTTPError as error:
        raise ValueError(f"{host} cannot be read: {error}") from None


def _decoded(content: bytes, pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > pixels:  # known from the header
                raise ValueError(f"an image of {image.width} x {image.height} pixels where {pixels} are left to use")
            if max(image.size) > NARROW * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels: one side is over {NARROW} times the other")
            return in_8_bits(ImageOps.exif_transpose(image), "the image").convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"not an image: {', '.join(FORMATS)} are read") from None
    except (ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # Pillow raises anything: SyntaxError for PNG files, struct.error and TypeError for EXIF
        raise ValueError(f"a damaged image: {error}") from None
