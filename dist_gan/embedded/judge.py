"""Counts modes of the embedded data set: reads each picture by fitting the drawing to it, with no learned weights.

The colour is the one that leaves the least behind; centre, area and shade come from moments of the coverage, the
angle of each shape from the phase of its third or fourth moment. The shape whose drawing is nearest is fitted by
Gauss-Newton steps and compared with the picture as a whole, place by place, and in its mean colour. A picture that
its best drawing does not explain, or which lies outside the range of the real ones, belongs to no mode.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_gan.embedded.shapes import AREA, BACKGROUND, CLASS_NAMES, PALETTE, SHADE, SHAPES, SHIFT, SIDE, TURN, cover

LARGEST_ERROR = 0.05
"""Root mean square over pixels and channels, in [0, 1], between a valid picture and its drawing. Real ones stay below
0.006, the drawings of two different shapes are 0.06 or more apart."""
LARGEST_BLEMISH = 0.25
"""Largest difference in any channel of the mean over any 3 x 3 pixels: a bite, a bulge or a stain."""
LARGEST_TINT = 0.08
"""Largest difference in any channel of the mean over the shape: a hue between two colours is neither."""
STEPS = 2
"""Gauss-Newton steps: two leave real pictures an error of 0.003 in the median."""
SLACK = 1.0
"""How far past the real pictures' range a fit may lie: pixels of shift, and tenths of angle, shade and log area."""

Pictures = NDArray[np.uint8]
Floats = NDArray[np.float32]

GRID = (np.arange(SIDE) - (SIDE - 1) / 2).astype(np.float32)


class Fit(NamedTuple):
    """The drawing nearest to each of N pictures: class, geometry as in `shapes.cover`, and what it leaves unexplained."""

    mode: NDArray[np.int64]
    x: Floats
    y: Floats
    area: Floats
    angle: Floats
    shade: Floats
    error: Floats
    """Root mean square over pixels and channels."""
    blemish: Floats
    """Largest absolute mean over 3 x 3 pixels, any channel."""
    tint: Floats
    """Largest absolute mean over the shape, any channel."""


def judge(images: Pictures) -> NDArray[np.int64]:
    """Mode of each picture, int64 N in 0..11, or -1 where it is none. `images` are uint8, N x 32 x 32 x 3."""
    fit = fit_drawing(images)
    valid = (fit.error <= LARGEST_ERROR) & (fit.blemish <= LARGEST_BLEMISH) & (fit.tint <= LARGEST_TINT)
    valid &= np.maximum(np.abs(fit.x), np.abs(fit.y)) <= SHIFT + SLACK
    valid &= (fit.area >= AREA[0] * np.exp(-0.1 * SLACK)) & (fit.area <= AREA[1] * np.exp(0.1 * SLACK))
    valid &= np.abs(fit.angle) <= TURN + 0.1 * SLACK
    valid &= (fit.shade >= SHADE[0] - 0.1 * SLACK) & (fit.shade <= SHADE[1] + 0.1 * SLACK)
    return np.where(valid, fit.mode, -1)


def mode_report(modes: NDArray[np.int64], *, modes_total: int = len(CLASS_NAMES)) -> dict[str, float | int]:
    """How many modes are covered and how evenly.

    Args:
        modes: as `judge` gives them.
        modes_total: modes there are.

    Returns:
        `modes_covered`: modes with at least one sample; `modes_total`; `smallest_share`: the rarest mode's count over
        the mean count, 1 where all modes are equally frequent; `valid_fraction`: samples that belong to a mode.
    """
    counts = np.bincount(modes[modes >= 0], minlength=modes_total)
    return {
        "modes_covered": int((counts > 0).sum()),
        "modes_total": modes_total,
        "smallest_share": float(counts.min() / max(counts.mean(), 1e-9)),
        "valid_fraction": float(counts.sum() / max(len(modes), 1)),
    }


