"""Everything that counts as a picture, as the bytes of an encoded image file."""

import http.client
import io
import os
import time
import urllib.error
import urllib.request
from typing import BinaryIO
from urllib.parse import quote

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from florence2.images import Limits

Image = str | os.PathLike[str] | bytes | PIL.Image.Image | NDArray[np.uint8] | BinaryIO
"""A path; a str that starts with http:// or https://, which the client fetches; an encoded file's bytes; a PIL image;
u8 [H, W, 3] RGB, [H, W, 4] RGBA or [H, W] grey; a file object that is open for reading bytes. Files are turned upright
by their EXIF; a PIL image and an array are taken as they are."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
_CHUNK = 2**16
_IN_URLS = "!#$%&'()*+,/:;=?@[]~"
"""What stays as it is: all that RFC 3986 allows, escapes that are there already included."""


def encoded(image: Image, seconds: float = 300) -> bytes:
    """The file to send. A URL is fetched within `seconds`, and up to the size that the server takes.

    Raises ValueError for what is no picture, OSError for a path or URL that can't be read."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, PIL.Image.Image):
        return _png(image)
    if isinstance(image, np.ndarray):
        return _png(_from_array(image))
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        return _fetch(image, seconds)
    if isinstance(image, str | os.PathLike):
        with open(image, "rb") as file:
            return file.read()
    read = getattr(image, "read", None)
    data = read() if read is not None else None
    if not isinstance(data, bytes):
        raise ValueError(
            f"{type(image).__name__} is no picture: give a path, a URL, bytes, a PIL image, a numpy array, or a file "
            "that is open for reading bytes"
        )
    return data


def again(image: Image, data: bytes) -> Image:
    """What to keep of a picture whose bytes were `data`, to read it once more: a file object is at its end by then."""
    return data if hasattr(image, "read") and not isinstance(image, PIL.Image.Image) else image


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    # PNG has no CMYK, YCbCr and the like; 16-bit grey must not be clipped by PIL's conversion.
    as_png = image if image.mode in _PNG_MODES else image.convert("RGB")
    # A third of the time of PIL's default, for files a little larger.
    as_png.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _from_array(pixels: NDArray[np.uint8]) -> PIL.Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(
            f"an array is a picture as uint8 [H, W, 3] in RGB order, or [H, W] grey, not {pixels.dtype} {pixels.shape}"
        )
    return PIL.Image.fromarray(pixels)


def _fetch(url: str, seconds: float) -> bytes:
    limit, until = int(Limits().megabytes * 1e6), time.monotonic() + seconds
    # Some sites refuse urllib's own name.
    request = urllib.request.Request(quote(url, safe=_IN_URLS), headers={"User-Agent": "florence2-triton"})
    data = bytearray()
    try:
        with _opener().open(request, timeout=seconds) as response:
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > limit:
                    raise ValueError(f"{url} has more than {limit / 1e6:g} MB, which is what the server takes")
                if time.monotonic() > until:
                    raise TimeoutError(f"not fetched in {seconds:g} s")
            if response.length:
                raise OSError(f"it ended {response.length} bytes early")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from error
    return bytes(data)


def _opener() -> urllib.request.OpenerDirector:
    """Without file:// and ftp://, so that no redirection leads there."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener
