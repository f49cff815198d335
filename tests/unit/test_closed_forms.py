"""Small rooms against formulas: spectral norms, fingerprints, files of tensors, points on a ring, shapes and their judge."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn.functional import conv2d, linear

from dist_gan.checkpoint.tensorfile import FileBuffer, from_bytes, read_header, to_bytes
from dist_gan.config import PointsData
from dist_gan.data.points import PointStream
from dist_gan.draws import Draws
from dist_gan.embedded import shapes
from dist_gan.embedded.judge import fit_drawing, judge, mode_report
from dist_gan.models.spectral import SpectralConv2d, SpectralEmbedding, SpectralLinear, begin_spectral
from dist_gan.runtime.fingerprint import fingerprint
from dist_gan.types import UserError, facts_of

# -- spectral normalisation ----------------------------------------------------------------------------------------------


def diagonal(*values: float) -> SpectralLinear:
    layer = SpectralLinear(len(values), len(values)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor(values, dtype=torch.float64)))
    return layer


def test_an_iteration_is_one_step_of_the_power_method() -> None:
    """v = W'u / |W'u|, then u = Wv / |Wv|, by numpy."""
    torch.manual_seed(0)
    layer = SpectralConv2d(3, 5, 2).double()
    layer.begin()
    matrix = layer.weight.detach().flatten(1).numpy()
    u = layer.u.numpy().copy()
    for _ in range(3):
        layer.iterate(layer.weight)
        v = matrix.T @ u
        v /= np.linalg.norm(v)
        u = matrix @ v
        u /= np.linalg.norm(u)
        assert np.allclose(layer.v.numpy(), v, atol=1e-14)
        assert np.allclose(layer.u.numpy(), u, atol=1e-14)
    assert np.allclose(layer.normed_weight().detach().flatten(1).numpy(), matrix / (u @ matrix @ v), atol=1e-14)


def test_the_first_iterations_leave_what_the_power_method_leaves() -> None:
    """Of diag(2, 1) each iteration quarters the tangent of the vector's angle: 15 leave 4**-15 of what chance gave."""
    for seed in range(5):
        torch.manual_seed(seed)
        layer = diagonal(2.0, 1.0)
        torch.manual_seed(seed)
        start = torch.randn(2, dtype=torch.float64)
        torch.manual_seed(seed)
        begin_spectral(layer)
        tangent = float((layer.u[1] / layer.u[0]).abs())
        assert tangent == pytest.approx(float((start[1] / start[0]).abs()) * 4.0**-15, rel=1e-6)


def test_the_layers_are_those_of_torch_with_the_weight_divided_by_its_norm() -> None:
    torch.manual_seed(1)
    conv, dense, table = SpectralConv2d(3, 4, 3, 2, 1), SpectralLinear(6, 4), SpectralEmbedding(5, 4)
    for layer in (conv, dense, table):
        layer.double().begin()
        for _ in range(300):
            layer.iterate(layer.weight)
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in (conv, dense, table)]
    images, rows = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    assert torch.allclose(conv(images), conv2d(images, conv.weight / norms[0], conv.bias, 2, 1))
    assert torch.allclose(dense(rows), linear(rows, dense.weight / norms[1], dense.bias))
    assert torch.allclose(table(torch.tensor([3, 0])), table.weight[[3, 0]] / norms[2])
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(dense, {"weight": w}, rows), dense.weight)


# -- fingerprints --------------------------------------------------------------------------------------------------------


