"""Image files to RGB pixels: one decoder for every stage, and the ADM centre crop.

A decoder that is lenient in silence hides what it did to the pixels. This one says every
conversion in `notes` and refuses, with a one-line reason, what it cannot show faithfully.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from repa_pipeline.errors import DataError

UInt8 = npt.NDArray[np.uint8]

# Listed so that no file content can start an external program (EPS calls ghostscript). JPEG
# includes MPO.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_KIND_OF_MODE = {
    **dict.fromkeys(("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"), "grayscale"),
    **dict.fromkeys(("P", "PA"), "palette"),
    **dict.fromkeys(("RGB", "RGBA", "RGBX", "RGBa", "YCbCr"), ""),
    "CMYK": "cmyk",
}
_SIXTEEN_BIT_LAYOUT = re.compile(r"\b(I|LA|RGB|RGBA|RGBX|RGBa|CMYK);16")
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLE_FORMAT_TAG = 274, 258, 262, 339
_MAX_LONG_SIDE = 2**20
_STRIP_PIXELS = 2**24
_TRUNCATED = "truncated image file"
_BAD_HEADER = "unreadable header (damaged, truncated or of zero size)"


@dataclasses.dataclass(frozen=True)
class DecodedImage:
    """RGB pixels of a file, what was done to get them, and the stored size before rotation."""

    image: Image.Image
    notes: tuple[str, ...]
    width: int
    height: int


def decode_image(
    data: bytes, *, upright: bool = True, max_pixels: int = 178_956_970
) -> DecodedImage:
    """Decodes the first frame of an image file to 8-bit RGB.

    The format comes from the content. `upright` applies the EXIF orientation; without it the
    orientation is ignored, as the ADM and REPA preparation does (TIFF files are always turned:
    Pillow does so itself). Transparent pixels are laid over white. 16-bit grey is value / 257,
    rounded to the nearest; 16-bit colour keeps the high byte (Pillow's reading).
    `notes` holds, in this order and where true: "16-bit", one of "grayscale" | "palette" | "cmyk",
    "alpha", "exif N", "first of N frames".

    Raises DataError with the reason: empty, not an image, truncated, damaged, zero size, more
    than `max_pixels` pixels, or a pixel type without a faithful 8-bit form.
    """
    if not data:
        raise DataError("empty file (0 bytes)")
    _check_size(_webp_size(data), max_pixels)
    with _without_bomb_check(), _open(data) as opened:
        _check_size(opened.size, max_pixels)
        for tile in opened.tile:
            _check_size(tile[1][2:] if tile[1] else None, max_pixels)
        return _decode(opened, upright)


def _decode(opened: Any, upright: bool) -> DecodedImage:
    layout = " ".join(str(tile[3]) for tile in opened.tile)
    turned_by_pillow = opened.format == "TIFF"
    orientation = _orientation(opened) if turned_by_pillow else 1
    _check_pixel_type(opened)
    try:
        opened.load()
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DataError(_reason(error)) from None
    width, height = opened.size
    if turned_by_pillow and orientation > 4:
        width, height = height, width
    # PNG may keep its EXIF behind the pixels, so it is read after them.
    orientation = orientation if turned_by_pillow else _orientation(opened)
    image, notes = _to_rgb(opened, sixteen_bit=_SIXTEEN_BIT_LAYOUT.search(layout) is not None)
    if orientation > 1 and (upright or turned_by_pillow):
        notes.append(f"exif {orientation}")
        if not turned_by_pillow:
            image = image.transpose(_TRANSPOSE_OF_ORIENTATION[orientation])
    num_frames = _num_frames(opened)
    if num_frames > 1:
        notes.append(f"first of {num_frames} frames")
    return DecodedImage(image, tuple(notes), width, height)


def adm_center_crop(image: Image.Image, size: int) -> UInt8:
    """ADM's centre crop: halve with BOX, BICUBIC to `size` on the short side, crop the centre.

    image: RGB, any size, also smaller than `size`. Returns uint8 [size, size, 3].
    Raises DataError when the image is not RGB or its long side would exceed 2**20 pixels.
    Source: centre crop of ADM (Dhariwal and Nichol, arXiv 2105.05233), as REPA prepares ImageNet.
    """
    if image.mode != "RGB":
        raise DataError(f"centre crop of a {image.mode} image: expected RGB, use decode_image")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if max(width, height) > _MAX_LONG_SIDE:
        raise DataError(
            f"aspect too extreme: {image.width}x{image.height} becomes {width}x{height}, "
            f"expected at most {_MAX_LONG_SIDE} pixels on the long side"
        )
    if width * height > _STRIP_PIXELS:
        return _crop_in_strips(image, width, height, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + size, left : left + size].copy()


def _crop_in_strips(image: Image.Image, width: int, height: int, size: int) -> UInt8:
    """The central crop of a long resized image in little memory, equal bit for bit.

    Pillow resizes along x, rounds to 8 bits, then along y; rows and columns are independent.
    """
    columns_HSC = _resize_central_columns(image, width, size)
    turned = Image.fromarray(np.ascontiguousarray(columns_HSC.swapaxes(0, 1)))
    return np.ascontiguousarray(_resize_central_columns(turned, height, size).swapaxes(0, 1))


def _resize_central_columns(image: Image.Image, width: int, size: int) -> UInt8:
    """Bicubic along x to `width`, of which the central `size` columns are kept. [H, size, 3]."""
    first = (width - size) // 2
    num_rows = max(1, _STRIP_PIXELS // width)
    strips = []
    for top in range(0, image.height, num_rows):
        strip = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        resized = strip.resize((width, strip.height), Image.Resampling.BICUBIC)
        strips.append(np.asarray(resized)[:, first : first + size])
    return np.concatenate(strips)


_bomb_lock = threading.Lock()
_num_decoding = 0
_saved_limit: int | None = None


@contextlib.contextmanager
def _without_bomb_check() -> Iterator[None]:
    """Switches off Pillow's process-wide pixel limit while any thread decodes here.

    Pillow warns at half of our limit and raises before the size can be read; we check ourselves.
    """
    global _num_decoding, _saved_limit
    with _bomb_lock:
        if _num_decoding == 0:
            _saved_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _num_decoding += 1
    try:
        yield
    finally:
        with _bomb_lock:
            _num_decoding -= 1
            if _num_decoding == 0:
                Image.MAX_IMAGE_PIXELS = _saved_limit


def _open(data: bytes) -> Any:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        known = data.startswith(_MAGIC)
        raise DataError(_BAD_HEADER if known else "not an image") from None
    except Exception as error:
        raise DataError(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "truncated" in text.lower():
        return _TRUNCATED
    # Some messages quote bytes or memory addresses, which differ from run to run.
    clear = text and len(text) <= 80 and "b'" not in text and "0x" not in text
    return "damaged image: " + (text if clear else type(error).__name__)


def _check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is None:
        return
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"zero size {width}x{height}")
    if width * height > max_pixels:
        raise DataError(f"huge image {width}x{height}: expected at most {max_pixels} pixels")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas size in a WebP header; libwebp allocates the canvas before Pillow tells its size."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise DataError(_TRUNCATED)
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _check_pixel_type(opened: Any) -> None:
    if opened.mode == "F":
        raise DataError("32-bit float image: expected 8 or 16 bits a channel")
    if opened.mode not in _KIND_OF_MODE:
        raise DataError(f"pixel mode {opened.mode}: expected RGB, grey, palette or CMYK")
    if opened.mode == "RGB" and any(
        isinstance(key, tuple) and max(key) > 255 for key in [opened.info.get("transparency")]
    ):
        raise DataError("16-bit RGB with a transparent colour: expected an alpha channel")
    if opened.format == "TIFF" and opened.mode.startswith("I"):
        bits, photometric, sample_format = (
            opened.tag_v2.get(_BITS_TAG, (1,)),
            opened.tag_v2.get(_PHOTOMETRIC_TAG),
            opened.tag_v2.get(_SAMPLE_FORMAT_TAG, (1,)),
        )
        if (tuple(bits), photometric, tuple(sample_format)) != ((16,), 1, (1,)):
            raise DataError(
                f"grey TIFF of {bits[0]} bits, photometric {photometric}, sample format "
                f"{sample_format[0]}: expected 16-bit unsigned with zero as black"
            )


def _orientation(opened: Any) -> int:
    try:
        value = opened.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
    return value if value in _TRANSPOSE_OF_ORIENTATION else 1


def _num_frames(opened: Any) -> int:
    try:
        return int(getattr(opened, "n_frames", 1))
    except Exception:  # a damaged later frame; the first one has been decoded
        return 1


def _to_rgb(image: Any, sixteen_bit: bool) -> tuple[Image.Image, list[str]]:
    wide = image.mode.startswith("I")
    kind = _KIND_OF_MODE[image.mode]
    notes = (["16-bit"] if wide or sixteen_bit else []) + ([kind] if kind else [])
    if wide:
        image = _narrow_16_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB"), notes
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    flat = Image.new("RGB", image.size, (255, 255, 255))
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat, [*notes, "alpha"]


def _narrow_16_bit(image: Any) -> Image.Image:
    """16-bit grey to L, or to LA where one grey value is declared transparent."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("32-bit integer image: expected 8 or 16 bits a channel")
    gray = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return gray
    alpha = np.where(values == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", (gray, Image.fromarray(alpha)))
