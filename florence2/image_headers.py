"""What the head of an image file may make PIL do, checked before PIL reads it.

PIL reads heads in Python: segment by segment, tag by tag, whatever they say. A few hundred bytes can ask it for
gigabytes, a few megabytes for hours. Such files are refused with InvalidRequest.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import takewhile
from typing import Literal, NamedTuple

from florence2.errors import InvalidRequest

MAX_READS = 10_000
"""While PIL opens a file. One of a thousand tags or 800 kB of XMP in a GIF take fewer."""
MAX_JPEG_HEAD = 16_000_000
"""Bytes before the first scan. Depth maps and ICC profiles of several megabytes are there."""
MAX_JPEG_SEGMENTS = 10_000
MAX_SCANS = 50
"""Of a JPEG. A progressive one has about ten; each goes over the whole picture, however few bytes it has."""
MAX_PNG_DATA_CHUNKS = 50_000
MAX_PNG_CHUNKS = 1000
"""Of other kinds than the pixels'."""
MAX_PNG_COMPRESSED = 64
"""Chunks of text and profiles; PIL takes up to 1 MB out of each."""
MAX_NUMBERS = 2_000_000
"""Bytes of numbers in the tags of a TIFF directory; each number becomes an object."""
MAX_OFFSETS = 200_000
"""Of a TIFF's strips or tiles: 40 megapixels in tiles of 16 x 16."""
MAX_TILE = 1 << 24
"""Pixels in a tile of a TIFF; libtiff decodes whole tiles, however small the picture."""

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"MM\0*", b"II*\0", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")
_EXIF = b"Exif\0\0"
# As libjpeg and PIL look for markers: stuffed zeros, fill bytes and restarts inside the pixels are none.
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_LENGTH = {0xC8, 0xD8, _EOI, *range(0xF0, 0xFE)}
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Of TIFF's types, bytes; PIL skips the others."""
_STRINGS = (1, 2, 7)
"""TIFF's types whose values PIL keeps as they stand."""
_SHORT, _LONG = 3, 4
_STRIP_OFFSETS, _TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS = 273, 322, 323, 324


class Opening(io.BytesIO):
    """A file for `PIL.Image.open`, which may read so often from it until `opened` is set."""

    opened = False
    _reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS and not self.opened:
            raise InvalidRequest("the image's head has too many parts; save the picture anew without its metadata")
        return super().read(size)


def checked(data: bytes) -> bytes:
    """A file -> one with the same first picture that PIL can open safely. Raises InvalidRequest."""
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        return _checked_png(data)
    elif data.startswith(_TIFF):
        _check_tiff(data)
    return data


def check_tags(block: bytes) -> None:
    """Of an EXIF block or a TIFF's first directory: PIL copies every tag, wherever it points, and many may point at the
    same bytes."""
    if block.startswith(_EXIF * 8):
        raise InvalidRequest("the image's EXIF block is damaged; save the picture anew without it")
    # PIL gives up at the first tag that isn't whole.
    read = list(takewhile(lambda tag: tag.whole, _tags(block)))
    numbers = sum(tag.size for tag in read if tag.type not in _STRINGS)
    if numbers > MAX_NUMBERS or sum(tag.size for tag in read) > len(block) + 65536:
        raise InvalidRequest("the image's EXIF or TIFF tags are too large; save the picture anew without them")


def _check_tiff(data: bytes) -> None:
    if data.startswith(b"MM\0+"):
        # PIL takes it for the older TIFF; what a later one reads would go unchecked.
        raise InvalidRequest("the TIFF is a big-endian BigTIFF, which isn't read; save it as another TIFF or as PNG")
    check_tags(data)
    tile = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    for tag in _tags(data):
        if tag.name in (_STRIP_OFFSETS, _TILE_OFFSETS) and tag.values > MAX_OFFSETS:
            raise InvalidRequest(f"the TIFF has {tag.values} strips or tiles; {MAX_OFFSETS} are allowed")
        if tag.name in tile:
            # PIL takes the last of the same name, libtiff the first, of more types than PIL knows.
            tile[tag.name] = max(tile[tag.name], tag.value if tag.type in (_SHORT, _LONG) else MAX_TILE + 1)
    if tile[_TILE_WIDTH] * tile[_TILE_LENGTH] > MAX_TILE:
        raise InvalidRequest(f"the TIFF's tiles are too large; {MAX_TILE} pixels are allowed")


