"""Image files as people send them, whole, odd and broken; the pixels against transformers' image processor."""

import base64
import io
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from transformers import CLIPImageProcessorPil

from florence2.errors import InvalidRequest, Unavailable
from florence2.image_headers import Opening
from florence2.images import FORMATS, Limits, Resizer, decode

# A busy machine is slow now and then.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

DEFAULT = Limits()

# PIL warns of the damage done here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def scene(width: int = 70, height: int = 50) -> Image.Image:
    """Flat patches, which lossy formats keep recognisable; no symmetry."""
    return noise(7, 5).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_pil_reads(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def is_refused(data: bytes, limits: Limits = DEFAULT, match: str | None = None) -> None:
    with pytest.raises(InvalidRequest, match=match):
        decode(data, limits)


# The pixels of HF's image processor

PREPROCESSORS: list[dict[str, Any]] = [
    {"size": {"width": 768, "height": 768}, "resample": 3},
    {"size": {"width": 96, "height": 96}, "resample": 3},
    {"size": {"width": 64, "height": 32}, "resample": 2},
]


@pytest.mark.parametrize("preprocessor", PREPROCESSORS, ids=str)
@pytest.mark.parametrize("size", [(70, 50), (1000, 800), (96, 96), (768, 500), (1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_hfs_image_processor(preprocessor, size: tuple[int, int], mode: str) -> None:
    image = noise(*size).convert(mode)
    processor = CLIPImageProcessorPil(**preprocessor, do_resize=True, do_center_crop=False, do_convert_rgb=True)
    wanted = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    pixels = Resizer(preprocessor)(decode(encoded(image, "PNG")))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, wanted.transpose(1, 2, 0))


# Formats and modes

LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF deflate": {"compression": "tiff_adobe_deflate"},
    "WEBP": {"lossless": True},
}
LOSSY: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "WEBP": {},
    "MPO": {},
    "TIFF jpeg": {"compression": "jpeg"},
    "GIF": {},
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_their_pixels(name: str) -> None:
    image = decode(encoded(scene(), name.split()[0], **LOSSLESS[name]))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(scene()))


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats_give_what_pil_reads(name: str) -> None:
    data = encoded(scene(), name.split()[0], **LOSSY[name])
    pixels = np.asarray(decode(data))
    np.testing.assert_array_equal(pixels, as_pil_reads(data))
    assert np.abs(pixels.astype(int) - np.asarray(scene())).mean() < 40


def test_mpo_of_two_pictures_gives_the_first() -> None:
    data = encoded(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (70, 50))])
    np.testing.assert_array_equal(np.asarray(decode(data)), as_pil_reads(data))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    options = {} if format == "TIFF" else {"duration": 100}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    pixels = np.asarray(decode(data)).astype(int)
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(scene(64, 48), format, exif=exif, **options)
    image = decode(data)
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(wanted))


def test_orientations_are_those_of_the_exif_standard() -> None:
    """Which corner of the upright picture the file's first pixel is."""
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    stored = Image.new("RGB", (4, 3))
    stored.putpixel((0, 0), (255, 255, 255))
    for orientation, corner in corners.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        assert np.asarray(decode(encoded(stored, "PNG", exif=exif)))[corner].tolist() == [255, 255, 255]


