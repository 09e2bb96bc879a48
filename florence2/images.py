"""Image files -> upright RGB pixels at the model's size, with limits on what is decoded."""

import base64
import binascii
import ctypes
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile

from florence2 import image_headers
from florence2.errors import InvalidRequest

# PIL opens what many phones write under the name .jpg, MPO, as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Of files in these formats."""
PIL_MEGAPIXELS = 178
"""PIL opens nothing larger than twice its MAX_IMAGE_PIXELS."""
MAX_LAYERS = 8
"""So often may a TIFF's strips or tiles cover the picture: once for every channel, if those lie apart."""
MAX_RUN_LENGTH_MEGAPIXELS = 1.5
"""Of a run-length encoded BMP, which PIL decodes in Python, and of the 255 rows that it may skip at a time."""
_RAW_EXIF = "Raw profile type exif"
"""A text in a PNG, as ImageMagick writes it and PIL reads it."""
_MAX_RAW_EXIF = 1 << 20
_DATA_URL = re.compile(rb"\s{0,8}data:[\w/+.;=-]{0,100};base64,", re.IGNORECASE)
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\r\n\f\v"
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
SIDEWAYS = (
    *(Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE),
    *(Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
)


@dataclass(frozen=True)
class Limits:
    megapixels: float = PIL_MEGAPIXELS
    """No more than these count."""
    megabytes: float = 50
    """Of the encoded file, 1 MB = 10**6 bytes."""


Room = Callable[[int], AbstractContextManager[object]]
"""Pixels of a picture -> what is entered while it is decoded."""


def quiet_pil() -> None:
    """For a server, once: PIL's warnings aren't logged. They tell of damage that doesn't matter and of what is refused.

    Not done around each picture: Python's filters are the process's, not the thread's.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with suppress(OSError, AttributeError):
        # libtiff, which PIL's wheels come with, writes to stderr by itself.
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


def decode(data: bytes, limits: Limits = Limits(), room: Room = nullcontext) -> Image.Image:
    """An encoded image file, or the same in base64 -> its first frame, upright, mode RGB.

    base64: the standard or the URL-safe alphabet, padded, with or without line breaks and a data URL's head. Alpha is
    dropped and palettes are expanded as PIL's `convert("RGB")` does, which is what users of HF's processors call;
    16-bit grey keeps its range. `room` is entered once the limits are kept and left with the picture decoded: for those
    who decode several pictures side by side. At most two copies of the picture are held at once, 8 bytes a pixel, and
    what the format's decoder takes. Raises InvalidRequest for what is no image, broken, or past the limits.
    """
    file = _opened(data, limits)
    with room(file.width * file.height):
        try:
            file.load()
            turn = _turn(file)
            # Without copying. PIL's readers hold their file and decoder, some of them until garbage is collected.
            image = file._new(file.im)
            file.close()
            del file
            if turn is not None:
                image = image.transpose(turn)
            if image.mode == "I" or image.mode.startswith("I;16"):
                # PIL's convert would clip every value above 255 to white.
                image = image.convert("I")
                image = image.point(lambda value: value * (1 / 256))
                image = image.convert("L")
            # PIL warns where it can't keep it.
            image.info.pop("transparency", None)
            return image if image.mode == "RGB" else image.convert("RGB")
        except Exception as error:
            raise InvalidRequest(f"the image is damaged or cut short ({_one_line(error)})") from None


def upright_size(data: bytes, limits: Limits = Limits()) -> tuple[int, int]:
    """(width, height) of the picture that `decode` gives. Raises InvalidRequest as that does, but for damage further on
    than has to be read for it."""
    image = _opened(data, limits)
    if image.format == "TIFF":
        # PIL turns these itself as it loads them, and tells the size of after that before.
        return decode(data, limits).size
    turn = _turn(image)
    return (image.height, image.width) if turn in SIDEWAYS else image.size


def _opened(data: bytes, limits: Limits) -> ImageFile:
    file = image_headers.Opening(image_headers.checked(_plain(data, limits)))
    try:
        image = Image.open(file, formats=FORMATS)
        _bound_loading(image)
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        allowed = min(limits.megapixels, PIL_MEGAPIXELS)
        raise InvalidRequest(f"the image has too many pixels; {allowed:g} megapixels are allowed") from None
    except Exception:
        raise InvalidRequest(
            "the image can't be read: it is none of JPEG, PNG, WebP, BMP, TIFF and GIF, or damaged"
        ) from None
    file.opened = True
    pixels = image.width * image.height
    if pixels > limits.megapixels * 1e6:
        raise InvalidRequest(
            f"the image has {image.width} x {image.height} pixels; {limits.megapixels:g} megapixels are allowed"
        )
    return image


def _bound_loading(image: ImageFile) -> None:
    """What would take PIL longer to load than its pixels do is refused or made quicker."""
    pixels = image.width * image.height
    run_length = any(tile[0] == "bmp_rle" for tile in image.tile)
    if run_length and image.width * (image.height + 255) > MAX_RUN_LENGTH_MEGAPIXELS * 1e6:
        raise InvalidRequest("the BMP is too large for run-length encoding; save it uncompressed or as PNG")
    # PIL reads 64 kB at a time and copies all that it has until a row is whole; a picture may be one row, of 8 bytes a
    # pixel if it is 16-bit RGBA.
    image.decodermaxblock = max(1 << 20, 8 * image.width)
    if image.format == "TIFF":
        _check_tiles(image, pixels)
        # Of those that aren't, PIL reads the EXIF and GPS directories too, unbounded, in case somebody asks later.
        image.is_animated = True  # type: ignore[attr-defined]


def _check_tiles(image: ImageFile, pixels: int) -> None:
    tiles = sorted((offset, (box[2] - box[0]) * (box[3] - box[1])) for _, box, offset, _ in image.tile if box)
    if sum(area for _, area in tiles) > MAX_LAYERS * pixels:
        raise InvalidRequest("the TIFF is damaged: its strips or tiles cover it again and again")
    # PIL reads no more at a time than up to where the next one begins.
    least = 8 if image.mode in ("1", "L", "P") else 1
    if any(0 < after - offset < area / least for (offset, area), (after, _) in pairwise(tiles)):
        raise InvalidRequest("the TIFF is damaged: its strips or tiles overlap in the file")


class Resizer:
    """RGB pictures -> the pixels of the checkpoint's HF image processor (its PIL backend), before normalisation."""

    def __init__(self, preprocessor: Mapping[str, Any]) -> None:
        size = preprocessor["size"]
        self.size = (size["width"], size["height"])
        self.resample = Image.Resampling(preprocessor["resample"])

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """-> u8 [height, width, 3]."""
        return np.asarray(image.resize(self.size, self.resample))


def check_bytes(data: bytes, limits: Limits) -> None:
    """Raises InvalidRequest for what is too long, whether it is an image file or base64."""
    # base64 takes 4/3, line breaks up to 1/32 of that.
    if len(data) > 1.4 * limits.megabytes * 1e6 + 200:
        raise _too_long(data, limits)


def _plain(data: bytes, limits: Limits) -> bytes:
    check_bytes(data, limits)
    url = _DATA_URL.match(data)
    start = url.end() if url else 0
    # Every format has bytes outside base64 in its header, so the test can't mistake a file.
    if not data[start : start + 64].translate(None, _BASE64 + b"-_" + _WHITESPACE):
        text = data[start:].translate(_FROM_URL_SAFE, _WHITESPACE)
        if not text.translate(None, _BASE64):
            try:
                data = base64.b64decode(text, validate=True)
            except binascii.Error:
                raise InvalidRequest("the image is no image file and its base64 is damaged or cut short") from None
    if not data:
        raise InvalidRequest("the image is empty; send an encoded image file, or the same in base64")
    if len(data) > limits.megabytes * 1e6:
        raise _too_long(data, limits)
    return data


def _too_long(data: bytes, limits: Limits) -> InvalidRequest:
    return InvalidRequest(f"the image file has {len(data) / 1e6:.1f} MB; {limits.megabytes:g} MB are allowed")


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        raw = image.info.get(_RAW_EXIF, "")
        if len(raw) > _MAX_RAW_EXIF:
            return None
        # What `getexif` reads.
        image_headers.check_tags(image.info.get("exif") or bytes.fromhex("".join(raw.split("\n")[3:])))
        # ImageOps.exif_transpose also writes the EXIF block anew, and fails where that has a tag it can't write.
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        # A damaged EXIF block says nothing; the pixels are whole.
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