def fit_drawing(images: Pictures) -> Fit:
    """The nearest drawing to each picture. `images` are uint8, N x 32 x 32 x 3."""
    if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"pictures of shape {images.shape} and type {images.dtype}; give uint8, N x {SIDE} x {SIDE} x 3"
        )
    starts = range(0, max(len(images), 1), 512)
    parts = [_fit_some(images[start : start + 512].astype(np.float32) / np.float32(255)) for start in starts]
    return Fit(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def _fit_some(pictures: Floats) -> Fit:
    colour, amount = _colour_of(pictures)
    x, y, area = _moments(amount)
    errors, angles = [], []
    for kind, shape in enumerate(SHAPES):
        angle = _angle_of(shape, amount, x=x, y=y)
        drawn = _cover(np.full(len(pictures), kind), np.stack([x, y, np.log(area), angle]))
        shade = (amount * drawn).sum(axis=(1, 2)) / np.maximum(np.square(drawn).sum(axis=(1, 2)), 1e-6)
        errors.append(np.square(amount - shade[:, None, None] * drawn).sum(axis=(1, 2)))
        angles.append(angle)
    kind_N = np.argmin(errors, axis=0)
    angle = np.choose(kind_N, angles)
    at = np.stack([x, y, np.log(area), angle])
    for _ in range(STEPS):
        at = _gauss_newton(amount, kind_N, at)
    drawn = _cover(kind_N, at)
    shade = (amount * drawn).sum(axis=(1, 2)) / np.maximum(np.square(drawn).sum(axis=(1, 2)), 1e-6)
    ink = (PALETTE[colour] - BACKGROUND).astype(np.float32) * shade[:, None]
    left = pictures - np.float32(BACKGROUND) - drawn[..., None] * ink[:, None, None, :]
    tint = np.abs((left * drawn[..., None]).sum(axis=(1, 2))).max(axis=1) / np.maximum(drawn.sum(axis=(1, 2)), 1e-6)
    return Fit(
        mode=colour * len(SHAPES) + kind_N,
        x=at[0],
        y=at[1],
        area=np.exp(at[2]),
        angle=at[3],
        shade=shade,
        error=np.sqrt(np.square(left).mean(axis=(1, 2, 3))),
        blemish=_largest_mean(left),
        tint=tint,
    )


def _colour_of(pictures: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The colour that explains each picture best, and how much of it (shade times coverage) each pixel holds, NHW."""
    ink = pictures - np.float32(BACKGROUND)
    directions = (PALETTE - BACKGROUND).astype(np.float32)
    amounts = [np.clip(ink @ (line / np.square(line).sum()), 0, 2) for line in directions]
    pairs = zip(amounts, directions, strict=True)
    left = [np.square(ink - amount[..., None] * line).sum(axis=(1, 2, 3)) for amount, line in pairs]
    colour = np.argmin(left, axis=0)
    return colour, np.choose(colour[:, None, None], amounts)


def _moments(amount: Floats) -> tuple[Floats, Floats, Floats]:
    """Centre and area of what is drawn: a shape of area A and shade s holds s A in sum and s^2 A in squares."""
    inked = np.where(amount > 0.15, amount, np.float32(0))
    total = np.maximum(inked.sum(axis=(1, 2)), 1e-3)
    x = inked.sum(axis=1) @ GRID / total
    y = inked.sum(axis=2) @ GRID / total
    area = np.clip(total**2 / np.maximum(np.square(inked).sum(axis=(1, 2)), 1e-6), 20, 600)
    return x, y, area


def _angle_of(shape: str, amount: Floats, *, x: Floats, y: Floats) -> Floats:
    """Angle from upright by the phase of the moment of the shape's symmetry: order 3 or 4; a ring has none."""
    order, upright = {"ring": (0, 0.0), "square": (4, np.pi), "triangle": (3, np.pi / 2), "cross": (4, 0.0)}[shape]
    if order == 0:
        return np.zeros_like(x)
    z = (GRID[None, None, :] - x[:, None, None]) + np.complex64(1j) * (GRID[None, :, None] - y[:, None, None])
    power = z * z
    power = power * z if order == 3 else power * power
    phase = np.angle((amount * power).sum(axis=(1, 2)) * np.complex64(np.exp(-1j * upright)))
    return np.clip(phase / order, -0.5, 0.5).astype(np.float32)


def _cover(kind_N: NDArray[np.int64], at: Floats) -> Floats:
    """`shapes.cover` at x, y, log area, angle: 4N."""
    return cover(kind_N, x=at[0], y=at[1], area=np.exp(at[2]), angle=at[3]).astype(np.float32)


def _gauss_newton(amount: Floats, kind_N: NDArray[np.int64], at: Floats) -> Floats:
    """One step of least squares towards the drawing of a shape nearest to `amount`, in geometry and shade."""
    drawn = _cover(kind_N, at)
    shade = (amount * drawn).sum(axis=(1, 2)) / np.maximum(np.square(drawn).sum(axis=(1, 2)), 1e-6)
    steps = np.array([0.5, 0.5, 0.05, 0.05], dtype=np.float32)
    slopes = [drawn]
    for index, step in enumerate(steps):
        moved = at.copy()
        moved[index] += step
        slopes.append((_cover(kind_N, moved) - drawn) * (shade / step)[:, None, None])
    flat = np.stack([slope.reshape(-1, SIDE * SIDE) for slope in slopes], axis=1)
    left = (amount - shade[:, None, None] * drawn).reshape(-1, SIDE * SIDE)
    normal = flat @ flat.transpose(0, 2, 1) + 1e-2 * np.eye(5, dtype=np.float32)
    change = np.linalg.solve(normal, flat @ left[..., None])[:, 1:, 0].T
    limits = np.array([1.0, 1.0, 0.15, 0.15], dtype=np.float32)[:, None]
    return at + np.clip(change, -limits, limits)


def _largest_mean(left: Floats) -> Floats:
    """Largest absolute mean over 3 x 3 pixels of NHWC, any place and channel: N."""
    rows = left[:, :-2] + left[:, 1:-1] + left[:, 2:]
    boxes = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    return np.abs(boxes).max(axis=(1, 2, 3))