def test_an_odd_exif_block_does_not_cost_the_picture() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.XResolution] = (72, 1)
    data = encoded(scene(64, 48), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    rng = random.Random(0)
    sizes, beaten = set(), set()
    for _ in range(1500):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            broken[start + rng.randrange(len(exif.tobytes()) - 6)] ^= 1 << rng.randrange(8)
        size = decode(bytes(broken)).size
        sizes.add(size)
        try:
            ImageOps.exif_transpose(Image.open(io.BytesIO(broken)))
        except Exception:
            beaten.add(size)
    assert sizes == {(64, 48), (48, 64)}
    # PIL stumbles over other tags; the orientation is whole.
    assert beaten == {(48, 64)}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0garbage", b"II*\0", bytes(20), b"II+\0" + bytes(20)])
def test_a_damaged_exif_block_says_nothing(format: str, exif: bytes) -> None:
    assert decode(encoded(scene(64, 48), format, exif=exif)).size == (64, 48)


def with_palette(transparency: Any) -> bytes:
    image = scene().quantize(16)
    return encoded(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


@pytest.mark.parametrize(
    "data",
    [
        with_palette(None),
        with_palette(3),
        with_palette(bytes(range(0, 256, 16))),
        encoded(scene().convert("L"), "PNG"),
        encoded(scene().convert("L"), "JPEG"),
        encoded(scene().convert("LA"), "PNG"),
        encoded(scene().convert("1"), "PNG"),
        encoded(scene().convert("1"), "TIFF", compression="group4"),
        encoded(scene().convert("CMYK"), "JPEG"),
        encoded(scene().convert("CMYK"), "TIFF"),
        encoded(scene().quantize(16), "GIF", transparency=2),
        encoded(scene().quantize(16), "BMP"),
    ],
    ids=range(12),
)
def test_other_modes_are_as_pil_converts_them(data: bytes) -> None:
    np.testing.assert_array_equal(np.asarray(decode(data)), as_pil_reads(data))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_dropped(format: str) -> None:
    image = scene().convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(70 * 50, dtype=np.uint8).reshape(50, 70)))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, format, **options))), np.asarray(scene()))


