"""What a data set's pictures are: their files, their sizes, whether they decode."""

import hashlib
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from florence2.errors import InvalidRequest
from florence2.images import FORMATS, SIDEWAYS, UPRIGHT, decode
from florence2.locations import Size

_TEXT_OR_EXIF = (b"eXIf", b"zTXt", b"tEXt", b"iTXt")


def upright_size(path: Path) -> Size:
    """(width, height) of the picture as `florence2.images.decode` gives it, from the file's header.

    Raises ValueError for a file that is missing or no picture.
    """
    # Path.is_file raises for names that are too long.
    if not os.path.isfile(path):
        raise ValueError(missing(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return _upright(image, path)
    except Exception:
        raise ValueError(f"the picture {path} can't be read; replace it or take its lines out") from None


def missing(path: Path) -> str:
    return f"the picture {path} is missing; put it there, or name the pictures' folder with --images"


def _upright(image: Image.Image, path: Path) -> Size:
    width, height = image.size
    # TIFF: PIL has turned the size already.
    if image.format == "TIFF":
        return width, height
    if image.format == "PNG" and _says_more_behind_pixels(path):
        image.load()
    try:
        # PngImageFile.getexif would decode the pixels to look behind them.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:
        orientation = None
    return (height, width) if UPRIGHT.get(orientation) in SIDEWAYS else (width, height)


def _says_more_behind_pixels(png: Path) -> bool:
    with png.open("rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in _TEXT_OR_EXIF:
                return True
            file.seek(length + 4, 1)
    return False


@dataclass(frozen=True)
class Seen:
    """A picture that was read whole: its file's sha256, and what is wrong with it."""

    digest: bytes
    problem: str = ""


def see(path: Path) -> Seen:
    try:
        data = path.read_bytes()
    except OSError as error:
        return Seen(b"", f"the picture {path} can't be read ({error.strerror})")
    digest = hashlib.sha256(data).digest()
    try:
        decode(data)
    except InvalidRequest as error:
        return Seen(digest, f"{path}: {error}")
    return Seen(digest)


def see_all(paths: list[Path]) -> list[Seen]:
    return [see(path) for path in paths]