class _Tag(NamedTuple):
    name: int
    type: int
    values: int
    """How many."""
    size: int
    """Bytes that its values take elsewhere in the file."""
    value: int
    """Or where in the file its values are."""
    whole: bool


def _tags(block: bytes) -> Iterator[_Tag]:
    """Of the first directory."""
    while block.startswith(_EXIF):
        block = block[len(_EXIF) :]
    if len(block) < 16 or not block.startswith(_TIFF):
        return
    name: Literal["little", "big"] = "little" if block[:1] == b"I" else "big"
    order = "<" if name == "little" else ">"
    # As PIL tells BigTIFF.
    big = block[2] == ord("+")
    start, counted, entry, inline = (8, "Q", "HHQ8s", 8) if big else (4, "H", "HHL4s", 4)
    (at,) = struct.unpack_from(order + ("Q" if big else "L"), block, start)
    length = struct.calcsize(order + counted)
    head = block[at : at + length]
    if len(head) < length:
        return
    (entries,) = struct.unpack(order + counted, head)
    step = struct.calcsize(order + entry)
    # PIL's `Opening` ends before that many.
    table = block[at + length : at + length + min(entries, 65535) * step]
    for tag, kind, count, held in struct.iter_unpack(order + entry, table[: len(table) // step * step]):
        size = count * _TYPE_SIZES.get(kind, 0)
        value = int.from_bytes(held[:size] if size <= inline else held, name)
        yield _Tag(tag, kind, count, size if size > inline else 0, value, size <= inline or value + size <= len(block))


def _check_jpeg(data: bytes) -> None:
    exif: list[bytes] = []
    scans, at = 0, 2
    for _ in range(MAX_JPEG_SEGMENTS):
        found = _MARKER.search(data, at)
        if not found:
            break
        marker, at = found[1][0], found.end()
        if marker == _EOI and scans:
            break
        if marker in _WITHOUT_LENGTH:
            continue
        length = max(2, int.from_bytes(data[at : at + 2], "big"))
        content = data[at + 2 : at + length]
        at += length
        scans += marker == _SOS
        if scans > MAX_SCANS:
            raise InvalidRequest(f"the JPEG has more than {MAX_SCANS} scans; save it anew")
        if not scans and at > MAX_JPEG_HEAD:
            raise InvalidRequest("the JPEG's head is too long; save the picture anew without its metadata")
        if marker == 0xE1 and content.startswith(_EXIF):
            # PIL puts them together.
            exif.append(content[len(_EXIF) :] if exif else content)
        elif marker == 0xE2 and content.startswith(b"MPF\0"):
            check_tags(content[4:])
    else:
        raise InvalidRequest(f"the JPEG has more than {MAX_JPEG_SEGMENTS} segments; save the picture anew")
    check_tags(b"".join(exif))


def _checked_png(data: bytes) -> bytes:
    pixels = compressed = others = frame = 0
    at = len(_PNG)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            break
        if kind == b"fcTL" and not pixels:
            frame = at
        elif kind in (b"IDAT", b"fdAT", b"fcTL"):
            pixels += 1
        else:
            others += 1
            compressed += kind in (b"zTXt", b"iTXt", b"iCCP")
        if pixels > MAX_PNG_DATA_CHUNKS or others > MAX_PNG_CHUNKS or compressed > MAX_PNG_COMPRESSED:
            raise InvalidRequest("the PNG has too many chunks; save it anew without its metadata")
        at += 12 + length
    return _without_disposal(data, frame) if frame else data


def _without_disposal(data: bytes, frame: int) -> bytes:
    """What an animation does with its first frame afterwards says nothing of the frame, but PIL makes two pictures of
    the frame's size for it as it opens the file, before anybody can ask for the size."""
    disposal = frame + 8 + 24
    if data[disposal : disposal + 1] == b"\0":
        return data
    control = data[frame + 4 : disposal] + b"\0" + data[disposal + 1 : frame + 8 + 26]
    return data[: frame + 4] + control + struct.pack(">I", zlib.crc32(control)) + data[frame + 8 + 26 + 4 :]
