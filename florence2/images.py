"""Image files -> upright RGB pixels at the model's size, with limits on what is decoded."""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from florence2.errors import InvalidRequest

# PIL opens what many phones write under the name .jpg, MPO, as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_BASE64 = re.compile(rb"\s*(?:data:[\w/+.-]*;base64,)?([A-Za-z0-9+/\s]+=*\s*)")


@dataclass(frozen=True)
class Limits:
    megapixels: float = 100
    megabytes: float = 50
    """Of the encoded file, 1 MB = 10**6 bytes."""


def decode(data: bytes, limits: Limits = Limits()) -> Image.Image:
    """An encoded image file, or the same base64-encoded -> its first frame, upright, mode RGB.

    Alpha is dropped and palettes are expanded as PIL's `convert("RGB")` does, which is what users of HF's processors call;
    16-bit grey keeps its range. Raises InvalidRequest for what is no image, broken, or past the limits.
    """
    data = _plain(data, limits)
    with warnings.catch_warnings():
        # Our own limit is checked below, before any pixel is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise InvalidRequest(f"the image has more than {limits.megapixels:g} megapixels") from None
        except Exception:
            raise InvalidRequest(
                "the image can't be read: it is none of JPEG, PNG, WebP, BMP, TIFF and GIF, or damaged"
            ) from None
        megapixels = image.width * image.height / 1e6
        if megapixels > limits.megapixels:
            raise InvalidRequest(f"the image has {megapixels:.1f} megapixels; {limits.megapixels:g} are allowed")
        try:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
        except Exception as error:
            raise InvalidRequest(f"the image is damaged or cut short ({error})") from None


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
    if not data:
        raise InvalidRequest("the image is empty; send an encoded image file, or the same in base64")
    # No image format starts with a letter run that is also whole base64, so the test can't mistake a file.
    text = _BASE64.fullmatch(data)
    if text:
        try:
            data = base64.b64decode(b"".join(text.group(1).split()), validate=True)
        except binascii.Error:
            raise InvalidRequest("the image is no image file and its base64 is damaged or cut short") from None
    if len(data) > limits.megabytes * 1e6:
        raise InvalidRequest(f"the image file has {len(data) / 1e6:.1f} MB; {limits.megabytes:g} MB are allowed")
    return data


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's convert would clip every value above 255 to white.
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")
