"""Bytes of a picture -> RGB pixels and back: the first step of the data, the only user of Pillow.

Invariant: whatever the bytes are, `decode`, `probe` and `decode_mask` either return or raise
`DataError`; the number of pixels is read from the header and capped before anything is decoded, and
only formats whose decoders run in bounded time are tried. GIF and TIFF are left out on purpose: one
can be made to take quadratic time, the other brings a large native decoder for hostile input.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

# The plugins are named so that they are registered before `Image.open` is told the formats: asked
# for one it has not seen yet, Pillow imports every plugin it ships.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    Image,
    ImageCms,
    ImageDraw,
    ImageFont,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from disttrain.data.window import reduction
from disttrain.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
MAX_PIXELS = 50_000_000
MAX_BYTES = 128 * 2**20  # encoded; a 50 megapixel photo as PNG stays below
LABEL_HEIGHT = 18  # pixels of a text line in `tile`

_MAX_PROFILE_BYTES = 4 * 2**20
_MAX_SCANNED = 2 * 10**9  # pixels times scans of a JPEG, of which a few bytes go over all pixels
_SCAN, _MARKER = b"\xff\xda", re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_ORIENTATION_TAG = 0x0112
_NO_TEXT: Mapping[str, str] = MappingProxyType({})
# What Pillow and its decoders were seen to raise on damaged files.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture.

    `pixels` is uint8 [H, W, 3] sRGB, not to be written into. `mask` is uint8 [H, W], the alpha
    channel of a picture that is not opaque everywhere, else None; where it is below 255 the pixels
    are blended with white.
    """

    pixels: np.ndarray
    mask: np.ndarray | None


