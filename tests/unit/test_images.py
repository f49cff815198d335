"""Pictures of every kind become arrays of one kind, or are refused with a reason."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dist_gan.pictures import BadImage, decode, encode_png, examine, fit, grid, header, write_png
from dist_gan.types import TrainingFailed


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def quadrants() -> Image.Image:
    """Red, green / blue, white: tells every orientation from every other."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12], pixels[:8, 12:], pixels[8:, :12], pixels[8:, 12:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_comes_back_as_it_was_written(channels: int) -> None:
    image = noise(17, 9, channels)
    assert np.array_equal(decode(encode_png(image), name="x"), image)
    assert encode_png(image) == encode_png(image.copy())


def test_a_plain_jpeg_or_png_is_told_from_one_that_needed_a_rule() -> None:
    rgb = Image.fromarray(noise(16, 16, 3))
    assert examine(saved(rgb, "JPEG"), name="x").extension == "jpg"
    assert examine(saved(rgb.convert("L"), "JPEG"), name="x").extension == "jpg"
    assert examine(saved(rgb, "PNG"), name="x").extension == "png"
    for other in (
        saved(rgb, "WEBP"),
        saved(rgb.convert("P"), "PNG"),
        saved(rgb.convert("1"), "PNG"),
        saved(rgb.convert("CMYK"), "JPEG"),
        saved(rgb.convert("RGBA"), "PNG"),
        saved(rgb, "PNG", transparency=(0, 0, 0)),
        sixteen_bit_rgb_png(),
    ):
        assert examine(other, name="x").extension is None


def sixteen_bit_rgb_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x80\xff" * 3 * 16 for _ in range(16))
    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_of_16_bit_rgb_the_high_byte_is_kept() -> None:
    assert (decode(sixteen_bit_rgb_png(), name="x") == 0x80).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(quadrants(), kind, exif=exif.tobytes(), **({"quality": 100} if kind == "JPEG" else {}))
    picture = examine(data, name="x")
    expected = turns[orientation](np.asarray(quadrants()))
    assert picture.pixels.shape == expected.shape
    assert np.abs(picture.pixels.astype(int) - expected).mean() < 8
    assert (picture.extension is not None) == (orientation == 1)
    assert header(io.BytesIO(data), name="x")[:2] == expected.shape[:2]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 257, 32768, 65407, 65535]], np.uint16)
    data = saved(Image.fromarray(values), "PNG")
    assert decode(data, name="x")[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]
    assert np.array_equal(decode(saved(Image.fromarray(values), "TIFF"), name="x"), decode(data, name="x"))


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    assert decode(saved(Image.fromarray(pixels), "PNG"), name="x").tolist() == [
        [[10, 20, 30], [255] * 3],
        [[255] * 3, [255] * 3],
    ]
    grey = decode(saved(Image.fromarray(pixels[:, :, 2:].copy(), "LA"), "PNG"), name="x")
    assert grey.shape == (2, 2, 1)
    assert grey[1, 1, 0] == 255


def test_palettes_and_cmyk_become_rgb_and_one_bit_becomes_grey() -> None:
    flat = Image.new("RGB", (8, 8), (200, 30, 60))
    assert decode(saved(flat.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), name="x")[0, 0].tolist() == [
        200,
        30,
        60,
    ]
    cmyk = decode(saved(flat.convert("CMYK"), "JPEG", quality=95), name="x")
    assert cmyk.shape == (8, 8, 3)
    assert np.abs(cmyk[0, 0].astype(int) - (200, 30, 60)).max() < 8
    assert decode(saved(Image.new("1", (8, 8), 1), "PNG"), name="x").max() == 255


def test_of_an_animation_the_first_picture_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        picture = examine(data, name="x")
        assert picture.pixels[0, 0, 0] > 240
        assert picture.pixels[0, 0, 1] < 15
        assert picture.extension is None


