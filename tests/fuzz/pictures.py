"""Picture files: of every format that Pillow writes, damaged ones, and such as unpack to more than they seem."""

import base64
import functools
import io
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
from PIL import Image

# Format, mode, options of Pillow's save.
FORMATS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
    ("JPEG", "RGB", {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
    *(("TIFF", mode, {}) for mode in ("RGB", "RGBA", "L", "CMYK", "I", "I;16", "F")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "RGB", {"save_all": True}),
    *(("GIF", mode, {}) for mode in ("P", "L")),
    ("GIF", "RGB", {"save_all": True}),
    *(("WEBP", mode, options) for mode in ("RGB", "RGBA") for options in ({}, {"lossless": True}, {"save_all": True})),
    *(("BMP", mode, {}) for mode in ("RGB", "RGBA", "L", "P", "1")),
    *((name, "RGB", {}) for name in ("MPO", "AVIF", "DDS", "DIB", "EPS", "ICNS", "ICO", "IM", "JPEG2000")),
    *((name, "RGB", {}) for name in ("PCX", "PPM", "QOI", "SGI", "TGA")),
    *((name, "1", {}) for name in ("MSP", "XBM")),
    *(("BLP", "P", {}), ("SPIDER", "F", {})),
)
SMALL, LARGER = (37, 29), (1024, 768)


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """One of each format, small, and a few larger ones. Deterministic for a release of Pillow."""
    found = [saved(SMALL, *one) for one in FORMATS]
    return *found, *(saved(LARGER, name, "RGB", {}) for name in ("JPEG", "PNG", "WEBP"))


@functools.cache
def small_png() -> bytes:
    """What requests hold whose picture is not the point."""
    return saved(SMALL, "PNG", "RGB", {})


def saved(size: tuple[int, int], name: str, mode: str, options: dict[str, Any]) -> bytes:
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    values = np.stack([across * 7 % 256, down * 11 % 256, (across ^ down) % 256], axis=-1).astype(np.uint8)
    picture = Image.fromarray(values)
    # There is no direct way to some modes.
    picture = picture.convert("L").convert(mode) if mode in ("LA", "I", "I;16", "F", "1") else picture.convert(mode)
    if options.get("save_all"):
        options = options | {"append_images": [picture.rotate(angle) for angle in (90, 180)]}
    output = io.BytesIO()
    picture.save(output, name, **options)
    return output.getvalue()


def any_picture(rng: Random) -> bytes:
    return rng.choice(pictures())


def mutated(rng: Random, data: bytes | bytearray | None = None) -> bytes:
    """One of them with some bytes changed."""
    changed = bytearray(any_picture(rng) if data is None else data)
    for _ in range(1 + int(rng.expovariate(0.5))):
        rng.choice(MUTATIONS)(rng, changed)
    return bytes(changed)


def _flip(rng: Random, data: bytearray) -> None:
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _number(rng: Random, data: bytearray) -> None:
    """A size, count or offset, perhaps."""
    value = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)))
    packed = struct.pack(rng.choice("<>") + "I", value)
    packed = packed[: rng.choice((1, 2, 4))] if value < 0x10000 else packed
    at = _place(rng, data)
    data[at : at + len(packed)] = packed


def _cut(rng: Random, data: bytearray) -> None:
    del data[_place(rng, data) :]


def _drop(rng: Random, data: bytearray) -> None:
    at = _place(rng, data)
    del data[at : at + rng.randint(1, 64)]


def _insert(rng: Random, data: bytearray) -> None:
    at = _place(rng, data)
    data[at:at] = rng.choice(
        (rng.randbytes(rng.randint(1, 64)), bytes(data[at : at + 64]), bytes(rng.randint(1, 2000)))
    )


def _splice(rng: Random, data: bytearray) -> None:
    other = any_picture(rng)
    data[_place(rng, data) :] = other[_place(rng, other) :]


MUTATIONS = (_flip, _flip, _number, _number, _number, _cut, _drop, _insert, _splice)


def _place(rng: Random, data: bytes | bytearray) -> int:
    """More often in the head."""
    return rng.randrange(max(1, min(len(data), rng.choice((16, 64, 256, 1 << 30)))))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """With right sums, so that what is in them is read."""
    made = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_mutated(rng: Random) -> bytes:
    """Damage that the sums don't tell."""
    chunks = png_chunks(rng.choice([data for data in pictures()[:7]]))
    at = rng.randrange(len(chunks))
    name, data = chunks[at]
    names = (name, name, name, b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"iCCP", b"eXIf")
    chunks[at] = rng.choice(names), mutated(rng, data)
    if rng.random() < 0.3:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    return png(*chunks)


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def too_many_pixels(rng: Random) -> bytes:
    """Of heads alone: more than Pillow or any setting of ours allows."""
    width, height = rng.randint(20_000, 65_000), rng.randint(20_000, 65_000)
    jpeg, bmp, gif = (saved(SMALL, *FORMATS[number]) for number in (7, *map(_index, ("BMP", "GIF"))))
    start = jpeg.index(b"\xff\xc0") + 5
    return rng.choice(
        (
            png(header(width, height, rng.choice((8, 16)), rng.choice((0, 2, 6))), (b"IDAT", zlib.compress(bytes(99)))),
            jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :],
            bmp[:18] + struct.pack("<ii", width, rng.choice((height, -height))) + bmp[26:],
            gif[:6] + struct.pack("<HH", width, height) + gif[10:],
            tiff(
                (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 99)
            ),
        )
    )