@pytest.mark.parametrize(
    ("mode", "dtype", "format"),
    [("I;16", "<u2", "PNG"), ("I;16", "<u2", "TIFF"), ("I;16B", ">u2", "TIFF"), ("I", "<i4", "TIFF")],
)
def test_sixteen_bit_grey_keeps_its_range(mode: str, dtype: str, format: str) -> None:
    values = np.linspace(0, 65535, 70 * 50).reshape(50, 70).astype(dtype)
    data = encoded(Image.fromarray(values), format)
    assert Image.open(io.BytesIO(data)).mode == mode
    np.testing.assert_array_equal(np.asarray(decode(data)), (values // 256).astype(np.uint8)[..., None].repeat(3, 2))


def test_wide_grey_is_clamped() -> None:
    values = np.array([[-5, 0, 65535, 10**6]], np.int32)
    assert np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 0, 255, 255]


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    data = png(7, 5, depth=16, rows=b"".join(b"\0" + row.tobytes() for row in values))
    np.testing.assert_array_equal(np.asarray(decode(data)), values // 256)


def png(width: int, height: int, depth: int = 8, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_narrow_pictures(size: tuple[int, int]) -> None:
    image = decode(encoded(noise(*size), "PNG"))
    assert image.size == size
    assert Resizer(PREPROCESSORS[1])(image).shape == (96, 96, 3)


# base64

WRITTEN: dict[str, Callable[[bytes], bytes]] = {
    "plain": base64.b64encode,
    "with line breaks": base64.encodebytes,
    "with spaces around": lambda data: b" \n" + base64.b64encode(data) + b"\r\n ",
    "url-safe": base64.urlsafe_b64encode,
    "data url": lambda data: b"data:image/png;base64," + base64.b64encode(data),
    "data url with parameters": lambda data: b"data:image/svg+xml;charset=utf-8;base64," + base64.b64encode(data),
    "data url without a type": lambda data: b"\nDATA:;base64," + base64.encodebytes(data),
}
FILES: dict[str, bytes] = {
    "jpeg": encoded(scene(), "JPEG"),
    "png": encoded(noise(30, 20), "PNG"),
    "webp": encoded(scene(), "WEBP"),
    "webp lossless": encoded(scene(), "WEBP", lossless=True),
    "bmp": encoded(noise(9, 8), "BMP"),
    "tiff": encoded(noise(9, 8), "TIFF"),
    "tiff lzw": encoded(scene(), "TIFF", compression="tiff_lzw"),
    "gif": encoded(scene(), "GIF"),
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("file", FILES)
def test_base64_is_the_file(written: str, file: str) -> None:
    wanted = np.asarray(decode(FILES[file]))
    np.testing.assert_array_equal(np.asarray(decode(WRITTEN[written](FILES[file]))), wanted)


def test_the_url_safe_files_here_differ_from_the_plain_ones() -> None:
    assert any(set(base64.urlsafe_b64encode(data)) & set(b"-_") for data in FILES.values())


@pytest.mark.parametrize("data", [b"aGVsbG8=", b"data:image/png;base64,aGVsbG8=", b"AAAA", b"Zm9v" * 1000])
def test_base64_of_junk_is_refused(data: bytes) -> None:
    is_refused(data, match="can't be read")


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_base64_cut_short_is_refused(cut: int) -> None:
    is_refused(base64.b64encode(FILES["jpeg"]).rstrip(b"=")[:-cut], match="cut short|damaged")


@pytest.mark.parametrize("data", [b"AA=A", b"A", b"AAAA=AAA", b"===="])
def test_broken_base64_is_refused(data: bytes) -> None:
    is_refused(data, match="base64 is damaged")


@pytest.mark.parametrize("data", [b"", b" \n", b"data:image/png;base64,"])
def test_nothing_is_refused(data: bytes) -> None:
    is_refused(data, match="empty")


@pytest.mark.parametrize("head", [b"RIFFAAAAWEBPVP8LAAAA", b"BMAAAAAAAAAAAAAAAAAA", b"GIF89aAAAAAAAAAAAAAA"])
def test_a_file_that_is_base64_throughout_is_no_image(head: bytes) -> None:
    """What makes the test for base64 safe: a header of the formats holds bytes outside its alphabet."""
    is_refused(head + b"A" * 400)
    with pytest.raises(Exception):  # noqa: B017, PT011
        Image.open(io.BytesIO(head + b"A" * 400), formats=FORMATS).load()


def test_long_runs_of_spaces_take_no_time() -> None:
    """A pattern that backtracks would not come back from this in a lifetime."""
    is_refused(b" " * 200_000 + b"!", match="can't be read")
    is_refused((b"AAAA" + b"\n" * 1000) * 100 + b"!", match="can't be read")


# Refusals

JUNK = {
    "zero byte": b"\0",
    "zeros": bytes(5000),
    "text": b"a picture of a cat, please",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><rect width="10" height="10"/></svg>',
    "json": b'{"error": "not found"}',
    "svg url": b"data:image/svg+xml,%3Csvg%3E",
    "a path": b"/home/user/cat.jpg",
    "jpeg's first bytes": b"\xff\xd8\xff\xe0",
    "png's first bytes": b"\x89PNG\r\n\x1a\n",
    "no width": png(0, 5),
    "no height": png(5, 0),
}


@pytest.mark.parametrize("name", JUNK)
def test_what_is_no_image_is_refused(name: str) -> None:
    is_refused(JUNK[name], match="can't be read|base64 is damaged")


@pytest.mark.parametrize("format", ["PPM", "ICO", "PDF", "TGA", "DDS", "PCX", "EPS", "SGI", "XBM", "JPEG2000", "AVIF"])
def test_formats_that_are_not_listed_are_refused(format: str) -> None:
    image = scene(64, 48).convert("1" if format == "XBM" else "RGB")
    try:
        data = encoded(image, format)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"this Pillow can't write {format}")
    is_refused(data, match="none of JPEG, PNG, WebP, BMP, TIFF and GIF")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_refused_or_whole(name: str) -> None:
    whole, refused = np.asarray(decode(FILES[name])), 0
    lengths = range(0, len(FILES[name]), max(1, len(FILES[name]) // 200))
    for length in lengths:
        try:
            np.testing.assert_array_equal(np.asarray(decode(FILES[name][:length])), whole)
        except InvalidRequest:
            refused += 1
    # Only what stands behind the last pixel may be missing.
    assert refused >= 0.9 * len(lengths)


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((20_000, 20_000), "too many pixels; 40 megapixels are allowed"),
        ((60_000, 60_000), "too many pixels; 40 megapixels are allowed"),
        ((13_000, 13_000), "13000 x 13000 pixels; 40 megapixels are allowed"),
        ((10_001, 10_000), "10001 x 10000 pixels; 40 megapixels are allowed"),
    ],
)
def test_too_many_pixels_are_refused_unread(size: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with at_most(1):
        is_refused(png(*size), Limits(megapixels=40), match=said)


def test_what_pil_refuses_by_itself_is_refused_in_true_words() -> None:
    is_refused(png(20_000, 20_000), Limits(megapixels=1000), match="178 megapixels are allowed")


def test_the_pixel_limit_itself_passes() -> None:
    limits = Limits(megapixels=0.0035)
    assert decode(encoded(scene(70, 50), "PNG"), limits).size == (70, 50)
    is_refused(encoded(scene(71, 50), "PNG"), limits, match="71 x 50 pixels; 0.0035 megapixels are allowed")


@pytest.mark.parametrize("write", [bytes, base64.b64encode])
def test_the_byte_limit_is_of_the_file(write: Callable[[bytes], bytes]) -> None:
    data = FILES["bmp"]
    assert decode(write(data), Limits(megabytes=len(data) / 1e6)).size == (9, 8)
    is_refused(write(data), Limits(megabytes=(len(data) - 1) / 1e6), match="MB are allowed")


def test_a_compressed_bomb_is_refused() -> None:
    bomb = png(9_000, 9_000, rows=bytes(9_000 * 3 + 1) * 9_000)
    assert len(bomb) < 1e6
    is_refused(bomb, Limits(megapixels=80), match="9000 x 9000 pixels; 80 megapixels are allowed")


# Heads that would take PIL hours or gigabytes


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def tags(*entries: tuple[int, int, int, int]) -> bytes:
    """A TIFF's head: (tag, type, count, value or offset)."""
    written = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + written + bytes(4)


def grey_tiff(*entries: tuple[int, int, int, int]) -> bytes:
    return tags((256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1), *entries).ljust(400, b"\0")


OVERLAPPING = tags(*((1000 + number, 7, 9000, 0) for number in range(700))).ljust(9000, b"\0")
JPEG_HEAD, PNG_HEAD = FILES["jpeg"][:2], FILES["png"][:33]
PROFILE = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20)))


def with_scans(count: int) -> bytes:
    data = encoded(scene(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


HOSTILE = {
    "JPEG segments": (JPEG_HEAD + segment(0xFE, b"") * 10_000 + FILES["jpeg"][2:], "more than 10000 segments"),
    "JPEG head": (JPEG_HEAD + segment(0xFE, bytes(65533)) * 250 + FILES["jpeg"][2:], "head is too long"),
    "JPEG scans": (with_scans(51), "more than 50 scans"),
    "JPEG tags": (JPEG_HEAD + segment(0xE1, b"Exif\0\0" + OVERLAPPING) + FILES["jpeg"][2:], "tags are too large"),
    "JPEG tags in two": (
        JPEG_HEAD
        + segment(0xE1, b"Exif\0\0" + OVERLAPPING[:4000])
        + segment(0xE1, b"Exif\0\0" + OVERLAPPING[4000:])
        + FILES["jpeg"][2:],
        "tags are too large",
    ),
    "MPO tags": (JPEG_HEAD + segment(0xE2, b"MPF\0" + OVERLAPPING) + FILES["jpeg"][2:], "tags are too large"),
    "PNG chunks": (PNG_HEAD + chunk(b"abCd", b"") * 1001 + FILES["png"][33:], "too many chunks"),
    "PNG chunks behind": (FILES["png"][:-12] + chunk(b"abCd", b"") * 1001 + FILES["png"][-12:], "too many chunks"),
    "PNG profiles": (PNG_HEAD + PROFILE * 65 + FILES["png"][33:], "too many chunks"),
    "PNG pixels": (PNG_HEAD + chunk(b"IDAT", b"") * 50_001 + FILES["png"][33:], "too many chunks"),
    "GIF comment": (b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 6000 + b"\0", "head has too many parts"),
    "TIFF tags": (OVERLAPPING, "tags are too large"),
    "TIFF numbers": (grey_tiff((282, 5, 250_001, 0)) + bytes(2_100_000), "tags are too large"),
    "TIFF strips": (grey_tiff((273, 1, 200_001, 0)) + bytes(200_001), "200001 strips or tiles"),
    "TIFF tile": (grey_tiff((322, 4, 1, 5000), (323, 4, 1, 5000)), "tiles are too large"),
    "TIFF tile of another type": (grey_tiff((322, 16, 1, 0), (323, 4, 1, 1)), "tiles are too large"),
    "TIFF tile behind damage": (
        grey_tiff((300, 7, 10**7, 0), (322, 4, 1, 5000), (323, 4, 1, 5000)),
        "tiles are too large",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_heads_that_ask_for_too_much_are_refused(name: str) -> None:
    data, said = HOSTILE[name]
    with at_most(25):
        is_refused(data, match=said)


def test_scans_at_the_limit_pass() -> None:
    data = with_scans(50)
    np.testing.assert_array_equal(np.asarray(decode(data)), as_pil_reads(data))


def test_an_animations_disposal_makes_no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [noise(40, 30, seed) for seed in range(3)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], disposal=1)

    def fill(*_: Any) -> None:
        raise AssertionError("a picture was made")

    monkeypatch.setattr(Image.core, "fill", fill)
    with pytest.raises(AssertionError, match="was made"):
        Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(frames[0]))


def test_a_wide_picture_is_read_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL copies all that it has for every step."""
    reads: list[int] = []
    read = Opening.read
    monkeypatch.setattr(Opening, "read", lambda file, size=-1: [reads.append(size), read(file, size)][1])
    assert decode(encoded(Image.new("RGB", (1_000_000, 1)), "BMP")).size == (1_000_000, 1)
    assert len(reads) < 25


# Several at once


def test_room_is_entered_once_the_limits_are_kept_and_left_with_the_picture() -> None:
    entered: list[str] = []

    @contextmanager
    def room(pixels: int) -> Iterator[None]:
        entered.append(f"{pixels} in")
        yield
        entered.append("out")

    decode(FILES["jpeg"], room=room)
    assert entered == ["3500 in", "out"]
    with pytest.raises(InvalidRequest):
        decode(FILES["jpeg"], Limits(megapixels=0.003), room=room)
    assert entered == ["3500 in", "out"]


def test_what_room_raises_is_passed_on() -> None:
    @contextmanager
    def room(_: int) -> Iterator[None]:
        raise Unavailable("too many pictures")
        yield

    with pytest.raises(Unavailable, match="too many pictures"):
        decode(FILES["jpeg"], room=room)


def test_the_processs_warnings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def filters(*_: Any, **__: Any) -> None:
        raise AssertionError("filters were changed")

    for name in ("catch_warnings", "simplefilter", "filterwarnings"):
        monkeypatch.setattr(f"warnings.{name}", filters)
    assert decode(FILES["jpeg"]).size == (70, 50)


# Anything at all

SMALL = Limits(megapixels=0.5, megabytes=1)


def is_read_or_refused(data: bytes) -> None:
    try:
        image = decode(data, SMALL)
    except InvalidRequest:
        return
    assert image.mode == "RGB"
    assert Resizer(PREPROCESSORS[1])(image).shape == (96, 96, 3)


@untimed
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(data, SMALL)


MAGIC = [
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"RIFF\x40\0\0\0WEBPVP8L",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"GIF89a",
]


@untimed
@given(st.sampled_from(MAGIC), st.binary(max_size=200))
def test_random_bytes_behind_a_true_beginning(magic: bytes, data: bytes) -> None:
    is_read_or_refused(magic + data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("write", [bytes, base64.b64encode])
def test_flipped_bits(name: str, write: Callable[[bytes], bytes]) -> None:
    rng = random.Random(0)
    for _ in range(150):
        broken = bytearray(write(FILES[name]))
        for _ in range(rng.randint(1, 6)):
            # Headers decide most: half of the flips go there.
            place = rng.randrange(min(len(broken), 100) if rng.random() < 0.5 else len(broken))
            broken[place] ^= 1 << rng.randrange(8)
        is_read_or_refused(bytes(broken))


@settings(untimed, max_examples=50)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_parts_cut_out(name: str, data: st.DataObject) -> None:
    whole = FILES[name]
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    is_read_or_refused(whole[:start] + whole[end:])