BAD = {
    "empty": (b"", "empty"),
    "text": (b"hello, world" * 9, "not a picture"),
    "cut jpeg": (saved(Image.fromarray(noise(64, 64, 3)), "JPEG")[:1500], "cannot be decoded"),
    "cut png": (encode_png(noise(64, 64, 3))[:1500], "cannot be decoded"),
    "damaged png": (encode_png(noise(64, 64, 3)).replace(b"IDAT", b"IDAX"), "not a picture"),
    "bomb": (saved(Image.new("1", (9000, 9000)), "PNG"), "more than 67,108,864 pixels"),
    "larger bomb": (saved(Image.new("1", (20000, 20000)), "PNG"), "more than 67,108,864 pixels"),
    "floats": (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    "wide": (saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "outside 0..65535"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_with_name_and_reason(case: str) -> None:
    data, reason = BAD[case]
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data, name="cats/7.jpg")
    assert caught.value.name == "cats/7.jpg"
    assert str(caught.value).startswith("cats/7.jpg: ")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP"]))
def test_damaged_bytes_give_a_picture_or_a_bad_image_and_nothing_else(place: int, byte: int, kind: str) -> None:
    data = bytearray(saved(Image.fromarray(noise(8, 8, 3)), kind))
    data[place % len(data)] = byte
    with contextlib.suppress(BadImage):
        assert decode(bytes(data), name="x").dtype == np.uint8


def test_reducing_is_the_exact_average_of_the_area() -> None:
    image = noise(12, 12, 3)
    blocks = image.reshape(4, 3, 4, 3, 3).astype(float).mean(axis=(1, 3))
    assert np.array_equal(fit(image, resolution=4, channels=None), np.floor(blocks + 0.5))
    uneven = noise(10, 10, 1, seed=1)
    by_hand = np.repeat(np.repeat(uneven, 4, axis=0), 4, axis=1).reshape(4, 10, 4, 10, 1).astype(float)
    assert np.array_equal(fit(uneven, resolution=4, channels=None), np.floor(by_hand.mean(axis=(1, 3)) + 0.5))


@settings(max_examples=50, deadline=None)
@given(side=st.integers(5, 70), value=st.integers(0, 255))
def test_reducing_keeps_a_flat_picture_flat(side: int, value: int) -> None:
    assert (fit(np.full((side, side, 3), value, np.uint8), resolution=5, channels=None) == value).all()


def test_a_picture_that_is_not_square_is_cropped_around_its_centre() -> None:
    image = noise(8, 20, 3)
    assert np.array_equal(fit(image, resolution=8, channels=None), image[:, 6:14])
    assert np.array_equal(fit(image.transpose(1, 0, 2), resolution=8, channels=None), image[:, 6:14].transpose(1, 0, 2))


def test_a_small_picture_is_refused_padded_or_enlarged_as_told() -> None:
    image = noise(28, 28, 1)
    with pytest.raises(BadImage, match=r"7: 28x28 is smaller than 32x32; give a smaller --resolution, --pad") as caught:
        fit(image, resolution=32, channels=None, name="7")
    assert caught.value.name == "7"
    padded = fit(image, resolution=32, channels=None, pad=True)
    assert np.array_equal(padded[2:30, 2:30], image)
    assert int(padded.sum()) == int(image.sum())
    assert fit(image, resolution=32, channels=None, upscale=True).shape == (32, 32, 1)
    wide = fit(noise(20, 50, 3), resolution=32, channels=None, pad=True)
    assert np.array_equal(wide[6:26], noise(20, 50, 3)[:, 9:41])


def test_grey_and_rgb_turn_into_one_another_when_told() -> None:
    grey = noise(8, 8, 1)
    rgb = fit(grey, resolution=8, channels=3)
    assert rgb.shape == (8, 8, 3)
    assert np.array_equal(fit(rgb, resolution=8, channels=1), grey)
    assert fit(np.array([[[255, 0, 0]]], np.uint8), resolution=1, channels=1).tolist() == [[[76]]]


def test_a_grid_shows_pictures_row_by_row_with_borders() -> None:
    images = np.stack([np.full((4, 5, 3), value, np.uint8) for value in (50, 100, 150)])
    sheet = grid(images, columns=2, border=1)
    assert sheet.shape == (11, 13, 3)
    assert sheet[1:5, 1:6].min() == 50
    assert sheet[1:5, 7:12].max() == 100
    assert sheet[6:10, 1:6].min() == 150
    assert sheet[6:10, 7:].max() == 0


def test_a_png_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_png(str(tmp_path / "x.png"), noise(4, 4, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert np.array_equal(decode((tmp_path / "x.png").read_bytes(), name="x"), noise(4, 4, 3))
    with pytest.raises(TrainingFailed, match="cannot write"):
        write_png(str(tmp_path / "x.png" / "y.png"), noise(4, 4, 3))
