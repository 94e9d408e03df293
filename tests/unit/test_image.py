"""Decoding odd image files, and the centre crop where the golden vectors do not reach."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from repa_pipeline.data import image as image_module
from repa_pipeline.data.image import adm_center_crop, decode_image
from repa_pipeline.errors import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """32x16, one colour a quadrant: red, green / blue, white."""
    image = Image.new("RGB", (32, 16), WHITE)
    for color, box in ((RED, (0, 0, 16, 8)), (GREEN, (16, 0, 32, 8)), (BLUE, (0, 8, 16, 16))):
        image.paste(color, box)
    return image


def oriented(fmt: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encode(corners(), fmt, exif=exif, **options)


def corner_colors(image: Image.Image) -> list[tuple[int, ...]]:
    """Top left, top right, bottom left, bottom right, as pure colours (JPEG is lossy)."""
    right, bottom = image.width - 1, image.height - 1
    pixels = [image.getpixel(xy) for xy in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    return [tuple(255 * (value > 127) for value in pixel) for pixel in pixels]


def test_plain_rgb_is_unchanged() -> None:
    decoded = decode_image(encode(corners(), "PNG"))
    assert decoded.notes == () and (decoded.width, decoded.height) == (32, 16)
    assert np.array_equal(np.asarray(decoded.image), np.asarray(corners()))


def test_gray_16_bit_is_divided_by_257_and_rounded_to_nearest() -> None:
    # 32768 / 257 = 127.502 -> 128; 255 / 257 = 0.99 -> 1 (the high byte alone would say 0)
    values = np.array([[0, 128, 129, 255, 32768, 65407, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]
    for fmt in ("PNG", "TIFF"):
        decoded = decode_image(encode(Image.fromarray(values), fmt))
        assert decoded.notes == ("16-bit", "grayscale")
        assert np.asarray(decoded.image)[0, :, 0].tolist() == expected
    pgm = b"P5 2 1 65535\n" + struct.pack(">HH", 32768, 65535)
    assert np.asarray(decode_image(pgm).image)[0, :, 2].tolist() == [128, 255]


def test_rgb_16_bit_keeps_the_high_byte() -> None:
    pixels = struct.pack(">9H", 0x80FF, 0, 0xFFFF, 1, 2, 3, 0x1234, 0x4567, 0x89AB)
    decoded = decode_image(png_16_bit_rgb(3, 1, pixels))
    assert decoded.notes == ("16-bit",)
    assert np.asarray(decoded.image)[0].tolist() == [[128, 0, 255], [0, 0, 0], [18, 69, 137]]


def png_16_bit_rgb(width: int, height: int, pixels: bytes) -> bytes:

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = [pixels[i : i + width * 6] for i in range(0, len(pixels), width * 6 or 1)]
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("image", "options", "notes", "pixel"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), {}, ("alpha",), WHITE),
        # 100 * 128/255 + 255 * 127/255 = 177.2
        (Image.new("RGBA", (2, 2), (100, 0, 255, 128)), {}, ("alpha",), (177, 127, 255)),
        (Image.new("LA", (2, 2), (0, 51)), {}, ("grayscale", "alpha"), (204, 204, 204)),
        (Image.new("L", (2, 2), 7), {"transparency": 7}, ("grayscale", "alpha"), WHITE),
        (Image.new("RGB", (2, 2), RED), {"transparency": BLUE}, ("alpha",), RED),
        (Image.new("1", (2, 2), 1), {}, ("grayscale",), WHITE),
        (Image.new("L", (2, 2), 90), {}, ("grayscale",), (90, 90, 90)),
        (
            Image.fromarray(np.full((2, 2), 999, np.uint16)),
            {"transparency": 999},
            ("16-bit", "grayscale", "alpha"),
            WHITE,
        ),
    ],
)
def test_modes_become_rgb_over_white(image, options, notes, pixel) -> None:
    decoded = decode_image(encode(image, "PNG", **options))
    assert decoded.image.mode == "RGB" and decoded.notes == notes
    assert decoded.image.getpixel((1, 1)) == pixel


def test_palette_and_its_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encode(image, "PNG"))
    assert decoded.notes == ("palette",)
    assert np.asarray(decoded.image)[0].tolist() == [[10, 20, 30], [200, 100, 0]]
    for transparency in (1, b"\xff\x00"):
        clear = decode_image(encode(image, "PNG", transparency=transparency))
        assert clear.notes == ("palette", "alpha")
        assert np.asarray(clear.image)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_modes_that_no_file_holds_directly() -> None:
    palette_alpha = Image.new("P", (1, 1))
    palette_alpha.putpalette([200, 100, 0])
    palette_alpha = palette_alpha.convert("PA")
    palette_alpha.putalpha(0)
    premultiplied = Image.new("RGBA", (1, 1), (100, 0, 255, 128)).convert("RGBa")
    for image, notes, expected in (
        (palette_alpha, ["palette", "alpha"], WHITE),
        (premultiplied, ["alpha"], (177, 127, 255)),
    ):
        flat, got = image_module._to_rgb(image, sixteen_bit=False)
        assert got == notes
        assert np.abs(np.array(flat.getpixel((0, 0))) - expected).max() <= 1


@pytest.mark.parametrize("fmt", ["JPEG", "TIFF"])
def test_cmyk_colors(fmt: str) -> None:
    cmyk = Image.new("CMYK", (32, 16), (0, 255, 255, 0))
    cmyk.paste((255, 255, 0, 128), (16, 0, 32, 16))
    decoded = decode_image(encode(cmyk, fmt))
    assert decoded.notes == ("cmyk",)
    left, right = decoded.image.getpixel((2, 2)), decoded.image.getpixel((29, 2))
    assert np.abs(np.array(left) - RED).max() <= 3
    assert np.abs(np.array(right) - (0, 0, 127)).max() <= 3


def test_ycck_jpeg_is_cmyk() -> None:
    data = bytearray(encode(Image.new("CMYK", (16, 16), (128, 128, 128, 0)), "JPEG"))
    adobe = data.index(b"Adobe")
    data[adobe + 11] = 2  # transform 2: YCCK; grey CMY is grey YCC too
    decoded = decode_image(bytes(data))
    assert decoded.notes == ("cmyk",) and decoded.image.mode == "RGB"


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
    ],
)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(fmt: str, orientation: int, expected: list[tuple[int, ...]]) -> None:
    data = oriented(fmt, orientation)
    upright = decode_image(data)
    assert corner_colors(upright.image) == expected
    assert upright.notes == ((f"exif {orientation}",) if orientation > 1 else ())
    assert upright.image.size == ((16, 32) if orientation > 4 else (32, 16))
    assert (upright.width, upright.height) == (32, 16)
    as_stored = decode_image(data, upright=False)
    assert as_stored.notes == ()
    assert corner_colors(as_stored.image) == [RED, GREEN, BLUE, WHITE]


def test_tiff_is_turned_once_whatever_is_asked() -> None:
    for upright in (True, False):
        decoded = decode_image(oriented("TIFF", 6), upright=upright)
        assert corner_colors(decoded.image) == [BLUE, RED, WHITE, GREEN]
        assert decoded.notes == ("exif 6",)
        assert (decoded.width, decoded.height) == (32, 16)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_invalid_orientation_is_ignored(orientation: int) -> None:
    decoded = decode_image(oriented("JPEG", orientation))
    assert decoded.notes == () and corner_colors(decoded.image) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame_of_several(fmt: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (GREEN, BLUE)]
    data = encode(corners().resize((16, 16)), fmt, save_all=True, append_images=frames)
    decoded = decode_image(data)
    assert decoded.notes[-1] == "first of 3 frames"
    assert corner_colors(decoded.image) == [RED, GREEN, BLUE, WHITE]


def test_notes_keep_their_order() -> None:
    exif = Image.Exif()
    exif[274] = 8
    frame = Image.new("LA", (8, 4), (0, 0))
    data = encode(frame, "PNG", save_all=True, append_images=[Image.new("LA", (8, 4))], exif=exif)
    assert decode_image(data).notes == ("grayscale", "alpha", "exif 8", "first of 2 frames")


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


PNG, JPEG = encode(noise(64, 64), "PNG"), encode(noise(64, 64), "JPEG")


def gif_with_screen(width: int, height: int, frame: int) -> bytes:
    data = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b",")
    struct.pack_into("<HH", data, 6, width, height)
    struct.pack_into("<HH", data, at + 5, frame, frame)
    return bytes(data)


def vp8x_with_canvas(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[274] = 1
    data = bytearray(encode(Image.new("RGBA", (8, 8)), "WEBP", lossless=True, exif=exif))
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file (0 bytes)"),
        (b"<html>not here</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (PNG[:12], "unreadable header (damaged, truncated or of zero size)"),
        (JPEG[:6], "truncated image file"),
        (JPEG[: len(JPEG) // 2], "truncated image file"),
        (PNG[: len(PNG) // 2], "truncated image file"),
        (encode(corners(), "WEBP")[:-4], "truncated image file"),
        (encode(corners(), "GIF")[:-40], "truncated image file"),
        (gif_with_screen(0, 0, 0), "zero size"),
        (gif_with_screen(8, 8, 60000), "huge image 60000x60000"),
        (vp8x_with_canvas(2**24, 200), "huge image 16777216x200"),
        (png_16_bit_rgb(0, 1, b""), "zero size"),
        (encode(Image.new("F", (2, 2)), "TIFF"), "32-bit float"),
        (encode(Image.new("I", (2, 2), 100_000), "TIFF"), "32 bits"),
        (encode(Image.new("LAB", (2, 2)), "TIFF"), "pixel mode LAB"),
    ],
)
def test_unusable_files_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_image(data)
    text = str(caught.value)
    assert reason in text
    assert "\n" not in text and "b'" not in text and "0x0" not in text and len(text) < 120


def test_damaged_pixels_are_refused() -> None:
    data = bytearray(PNG)
    data[500] ^= 0xFF
    with pytest.raises(DataError, match="damaged image"):
        decode_image(bytes(data))


def test_pixel_limit_is_ours_alone() -> None:
    # Above Pillow's warning (89 million) and below our limit, then above our limit.
    large = encode(Image.new("1", (10_000, 9_000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(large).image.size == (10_000, 9_000)
        with pytest.raises(DataError, match="huge image 10000x9000: expected at most 5000 pixels"):
            decode_image(large, max_pixels=5000)
    assert decode_image(encode(corners(), "PNG"), max_pixels=32 * 16).width == 32


def test_huge_is_refused_from_the_header() -> None:
    header_only = png_16_bit_rgb(100_000, 100_000, b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="huge image 100000x100000"):
            decode_image(header_only)


def test_pillows_limit_is_restored_after_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1234)

    def work() -> None:
        for _ in range(20):
            decode_image(JPEG)
            with pytest.raises(DataError):
                decode_image(JPEG[:99])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Image.MAX_IMAGE_PIXELS == 1234


def plain_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The published procedure in one piece: resize the whole image, then cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = round(image.width * scale), round(image.height * scale)
    pixels = np.array(image.resize(shape, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 3), (63, 64), (64, 64), (128, 300), (411, 120), (3, 200), (200, 3)]
)
def test_crop_of_any_size_equals_the_plain_path(shape: tuple[int, int]) -> None:
    cropped = adm_center_crop(noise(*shape), 64)
    assert cropped.shape == (64, 64, 3) and cropped.dtype == np.uint8
    assert np.array_equal(cropped, plain_center_crop(noise(*shape), 64))


@pytest.mark.parametrize("shape", [(300, 5), (5, 300), (301, 97), (120, 77)])
def test_crop_in_strips_equals_the_plain_path(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "_STRIP_PIXELS", 6000)
    assert np.array_equal(adm_center_crop(noise(*shape), 64), plain_center_crop(noise(*shape), 64))


def test_crop_refusals() -> None:
    with pytest.raises(DataError, match="expected RGB"):
        adm_center_crop(Image.new("L", (64, 64)), 64)
    with pytest.raises(DataError, match="aspect too extreme: 100000x1"):
        adm_center_crop(Image.new("RGB", (100_000, 1)), 256)
