"""The rules for pictures as arithmetic: what numpy and fractions say of every pixel, not what was seen once."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from dist_gan import pictures
from dist_gan.pictures import BadImage, decode, examine, fit, header

Pixels = np.ndarray


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    """Colours that change slowly, so that a JPEG holds them well."""
    return Image.fromarray(noise(5, 7, 3, seed=3)).resize((width, height), Image.Resampling.BICUBIC)


# -- decoded at a fraction of the size ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [
        (127, 127, 32), (128, 128, 32), (128, 300, 32), (256, 256, 32), (300, 255, 32), (512, 600, 32), (520, 512, 64),
        (255, 256, 64), (256, 257, 64), (1024, 768, 32), (160, 200, 16), (64, 64, 64), (400, 500, 64), (40, 40, 16), (64, 90, 16),
    ],
)  # fmt: skip
def test_a_large_jpeg_is_decoded_at_the_smallest_size_that_has_twice_the_side(
    height: int, width: int, side: int
) -> None:
    """In eighths of the picture's own size, rounded up; whole where it has less than four times the side."""
    scaled = decode(saved(smooth(height, width), "JPEG", quality=95), name="x", reduce_to=side)
    sizes = [(-(-height * eighths // 8), -(-width * eighths // 8)) for eighths in range(1, 9)]
    large = min(height, width) >= 4 * side
    wanted = next(size for size in sizes if min(size) >= 2 * side) if large else (height, width)
    assert scaled.shape[:2] == wanted


def test_what_is_left_out_of_a_large_jpeg_is_not_missed() -> None:
    """Against the average of all pixels: detail of the size of a new pixel survives, which half the size would blur."""
    fine = Image.fromarray(noise(64, 64, 3, seed=9)).resize((260, 260), Image.Resampling.BILINEAR)
    data = saved(fine, "JPEG", quality=95, subsampling=0)
    exact = fit(decode(data, name="x"), resolution=64, channels=3).astype(int)
    quick = fit(decode(data, name="x", reduce_to=64), resolution=64, channels=3).astype(int)
    assert np.abs(exact - quick).mean() < 5.0, "13 at once the side"


def test_a_place_for_the_pixels_is_used_if_it_has_their_shape_and_never_otherwise() -> None:
    data = saved(smooth(32, 32), "JPEG", quality=95)
    place = np.zeros((32, 32, 3), np.uint8)
    assert decode(data, name="x", out=place, reduce_to=32) is place
    assert np.array_equal(place, examine(data, name="x").pixels)
    for shape in ((16, 16, 3), (64, 64, 3), (32, 32, 1)):
        other = np.full(shape, 7, np.uint8)
        got = decode(data, name="x", out=other)
        assert got is not other
        assert np.array_equal(got, place)


# -- orientation -------------------------------------------------------------------------------------------------------

TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
"""What EXIF 2.32 says of its tag 274: which way the stored rows and columns are to be shown."""


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("side", [16, 128], ids=["small", "large"])
def test_a_square_photograph_is_turned_although_its_pixels_would_fit_as_they_are(orientation: int, side: int) -> None:
    """The one that is decoded straight into a batch: its shape says nothing of how it is to be turned."""
    corner = np.zeros((side, side, 3), np.uint8)
    corner[: side // 2, : side // 2], corner[: side // 2, side // 2 :] = 255, (255, 0, 0)
    if side > 16:  # so that the file is large enough to be understood and not searched
        corner[side // 2 :] = noise(side // 2, side, 3) // 4
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(corner), "JPEG", quality=100, subsampling=0, exif=exif.tobytes())
    assert (len(data) > 4096) == (side > 16)
    place = np.zeros((side, side, 3), np.uint8)
    got = decode(data, name="x", out=place)
    assert np.abs(got.astype(int) - TURNS[orientation](corner)).mean() < 3
    stored = saved(Image.fromarray(corner[:, : side // 2]), "JPEG", exif=exif.tobytes())
    assert header(io.BytesIO(stored), name="x")[:2] == TURNS[orientation](corner[:, : side // 2]).shape[:2]


# -- transparency, grey, 16 bits ---------------------------------------------------------------------------------------


def test_a_half_transparent_picture_shows_as_much_white_as_it_lets_through() -> None:
    """alpha times colour + (1 - alpha) times white, for every alpha and every kind of transparency."""
    rgba = noise(16, 16, 4, seed=2)
    rgba[..., 3] = np.arange(256).reshape(16, 16)
    alpha = rgba[..., 3:].astype(float) / 255
    wanted = alpha * rgba[..., :3] + (1 - alpha) * 255
    got = decode(saved(Image.fromarray(rgba), "PNG"), name="x").astype(float)
    assert np.abs(got - wanted).max() <= 1.0
    grey = decode(saved(Image.fromarray(rgba[..., 2:].copy(), "LA"), "PNG"), name="x").astype(float)
    assert grey.shape == (16, 16, 1)
    assert np.abs(grey - wanted[..., 2:]).max() <= 1.0
    flat = Image.fromarray(np.array([[[9, 8, 7], [200, 100, 50]]], np.uint8))
    keyed = decode(saved(flat, "PNG", transparency=(9, 8, 7)), name="x")
    assert keyed.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    paletted = flat.convert("P", palette=Image.Palette.ADAPTIVE)
    first = int(np.asarray(paletted)[0, 0])
    assert decode(saved(paletted, "PNG", transparency=first), name="x")[0, 0].tolist() == [255, 255, 255]


def test_rgb_becomes_grey_by_the_weights_of_itu_r_601() -> None:
    rgb = noise(32, 32, 3, seed=4)
    wanted = rgb.astype(float) @ (0.299, 0.587, 0.114)
    got = fit(rgb, resolution=32, channels=1)[..., 0].astype(float)
    assert np.abs(got - wanted).max() <= 0.51
    assert np.array_equal(fit(got[..., None].astype(np.uint8), resolution=32, channels=3), np.stack([got] * 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, high byte first"])
def test_every_16_bit_grey_value_is_scaled_and_rounded(kind: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = Image.fromarray(values)
    if kind.endswith("first"):
        image = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    got = decode(saved(image, kind.split(",")[0]), name="x")[..., 0]
    assert np.array_equal(got, np.floor(values / 65535 * 255 + 0.5))


def test_a_header_tells_grey_from_colour_as_decoding_does() -> None:
    rgb = smooth(8, 12)
    for mode, kind, channels in (
        ("L", "PNG", 1), ("1", "PNG", 1), ("LA", "PNG", 1), ("I;16", "PNG", 1), ("RGB", "JPEG", 3), ("L", "JPEG", 1),
        ("P", "PNG", 3), ("RGBA", "PNG", 3), ("CMYK", "JPEG", 3), ("P", "GIF", 3),
    ):  # fmt: skip
        image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16)) if mode == "I;16" else rgb.convert(mode)
        data = saved(image, kind)
        assert header(io.BytesIO(data), name="x") == (8, 12, channels), mode
        assert decode(data, name="x").shape == (8, 12, channels), mode


def test_the_limit_of_pixels_is_the_area_and_not_a_side() -> None:
    def claimed(width: int, height: int) -> io.BytesIO:
        chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        data = b"IDAT" + zlib.compress(bytes(64))
        parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, data))
        return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts))

    assert header(claimed(8192, 8192), name="x").height == 8192
    assert header(claimed(2**16, 2**10), name="x").width == 2**16
    for width, height in ((8193, 8192), (2**16, 2**10 + 1)):
        with pytest.raises(BadImage, match=f"{width}x{height} is more than 67,108,864 pixels"):
            header(claimed(width, height), name="x")


# -- one size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "resolution"), [(12, 4), (10, 4), (33, 32), (64, 32), (100, 16), (47, 9), (7, 7)])
def test_each_new_pixel_is_the_average_of_the_area_under_it_rounded_half_up(side: int, resolution: int) -> None:
    """Every pixel cut into resolution x resolution equal pieces, so that the areas are whole numbers of them."""
    image = noise(side, side, 3, seed=side)
    pieces = image.repeat(resolution, axis=0).repeat(resolution, axis=1).astype(np.int64)
    sums = pieces.reshape(resolution, side, resolution, side, 3).sum(axis=(1, 3))
    assert np.array_equal(fit(image, resolution=resolution, channels=None), (2 * sums + side**2) // (2 * side**2))


@pytest.mark.parametrize(("height", "width"), [(8, 21), (21, 8), (9, 16), (8, 9)])
def test_a_crop_lies_in_the_middle_and_an_odd_pixel_is_left_over_at_the_end(height: int, width: int) -> None:
    image = noise(height, width, 3)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = image[top : top + side, left : left + side]
    assert np.array_equal(fit(image, resolution=side, channels=None), middle)
    assert np.array_equal(fit(image, resolution=4, channels=None), fit(middle.copy(), resolution=4, channels=None))
    enlarged = Image.fromarray(middle).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(fit(image, resolution=32, channels=None, upscale=True), np.asarray(enlarged))


@pytest.mark.parametrize(("height", "width"), [(27, 27), (5, 31), (31, 4), (3, 50), (50, 3), (32, 20)])
def test_a_padded_picture_lies_in_the_middle_of_black(height: int, width: int) -> None:
    image = noise(height, width, 1) | 1
    got = fit(image, resolution=32, channels=None, pad=True)
    wanted = np.zeros((32, 32, 1), np.uint8)
    inside = image[max(0, height - 32) // 2 :, max(0, width - 32) // 2 :][:32, :32]
    top, left = (32 - len(inside)) // 2, (32 - inside.shape[1]) // 2
    wanted[top : top + len(inside), left : left + inside.shape[1]] = inside
    assert np.array_equal(got, wanted)


def test_pictures_in_a_grid_stand_where_row_and_column_say() -> None:
    images = noise(5, 3, 4, 3) | 1
    sheet = pictures.grid(images, columns=3, border=2)
    assert sheet.shape == (2 * 5 + 2, 3 * 6 + 2, 3)
    for place, picture in enumerate(images):
        top, left = 2 + place // 3 * 5, 2 + place % 3 * 6
        assert np.array_equal(sheet[top : top + 3, left : left + 4], picture)
    assert int(sheet.sum()) == int(images.sum()), "everything else is black"
