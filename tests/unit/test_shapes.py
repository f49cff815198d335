"""The embedded pictures and the judge that counts their modes: tested before anything is trained on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from dist_gan.embedded.judge import judge, mode_report
from dist_gan.embedded.shapes import AREA, CLASS_NAMES, PALETTE, SHAPES, SHIFT, cover, draw_shapes, paint

Pictures = NDArray[np.uint8]


@pytest.fixture(scope="module")
def unseen() -> tuple[Pictures, NDArray[np.int64]]:
    return draw_shapes(10_000, seed=31, first=123_456)


def to_bytes(signed: NDArray[np.float64]) -> Pictures:
    """[-1, 1] to uint8, clipped."""
    return np.rint((np.clip(signed, -1, 1) + 1) * 127.5).astype(np.uint8)


def to_signed(images: Pictures) -> NDArray[np.float64]:
    return images / 127.5 - 1


def one_shape(shape: str, colour: tuple[float, float, float]) -> Pictures:
    """An upright shape in the middle, in a colour of choice: 1 picture."""
    middle = np.zeros(1)
    coverage = cover(np.array([SHAPES.index(shape)]), x=middle, y=middle, area=middle + sum(AREA) / 2, angle=middle)
    return np.rint(255 * paint(coverage, np.array([colour]))).astype(np.uint8)


def untrained_generator(*, norm: bool, seed: int) -> nn.Module:
    """A small DCGAN generator as it is initialised: with batch norm N(0, 0.02), without He-normal."""
    torch.manual_seed(seed)
    stages: list[nn.Module] = []
    for index, (inner, outer) in enumerate([(16, 64), (64, 32), (32, 16), (16, 3)]):
        layer = nn.ConvTranspose2d(inner, outer, 4, 1 if index == 0 else 2, 0 if index == 0 else 1)
        fan_in = inner * (1 if index == 0 else 4)
        nn.init.normal_(layer.weight, 0.0, 0.02 if norm else float(np.sqrt(2.0 / fan_in)))
        nn.init.zeros_(layer.bias)
        hidden = [nn.BatchNorm2d(outer)] if norm else []
        stages += [layer, nn.Tanh()] if index == 3 else [layer, *hidden, nn.LeakyReLU(0.2)]
    return nn.Sequential(*stages)


def test_the_judge_reads_at_least_99_in_100_unseen_pictures_right(
    unseen: tuple[Pictures, NDArray[np.int64]],
) -> None:
    images, labels = unseen
    assert (judge(images) == labels).mean() >= 0.99


def test_the_judge_rejects_averages_of_two_pictures_of_different_modes(
    unseen: tuple[Pictures, NDArray[np.int64]],
) -> None:
    images, labels = unseen[0][:6000], unseen[1][:6000]
    partner = np.random.default_rng(0).permutation(len(images))
    differ = labels != labels[partner]
    averages = to_bytes((to_signed(images) + to_signed(images[partner])) / 2)[differ]
    assert len(averages) > 5000
    assert (judge(averages) >= 0).mean() <= 0.01


def test_the_judge_rejects_pictures_under_noise(unseen: tuple[Pictures, NDArray[np.int64]]) -> None:
    signed = to_signed(unseen[0][:3000])
    noisy = to_bytes(signed + 0.3 * np.random.default_rng(0).standard_normal(signed.shape))
    assert (judge(noisy) >= 0).mean() <= 0.01


@pytest.mark.parametrize("norm", [True, False], ids=["batch-norm", "no-norm"])
def test_the_judge_rejects_what_an_untrained_generator_makes(norm: bool) -> None:
    for seed in range(3):
        generator = untrained_generator(norm=norm, seed=seed)
        with torch.no_grad():
            samples = generator(torch.randn(300, 16, 1, 1)).permute(0, 2, 3, 1).numpy().astype(np.float64)
        assert (judge(to_bytes(samples)) >= 0).mean() <= 0.01


def test_a_half_erased_shape_belongs_to_no_mode(unseen: tuple[Pictures, NDArray[np.int64]]) -> None:
    for side in range(2):
        images = unseen[0][:1200].copy()
        images[:, :, 16 * side : 16 * side + 16] = images[:, :1, :1]
        assert (judge(images) >= 0).mean() <= 0.01


def test_a_shape_with_a_corner_bitten_off_belongs_to_no_mode() -> None:
    square = one_shape("square", tuple(PALETTE[0]))
    assert judge(square)[0] == CLASS_NAMES.index("red-square")
    square[:, 9:13, 9:13] = square[:, :1, :1]
    assert judge(square)[0] == -1


@pytest.mark.parametrize(
    "colour",
    [(0.6, 0.55, 0.25), (0.95, 0.5, 0.2), (0.9, 0.9, 0.2), (0.9, 0.3, 0.9), (0.2, 0.85, 0.85), (0.9, 0.9, 0.9)],
)
def test_a_shape_in_a_colour_that_is_none_of_the_three_belongs_to_no_mode(
    colour: tuple[float, float, float],
) -> None:
    for shape in SHAPES:
        assert judge(one_shape(shape, colour))[0] == -1


def test_a_shape_in_another_of_the_three_colours_is_another_mode() -> None:
    for index, name in enumerate(CLASS_NAMES):
        assert judge(one_shape(name.split("-")[1], tuple(PALETTE[index // len(SHAPES)])))[0] == index, name


def test_a_plain_background_and_a_plain_colour_belong_to_no_mode() -> None:
    for value in (0, 20, 128, 255):
        assert judge(np.full((3, 32, 32, 3), value, dtype=np.uint8)).tolist() == [-1, -1, -1]


def test_the_judge_refuses_pictures_of_another_kind_and_accepts_none_at_all() -> None:
    with pytest.raises(ValueError, match="uint8"):
        judge(np.zeros((2, 32, 32, 3), dtype=np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32 x 32"):
        judge(np.zeros((2, 28, 28, 3), dtype=np.uint8))
    assert judge(np.zeros((0, 32, 32, 3), dtype=np.uint8)).shape == (0,)


def test_a_picture_is_the_same_whatever_is_drawn_around_it() -> None:
    images, labels = draw_shapes(5000, seed=4)
    for first, count in ((0, 1), (17, 30), (2040, 20), (4999, 1)):
        part, part_labels = draw_shapes(count, seed=4, first=first)
        assert np.array_equal(part, images[first : first + count])
        assert np.array_equal(part_labels, labels[first : first + count])


def test_another_seed_draws_other_pictures_and_no_two_are_alike() -> None:
    ours, others = draw_shapes(3000, seed=0)[0], draw_shapes(3000, seed=1)[0]
    flat = np.concatenate([ours, others]).reshape(6000, -1)
    assert len(np.unique(flat, axis=0)) == 6000


def test_classes_come_in_equal_numbers_and_the_shapes_move() -> None:
    images, labels = draw_shapes(2400, seed=5)
    assert np.bincount(labels).tolist() == [200] * 12
    lit = images.max(axis=3).astype(np.float64) - images.max(axis=3).min()
    columns = (lit.sum(axis=1) * np.arange(32)).sum(axis=1) / lit.sum(axis=(1, 2))
    assert np.ptp(columns) > 1.6 * SHIFT


def test_the_report_counts_shares_of_the_valid_and_validity_of_all() -> None:
    modes = np.array([0] * 10 + [1] * 20 + [2] * 50 + [-1] * 20)
    report = mode_report(modes, modes_total=4)
    assert report == {"modes_covered": 3, "modes_total": 4, "smallest_share": 0.0, "valid_fraction": 0.8}
    assert mode_report(modes, modes_total=3)["smallest_share"] == pytest.approx(10 / (80 / 3))
    assert mode_report(np.arange(24) % 12)["smallest_share"] == 1.0
    nothing = {"modes_covered": 0, "modes_total": 12, "smallest_share": 0.0, "valid_fraction": 0.0}
    assert mode_report(np.full(5, -1)) == nothing