def decode(
    data: bytes,
    where: str,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
) -> Picture:
    """Decode a JPEG, PNG, WebP or BMP file to upright sRGB pixels.

    The EXIF orientation is applied; an embedded ICC profile is converted to sRGB (one that cannot
    be read is ignored, as browsers do); grey, palette, 16-bit and CMYK become RGB; of an animation
    the first frame is taken.

    Args:
        data: the whole file.
        where: what an error calls it, a path or "shard: key".
        max_pixels: refuse a header that announces more.
        at_least: height and width of the upright window that `fit` will make of it. A large JPEG is
            then decoded at a fraction of its size (`reduction`), which is three times as fast and
            changes the window's pixels by less than one of 255 steps in the mean.

    Raises:
        DataError: not one of the formats, damaged, truncated, or too large.
    """
    with _pillow(where):
        image = _open(data, where, max_pixels)
        if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            down, across = at_least
            turned = _orientation(image, data) >= 5
            part = reduction(image.size, (down, across) if turned else (across, down))
            image.draft(None, (image.width // part, image.height // part))
        image.load()  # first: the orientation may load too, and swallows what fails
        orientation = _orientation(image, data)
        profile = image.info.get("icc_profile")
        image, alpha = _split_alpha(_to_eight_bits(image))
        image = _to_srgb(image, profile)
        mask = None
        if alpha is not None and alpha.getextrema() != (255, 255):
            background = Image.new("RGB", image.size, "white")
            background.paste(image, mask=alpha)
            image = background
            mask = np.array(_turn(np.asarray(alpha), orientation), order="C")
    return Picture(np.ascontiguousarray(_turn(np.asarray(image), orientation)), mask)


def decode_mask(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a mask file to uint8 [H, W]: its brightness, white (255) where the subject is.

    Raises:
        DataError: as `decode`.
    """
    picture = decode(data, where, max_pixels)
    return np.array(Image.fromarray(picture.pixels).convert("L"))


def probe(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels after orientation, from the header alone where it tells.

    Raises:
        DataError: not one of the formats, or too large. A damaged body is not noticed.
    """
    with _pillow(where):
        image = _open(data, where, max_pixels)
        width, height = image.size
        turned = _orientation(image, data) >= 5
    return (height, width) if turned else (width, height)


def encode_png(pixels: np.ndarray, text: Mapping[str, str] = _NO_TEXT) -> bytes:
    """PNG file of uint8 [H, W, 3] or [H, W] with text chunks; equal input gives equal bytes."""
    assert pixels.dtype == np.uint8
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in text.items():
        assert 0 < len(keyword.encode("latin-1")) < 80, "a PNG keyword has 1 to 79 bytes"
        chunks.add_text(keyword, value)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_png_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file by keyword.

    Raises:
        DataError: missing, damaged, or not a PNG.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    with _pillow(str(path)):
        image = _open(data, str(path), MAX_PIXELS)
        if not isinstance(image, PngImagePlugin.PngImageFile):
            raise DataError(f"{path}: a {image.format} file; only PNG files carry text chunks")
        return {str(keyword): str(value) for keyword, value in image.text.items()}


def tile(
    rows: Sequence[Sequence[np.ndarray]],
    gap: int = 2,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> np.ndarray:
    """A grid of equally sized pictures on white, with optional text left of rows and above columns.

    Args:
        rows: uint8 [H, W, 3] arrays; a row may be shorter than the longest one.
        gap: pixels between neighbours.

    Returns:
        uint8 [grid height, grid width, 3].
    """
    assert rows
    assert any(len(row) for row in rows)
    height, width, _ = next(row for row in rows if len(row))[0].shape
    columns = max(len(row) for row in rows)
    font = ImageFont.load_default(LABEL_HEIGHT * 2 / 3)
    gutter = max((int(font.getlength(_line(label))) + 6 for label in row_labels), default=0)
    gutter = min(gutter, 4 * width)
    header = LABEL_HEIGHT if column_labels else 0
    size = (
        header + len(rows) * (height + gap) - gap,
        gutter + columns * (width + gap) - gap,
        3,
    )
    grid = np.full(size, 255, dtype=np.uint8)
    for down, row in enumerate(rows):
        for across, pixels in enumerate(row):
            assert pixels.shape == (height, width, 3), "pictures of a grid have one size"
            top, left = header + down * (height + gap), gutter + across * (width + gap)
            grid[top : top + height, left : left + width] = pixels
    for across, label in enumerate(column_labels[:columns]):
        left = gutter + across * (width + gap)
        grid[:header, left : left + width] = _label(label, header, width, font)
    for down, label in enumerate(row_labels[: len(rows)]):
        top = header + down * (height + gap)
        grid[top : top + height, :gutter] = _label(label, height, gutter, font)
    return grid


@contextmanager
def _pillow(where: str) -> Iterator[None]:
    """Turn what Pillow raises on damaged files into a DataError naming `where`."""
    try:
        yield
    except DataError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{where}: not a JPEG, PNG, WebP or BMP picture; convert or remove it"
        ) from error
    except _PILLOW_ERRORS as error:
        reason = _line(str(error))[:160] or type(error).__name__
        raise DataError(f"{where}: damaged picture ({reason}); replace or remove it") from error


def _line(text: str) -> str:
    return " ".join(text.split())


def _open(data: bytes, where: str, max_pixels: int) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise DataError(f"{where}: a picture file of {len(data)} bytes, the limit is {MAX_BYTES}")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{where}: a picture of {width} x {height} pixels; remove it")
    if width * height > max_pixels:
        raise DataError(
            f"{where}: {width} x {height} pixels, the limit is {max_pixels}; make it smaller"
        )
    if image.format == "BMP" and any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ())):
        raise DataError(f"{where}: run-length encoded BMP is not read; save it as PNG")
    most = _MAX_SCANNED // (width * height)
    if image.format in ("JPEG", "MPO") and data.count(_SCAN) > most and _scans(data) > most:
        raise DataError(f"{where}: a JPEG of over {most} scans is not read; save it anew")
    return image


def _scans(data: bytes) -> int:
    """How many scans a JPEG holds up to its end; previews within its metadata do not count."""
    count, place = 0, 2
    while (found := _MARKER.search(data, place)) and found[0] != b"\xff\xd9":
        count += found[0] == _SCAN
        place = found.end()
        place += int.from_bytes(data[place : place + 2], "big") if found[0] != b"\xff\x01" else 0
    return count


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or it cannot be read."""
    marks = (b"eXIf", b"Raw profile type exif", b"tiff:Orientation")
    if image.format == "PNG" and not any(mark in data for mark in marks):
        return 1  # asking Pillow would decode the whole file
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_ERRORS:
        return 1  # damaged metadata beside intact pixels; viewers show such files unturned too
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright view of [H, W, ...] stored with an EXIF orientation (EXIF 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> L or LA; other modes unchanged.

    The high byte is kept, as Pillow itself does with 16-bit colour.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = np.clip(values.astype(np.float64), 0, 65535).astype(np.uint16) >> 8
    result = Image.fromarray(grey.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour part without alpha, and alpha as an L picture or None."""
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        has_alpha = image.mode in ("PA", "LA", "RGBA") or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    if image.mode in ("RGBA", "LA"):
        alpha = image.getchannel("A")
        return image.convert("RGB" if image.mode == "RGBA" else "L"), alpha
    return image, None


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB picture in sRGB; `image` has no alpha."""
    if image.mode == "1":
        image = image.convert("L")
    if profile and len(profile) <= _MAX_PROFILE_BYTES and image.mode in ("RGB", "L", "CMYK"):
        try:
            return _convert_profile(image, profile)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a profile that is damaged or of another colour space: the file's own numbers
    return image if image.mode == "RGB" else image.convert("RGB")


def _convert_profile(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    if image.mode == "RGB" and ImageCms.getProfileDescription(source).strip().startswith("sRGB"):
        return image
    converted = ImageCms.profileToProfile(
        image,
        source,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None
    return converted


def _label(
    text: str, height: int, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> np.ndarray:
    """A line of black text, centred, cut with an ellipsis, on white uint8 [height, width, 3]."""
    text = _line(text)
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    canvas = Image.new("RGB", (width, height), "white")
    place = ((width - font.getlength(text)) / 2, (height - LABEL_HEIGHT) / 2)
    ImageDraw.Draw(canvas).text(place, text, fill="black", font=font)
    return np.asarray(canvas)