def _index(name: str) -> int:
    return next(number for number, one in enumerate(FORMATS) if one[0] == name)


def many_pixels(rng: Random) -> bytes:
    """Well-formed, of some kB, and 2 to 100 megapixels when unpacked; what is allowed depends on the server."""
    side = int(1e3 * (2 * 50 ** rng.random()) ** 0.5)
    depth, colour, size = rng.choice(((8, 0, 1), (16, 0, 2), (8, 2, 3), (8, 6, 4), (16, 2, 6), (1, 0, 0.125)))
    packer, row = zlib.compressobj(1), bytes(1 + int(-(-side * size // 1)))
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return png(header(side, side, depth, colour), (b"IDAT", rows), (b"IEND", b""))


def tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """One directory of (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following)


def many_frames(rng: Random) -> bytes:
    count = int(10 ** rng.uniform(2, 4.5))
    return rng.choice((_gif_frames, _png_frames, _tiff_loop))(count)


def _gif_frames(count: int) -> bytes:
    gif = saved((1, 1), "GIF", "P", {})
    start = gif.index(b",")
    return gif[:start] + gif[start:-1] * count + b";"


def _png_frames(count: int) -> bytes:
    """More are promised than there are."""
    control = (b"fcTL", struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 0, 0, 0, 0))
    promised = (b"acTL", struct.pack(">II", count * 1000, 0))
    return png(header(1, 1), promised, *[control] * count, (b"IDAT", zlib.compress(bytes(4))), (b"IEND", b""))


def _tiff_loop(value: int) -> bytes:
    """A directory that is followed by itself, and is its own EXIF."""
    one = ((256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 0), (279, 4, 1, 1))
    return tiff(*one, (0x0112, 3, 1, value % 10), (0x8769, 4, 1, 8), (0x8825, 4, 1, 8), following=8)


def much_metadata(rng: Random) -> bytes:
    """EXIF, profiles and texts: many, large, packed, and such as point at themselves."""
    if rng.random() < 0.5:
        first, *rest = png_chunks(small_png())
        return png(first, *_png_metadata(rng), *rest)
    jpeg = saved(SMALL, "JPEG", "RGB", {})
    blocks = (b"\xff" + bytes((mark,)) + struct.pack(">H", len(data) + 2) + data for mark, data in _jpeg_metadata(rng))
    return jpeg[:2] + b"".join(blocks) + jpeg[2:]


def _exif(rng: Random) -> bytes:
    kind = rng.choice((3, 5, 7, 12))
    counts = tiff((0x0112, kind, 2**32 - 1, 8), (0x927C, 7, 2**31, 8), following=2**31)
    return rng.choice((counts, _tiff_loop(rng.randrange(10)), rng.randbytes(60_000), counts[:8] + rng.randbytes(6000)))


def _png_metadata(rng: Random) -> list[tuple[bytes, bytes]]:
    packed = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}
    match rng.choice(("packed", "many", "many packed", "EXIF")):
        case "packed":
            name = rng.choice(list(packed))
            return [(name, packed[name] + zlib.compress(bytes(rng.choice((1, 2, 8, 70)) << 20)))]
        case "many":
            return [(b"tEXt", b"%d\0" % number + b"a" * 50) for number in range(int(10 ** rng.uniform(2, 4.3)))]
        case "many packed":
            megabyte = zlib.compress(bytes(1 << 20))
            return [(b"zTXt", b"%d\0\0" % number + megabyte) for number in range(rng.randint(1, 100))]
        case _:
            return [(b"eXIf", _exif(rng))]


def _jpeg_metadata(rng: Random) -> list[tuple[int, bytes]]:
    """Marker and contents."""
    match rng.choice(("EXIF", "ICC", "comments", "Photoshop", "MPO")):
        case "EXIF":
            return [(0xE1, b"Exif\0\0" + _exif(rng))]
        case "ICC":
            return [(0xE2, b"ICC_PROFILE\0" + bytes((n, 255)) + bytes(65_000)) for n in range(1, rng.randint(2, 200))]
        case "comments":
            return [(0xFE, bytes(rng.randint(0, 60)))] * int(10 ** rng.uniform(2, 4.5))
        case "Photoshop":
            return [(0xED, b"Photoshop 3.0\08BIM" + rng.randbytes(999))] * rng.randint(1, 50)
        case _:
            return [(0xE2, b"MPF\0" + _exif(rng)[:60_000])]


def in_base64(rng: Random) -> bytes:
    data = rng.choice((any_picture, mutated))(rng)
    text = rng.choice((base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes, base64.b32encode))(data)
    heads = (
        b"data:image/png;base64,",
        b"DATA:;base64,",
        b"data:image/png,",
        b"  data:a/b;charset=x;base64,",
        b"data:" * 50,
    )
    return rng.choice(
        (
            text,
            text.rstrip(b"="),
            text + b"=" * rng.randint(1, 9),
            rng.choice(heads) + text,
            mutated(rng, text),
            mutated(rng, rng.choice(heads) + text),
            base64.b64encode(text),
        )
    )
