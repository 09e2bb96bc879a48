"""Image files -> upright RGB pixels at the model's size, with limits on what is decoded."""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from florence2.errors import InvalidRequest

# PIL opens what many phones write under the name .jpg, MPO, as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Of files in these formats."""
PIL_MEGAPIXELS = 178
"""PIL opens nothing larger than twice its MAX_IMAGE_PIXELS."""
_DATA_URL = re.compile(rb"\s{0,8}data:[\w/+.;=-]{0,100};base64,", re.IGNORECASE)
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\r\n\f\v"
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_SIDEWAYS = (
    *(Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE),
    *(Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
)


@dataclass(frozen=True)
class Limits:
    megapixels: float = 100
    """At most PIL_MEGAPIXELS count."""
    megabytes: float = 50
    """Of the encoded file, 1 MB = 10**6 bytes."""


def decode(data: bytes, limits: Limits = Limits()) -> Image.Image:
    """An encoded image file, or the same in base64 -> its first frame, upright, mode RGB.

    base64: the standard or the URL-safe alphabet, padded, with or without line breaks and a data URL's head. Alpha is
    dropped and palettes are expanded as PIL's `convert("RGB")` does, which is what users of HF's processors call;
    16-bit grey keeps its range. Raises InvalidRequest for what is no image, broken, or past the limits.
    """
    with _opened(data, limits) as image:
        try:
            image.load()
            return _rgb(_upright(image))
        except Exception as error:
            raise InvalidRequest(f"the image is damaged or cut short ({error})") from None


def upright_size(data: bytes, limits: Limits = Limits()) -> tuple[int, int]:
    """(width, height) of the picture that `decode` gives, from the file's head. Raises InvalidRequest as that does, but
    for damage further on."""
    with _opened(data, limits) as image:
        if image.format == "TIFF":
            # PIL turns these itself as it loads them, and tells the size of after that before.
            return decode(data, limits).size
        turn = _turn(image)
        return (image.height, image.width) if turn in _SIDEWAYS else image.size


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        # PIL warns of what is refused below, and of damage that doesn't matter.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(_plain(data, limits)), formats=FORMATS)
        except InvalidRequest:
            raise
        except Image.DecompressionBombError:
            allowed = min(limits.megapixels, PIL_MEGAPIXELS)
            raise InvalidRequest(f"the image has too many pixels; {allowed:g} megapixels are allowed") from None
        except Exception:
            raise InvalidRequest(
                "the image can't be read: it is none of JPEG, PNG, WebP, BMP, TIFF and GIF, or damaged"
            ) from None
        if image.width * image.height > limits.megapixels * 1e6:
            raise InvalidRequest(
                f"the image has {image.width} x {image.height} pixels; {limits.megapixels:g} megapixels are allowed"
            )
        yield image


class Resizer:
    """RGB pictures -> the pixels of the checkpoint's HF image processor (its PIL backend), before normalisation."""

    def __init__(self, preprocessor: Mapping[str, Any]) -> None:
        size = preprocessor["size"]
        self.size = (size["width"], size["height"])
        self.resample = Image.Resampling(preprocessor["resample"])

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """-> u8 [height, width, 3]."""
        return np.asarray(image.resize(self.size, self.resample))


def _plain(data: bytes, limits: Limits) -> bytes:
    # Every format has bytes outside base64 in its header, so the test can't mistake a file.
    url = _DATA_URL.match(data)
    text = data[url.end() if url else 0 :].translate(_FROM_URL_SAFE, _WHITESPACE)
    if not text.translate(None, _BASE64):
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise InvalidRequest("the image is no image file and its base64 is damaged or cut short") from None
    if not data:
        raise InvalidRequest("the image is empty; send an encoded image file, or the same in base64")
    if len(data) > limits.megabytes * 1e6:
        raise InvalidRequest(f"the image file has {len(data) / 1e6:.1f} MB; {limits.megabytes:g} MB are allowed")
    return data


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also writes the EXIF block anew, and fails where that has a tag it can't write.
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        # A damaged EXIF block says nothing; the pixels are whole.
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's convert would clip every value above 255 to white.
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")