def fingerprint_by_hand(data: bytes, count: int) -> int:
    """Elements, plus each word of 8 bytes times an odd number of its place, modulo 2**64; as a signed number."""
    data += bytes(-len(data) % 8)
    total = count
    for place in range(len(data) // 8):
        word = int.from_bytes(data[8 * place : 8 * place + 8], "little")
        total += word * ((place + 1) * 0x9E3779B97F4A7C15 | 1)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_a_fingerprint_is_the_sum_that_its_description_says(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    tensor = (torch.randn(size) * 50).to(dtype)
    data = bytes(tensor.view(torch.uint8).tolist()) if size else b""
    assert int(fingerprint(tensor)) == fingerprint_by_hand(data, size)
    if size > 1:
        padded = torch.cat([tensor[:1], tensor])[1:]  # a view that begins at no multiple of a word
        assert int(fingerprint(padded)) == int(fingerprint(tensor))


def test_a_fingerprint_goes_on_counting_places_from_part_to_part(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randint(0, 256, (1003,), dtype=torch.uint8)
    whole = fingerprint_by_hand(bytes(tensor.tolist()), 1003)
    monkeypatch.setattr(f"{fingerprint.__module__}._WORDS_AT_ONCE", 10)
    assert int(fingerprint(tensor)) == whole
    swapped = torch.cat([tensor[80:160], tensor[:80], tensor[160:]])
    assert int(fingerprint(swapped)) != whole, "two parts have changed places"


# -- files of tensors ----------------------------------------------------------------------------------------------------

TENSORS = {
    "b/half": torch.randn(3).to(torch.bfloat16), "a/flags": torch.tensor([True, False, True]), "c/scalar": torch.tensor(2.5),
    "a/wide": torch.arange(6, dtype=torch.float64).view(2, 3), "a/bytes": torch.arange(5, dtype=torch.uint8),
    "d/none": torch.empty(0, 4), "e/counts": torch.tensor([2**40, -1]), "f/short": torch.tensor([7], dtype=torch.int16),
}  # fmt: skip


def test_a_file_buffer_is_a_safetensors_file_with_every_number_at_the_place_it_tells() -> None:
    buffer = FileBuffer({name: facts_of(tensor) for name, tensor in TENSORS.items()}, pinned=False)
    for name, tensor in reversed(TENSORS.items()):
        buffer.put(name, tensor)
    data = bytes(buffer.bytes())
    for read in (safetensors.torch.load(data), from_bytes(data, name="x")):
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype
            assert read[name].shape == tensor.shape
            assert torch.equal(read[name], tensor)
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end, "no gap, which the format forbids"
        end = stop
        width = TENSORS[name].dtype.itemsize
        assert (8 + length + start) % width == 0, "a number lies at a multiple of its width"
        assert stop - start == TENSORS[name].numel() * width
        place = buffer.places[name]
        assert place["offsets"] == [8 + length + start, 8 + length + stop]
        assert (place["shape"], place["dtype"]) == (list(TENSORS[name].shape), entry["dtype"])
    assert 8 + length + end == len(data)
    assert from_bytes(to_bytes(TENSORS), name="x").keys() == TENSORS.keys()


def test_a_file_whose_header_does_not_fit_its_size_is_none() -> None:
    tensors = {"a": torch.arange(5.0), "b": torch.arange(3)}
    data = to_bytes(tensors)
    for head in (data, data[:300]):
        places = read_header(head, size=len(data), name="x")
        assert {name: place.facts for name, place in places.items()} == {n: facts_of(t) for n, t in tensors.items()}
        for name, tensor in tensors.items():
            assert data[places[name].start : places[name].end] == tensor.numpy().tobytes()
    assert read_header(to_bytes({}), size=len(to_bytes({})), name="empty") == {}
    for head, size in (
        (data, len(data) - 1), (data, len(data) + 1), (data[:20], len(data)), (b"", 0), (data[:4], 4),
        (b"\xff" * 40, 40), (b"\x05" + bytes(7) + b"[1,2]" + bytes(9), 22),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^x is no safetensors file"):
            read_header(head, size=size, name="x")


# -- points on a ring ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_a_point_is_its_gaussians_centre_and_its_own_offset(rank: int, world_size: int) -> None:
    section = PointsData(modes=5, radius=0.6, sigma=0.03)
    slots = torch.arange(rank, 60, world_size)
    stream = PointStream(section, classes=5, slots=slots, draws=Draws(9, dtype=torch.float64))
    stream.seek(3)
    batch = stream.next()
    assert (batch.draw, stream.draw, stream.values()["draw"]) == (3, 4, 4)
    labels = Draws(9).integers("points/mode", draw=3, slots=slots, below=5)
    offsets = Draws(9, dtype=torch.float64).normal("points/offset", draw=3, slots=slots, shape=(2,))
    for row, label in enumerate(labels.tolist()):
        angle = 2 * math.pi * label / 5
        centre = (0.6 * math.cos(angle), 0.6 * math.sin(angle))
        wanted = [c + 0.03 * o for c, o in zip(centre, offsets[row].tolist(), strict=True)]
        assert batch.images[row].tolist() == pytest.approx(wanted, abs=1e-12)
    assert batch.labels.tolist() == labels.tolist()
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3, 4]
    assert batch.keys == tuple(f"point-3-{slot}" for slot in slots.tolist())
    other = PointStream(section, classes=0, slots=torch.arange(60), draws=Draws(9, dtype=torch.float64))
    other.load_values({"draw": 3, "fingerprint": stream.fingerprint})
    assert torch.equal(other.next().images[rank::world_size], batch.images)
    other.seek(0)
    assert torch.equal(other.preview(7), other.next().images[:7])
    for change in ({"modes": 6}, {"radius": 0.5}, {"sigma": 0.04}):
        changed = PointStream(section.model_copy(update=change), classes=0, slots=slots, draws=Draws(9))
        with pytest.raises(UserError, match="not those of the checkpoint"):
            changed.load_values(stream.values())
    with pytest.raises(UserError, match="not those of the checkpoint"):
        PointStream(section, classes=0, slots=slots, draws=Draws(8)).load_values(stream.values())


# -- shapes and their judge ----------------------------------------------------------------------------------------------


def covered(shape: str, *, x: float = 0.0, y: float = 0.0, area: float = 215.0, angle: float = 0.0) -> np.ndarray:
    at = {name: np.array([value]) for name, value in (("x", x), ("y", y), ("area", area), ("angle", angle))}
    return shapes.cover(np.array([shapes.SHAPES.index(shape)]), **at)[0]


GRID = np.arange(32) - 15.5


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_shape_covers_its_area_around_its_centre(shape: str) -> None:
    for area, x, y in ((190.0, 0.0, 0.0), (240.0, 0.7, -0.4), (215.0, -1.0, 1.0)):
        coverage = covered(shape, x=x, y=y, area=area)
        assert coverage.sum() == pytest.approx(area, rel=0.02)
        assert (coverage.sum(axis=0) @ GRID) / coverage.sum() == pytest.approx(x, abs=0.1), "x is to the right"
        assert (coverage.sum(axis=1) @ GRID) / coverage.sum() == pytest.approx(y, abs=0.1), "y is down"


def test_each_shape_is_what_its_name_says() -> None:
    def inside(shape: str, x: float, y: float) -> bool:
        column, row = round(x + 15.5), round(y + 15.5)
        return bool(covered(shape, area=216.0)[row, column] > 0.5)

    radius = math.sqrt(216 / (0.75 * math.pi))  # 9.6; the hole has half of it
    assert [inside("ring", r, 0.5) for r in (0.5, 0.4 * radius, 0.7 * radius, 0.9 * radius, 1.1 * radius)] == [
        False, False, True, True, False,
    ]  # fmt: skip
    half = math.sqrt(216) / 2  # 7.3
    assert [inside("square", x, y) for x, y in ((0, 0), (half - 1, half - 1), (half + 1, 0), (0, half + 1))] == [
        True, True, False, False,
    ]  # fmt: skip
    height = 3 * math.sqrt(216 / (3 * math.sqrt(3)))  # 19.3, of which two thirds are above the centre
    assert [inside("triangle", 0, y * height) for y in (-0.72, -0.55, 0.0, 0.28, 0.4)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert [inside("triangle", x, 0.28 * height) for x in (-9, 9)] == [True, True], "the tip is up and the base is down"
    assert [inside("triangle", x, -0.4 * height) for x in (-9, 9)] == [False, False]
    bar = math.sqrt(216 / 5)  # 6.6
    assert [inside("cross", x * bar, y * bar) for x, y in ((1.3, 0), (0, 1.3), (0, 0), (1, 1), (1.7, 0))] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_an_angle_turns_clockwise() -> None:
    """A quarter turn of a triangle brings its tip from above to the right."""
    upright, turned = covered("triangle"), covered("triangle", angle=math.pi / 2)
    assert np.allclose(turned, np.rot90(upright, -1), atol=1e-9)


def test_drawn_pictures_are_the_background_and_the_shaded_colour_in_the_ranges_that_are_told() -> None:
    images, labels = shapes.draw_shapes(600, seed=8)
    assert labels.tolist() == [n % 12 for n in range(600)]
    fit = fit_drawing(images)
    assert (fit.mode == labels).mean() > 0.99
    assert images[:, 0, 0].tolist() == [[round(255 * 0.08)] * 3] * 600
    for name, values, (low, high) in (
        ("x", fit.x, (-1.0, 1.0)), ("y", fit.y, (-1.0, 1.0)), ("area", fit.area, (190.0, 240.0)),
        ("shade", fit.shade, (0.8, 1.0)), ("angle", fit.angle[labels % 4 != 0], (-0.08, 0.08)),
    ):  # fmt: skip
        width = high - low
        assert values.min() == pytest.approx(low, abs=0.2 * width), name
        assert values.max() == pytest.approx(high, abs=0.2 * width), name
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.1 * width), name
    for colour, want in enumerate(shapes.PALETTE):
        of_colour = images[(labels // 4 == colour) & (labels % 4 == 1)]  # squares, which are filled in the middle
        middle = of_colour[:, 15:17, 15:17].mean(axis=(0, 1, 2)) / 255
        assert np.allclose(middle, want * 0.9, atol=0.03)


def drawn(shape: str = "square", colour: int = 1, *, shade: float = 0.9, **at: float) -> np.ndarray:
    picture = shapes.paint(covered(shape, **at)[None], shapes.PALETTE[[colour]] * shade)
    return np.rint(255 * picture).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ({"x": 1.8}, {"x": 2.4}), ({"x": -1.8}, {"x": -2.4}), ({"y": 1.8}, {"y": 2.4}), ({"y": -1.8}, {"y": -2.4}),
        ({"area": 180.0}, {"area": 160.0}), ({"area": 255.0}, {"area": 280.0}),
        ({"shade": 0.74}, {"shade": 0.62}), ({"angle": 0.15}, {"angle": 0.24}), ({"angle": -0.15}, {"angle": -0.24}),
    ],
)  # fmt: skip
def test_a_shape_counts_a_little_past_the_range_of_the_real_ones_and_no_further(
    shape: str, inside: dict[str, float], outside: dict[str, float]
) -> None:
    mode = 4 + shapes.SHAPES.index(shape)
    assert judge(drawn(shape, **inside)).tolist() == [mode]
    round_at_any_angle = shape == "ring" and "angle" in outside
    assert judge(drawn(shape, **outside)).tolist() == [mode if round_at_any_angle else -1]


def test_a_stain_a_tint_and_noise_are_told_from_a_valid_picture() -> None:
    """Each just past one limit alone: 0.25 over 3x3 pixels, 0.08 over the shape, 0.05 over all pixels."""
    valid = drawn().astype(float)
    assert judge(valid.astype(np.uint8)).tolist() == [5]
    stained = valid.copy()
    stained[0, 2:5, 2:5, 0] += 0.30 * 255
    fainter = valid.copy()
    fainter[0, 2:5, 2:5, 0] += 0.20 * 255
    assert judge(np.concatenate([stained, fainter]).astype(np.uint8)).tolist() == [-1, 5]
    mask = covered("square")[None, ..., None]
    tinted = [np.clip(valid + mask * np.array([amount, 0, amount]) * 255, 0, 255) for amount in (0.05, 0.14)]
    assert judge(np.concatenate(tinted).astype(np.uint8)).tolist() == [5, -1]
    rng = np.random.default_rng(0)
    noisy = [np.clip(np.rint(valid + sd * 255 * rng.standard_normal(valid.shape)), 0, 255) for sd in (0.03, 0.075)]
    assert judge(np.concatenate(noisy).astype(np.uint8)).tolist() == [5, -1]


def test_a_report_is_counted_by_hand() -> None:
    modes = np.array([0, 0, 0, 3, 3, -1, 11, -1])
    assert mode_report(modes) == {
        "modes_covered": 3, "modes_total": 12, "smallest_share": 0.0, "valid_fraction": 6 / 8,
    }  # fmt: skip
    assert mode_report(np.array([0, 1, 1, 1]), modes_total=2)["smallest_share"] == 0.5
