"""Counts the modes of the embedded data set in generated pictures, by fitting a drawing to each picture.

No learned weights are used. The colour is the one with the smallest residual. Centre, area and shade are computed from
moments of the coverage, and the angle of each shape from the phase of its third or fourth moment. The shape whose
drawing is nearest is refined by Gauss-Newton steps. Three residuals are then compared with limits: the root mean square
of the whole picture, the largest local mean, and the mean over the shape. A picture with a residual above its limit, or
with a geometry outside the range of real pictures, belongs to no mode.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_gan.embedded.shapes import AREA, BACKGROUND, CLASS_NAMES, PALETTE, SHADE, SHAPES, SHIFT, SIDE, TURN, cover

LARGEST_ERROR = 0.05
"""Largest root mean square difference, in [0, 1], between a valid picture and its drawing, over pixels and channels.

Real pictures stay below 0.006; the drawings of two different shapes differ by 0.06 or more.
"""
LARGEST_BLEMISH = 0.25
"""Largest mean difference, in [0, 1], between a valid picture and its drawing over 3 x 3 pixels, in any channel.

A missing, additional or discoloured spot exceeds this limit.
"""
LARGEST_TINT = 0.08
"""Largest mean difference, in [0, 1], between a valid picture and its drawing over the shape, in any channel.

A hue between two colours exceeds this limit.
"""
STEPS = 2
"""Number of Gauss-Newton steps; after two steps the median error of real pictures is 0.003."""
SLACK = 1.0
"""Tolerance around the range of real pictures: in pixels for the centre, and in tenths for the other values.

The other values are angle (radians), shade and logarithm of the area.
"""

Pictures = NDArray[np.uint8]
Floats = NDArray[np.float32]

GRID = (np.arange(SIDE) - (SIDE - 1) / 2).astype(np.float32)


class Fit(NamedTuple):
    """Drawing that is nearest to each of N pictures: mode, geometry as in `shapes.cover`, and residuals."""

    mode: NDArray[np.int64]
    x: Floats
    y: Floats
    area: Floats
    angle: Floats
    shade: Floats
    error: Floats
    """Root mean square of the residual over pixels and channels."""
    blemish: Floats
    """Largest absolute mean of the residual over 3 x 3 pixels, in any channel."""
    tint: Floats
    """Largest absolute mean of the residual over the shape, in any channel."""


def judge(images: Pictures) -> NDArray[np.int64]:
    """Returns the mode of each picture, int64 of shape (N,): 0 to 11, or -1 for no mode. `images` are uint8, N x 32 x
    32 x 3."""
    fit = fit_drawing(images)
    valid = (fit.error <= LARGEST_ERROR) & (fit.blemish <= LARGEST_BLEMISH) & (fit.tint <= LARGEST_TINT)
    valid &= np.maximum(np.abs(fit.x), np.abs(fit.y)) <= SHIFT + SLACK
    valid &= (fit.area >= AREA[0] * np.exp(-0.1 * SLACK)) & (fit.area <= AREA[1] * np.exp(0.1 * SLACK))
    valid &= np.abs(fit.angle) <= TURN + 0.1 * SLACK
    valid &= (fit.shade >= SHADE[0] - 0.1 * SLACK) & (fit.shade <= SHADE[1] + 0.1 * SLACK)
    return np.where(valid, fit.mode, -1)


def mode_report(modes: NDArray[np.int64], *, modes_total: int = len(CLASS_NAMES)) -> dict[str, float | int]:
    """Counts the modes that samples cover, and measures how evenly the samples cover the modes.

    Args:
        modes: mode of each sample, or -1, as `judge` returns them.
        modes_total: number of modes of the data set.

    Returns:
        `modes_covered`: number of modes with at least one sample; `modes_total`: as given; `smallest_share`: count of the
        rarest mode divided by the mean count, 1 if all modes are equally frequent; `valid_fraction`: fraction of the
        samples that belong to a mode.
    """
    counts = np.bincount(modes[modes >= 0], minlength=modes_total)
    return {
        "modes_covered": int((counts > 0).sum()),
        "modes_total": modes_total,
        "smallest_share": float(counts.min() / max(counts.mean(), 1e-9)),
        "valid_fraction": float(counts.sum() / max(len(modes), 1)),
    }


def fit_drawing(images: Pictures) -> Fit:
    """Fits a drawing to each picture. `images` are uint8, N x 32 x 32 x 3."""
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
    """Returns the best-fitting colour of each picture, N, and the amount (shade times coverage) of the colour per
    pixel, NHW."""
    ink = pictures - np.float32(BACKGROUND)
    directions = (PALETTE - BACKGROUND).astype(np.float32)
    amounts = [np.clip(ink @ (line / np.square(line).sum()), 0, 2) for line in directions]
    pairs = zip(amounts, directions, strict=True)
    left = [np.square(ink - amount[..., None] * line).sum(axis=(1, 2, 3)) for amount, line in pairs]
    colour = np.argmin(left, axis=0)
    return colour, np.choose(colour[:, None, None], amounts)


def _moments(amount: Floats) -> tuple[Floats, Floats, Floats]:
    """Returns centre (x, y) and area of each drawn shape, in pixels.

    For a shape of area A and shade s, the amounts per pixel sum to s A, and their squares to s^2 A.
    """
    inked = np.where(amount > 0.15, amount, np.float32(0))
    total = np.maximum(inked.sum(axis=(1, 2)), 1e-3)
    x = inked.sum(axis=1) @ GRID / total
    y = inked.sum(axis=2) @ GRID / total
    area = np.clip(total**2 / np.maximum(np.square(inked).sum(axis=(1, 2)), 1e-6), 20, 600)
    return x, y, area


def _angle_of(shape: str, amount: Floats, *, x: Floats, y: Floats) -> Floats:
    """Returns the angle of each shape from upright, N, in radians; 0 for a ring.

    The angle is computed from the phase of the moment of order 3 or 4, whichever fits the symmetry of the shape.
    """
    order, upright = {"ring": (0, 0.0), "square": (4, np.pi), "triangle": (3, np.pi / 2), "cross": (4, 0.0)}[shape]
    if order == 0:
        return np.zeros_like(x)
    z = (GRID[None, None, :] - x[:, None, None]) + np.complex64(1j) * (GRID[None, :, None] - y[:, None, None])
    power = z * z
    power = power * z if order == 3 else power * power
    phase = np.angle((amount * power).sum(axis=(1, 2)) * np.complex64(np.exp(-1j * upright)))
    return np.clip(phase / order, -0.5, 0.5).astype(np.float32)


def _cover(kind_N: NDArray[np.int64], at: Floats) -> Floats:
    """Computes `shapes.cover` for the geometry `at`: x, y, logarithm of the area, and angle, shape 4N."""
    return cover(kind_N, x=at[0], y=at[1], area=np.exp(at[2]), angle=at[3]).astype(np.float32)


def _gauss_newton(amount: Floats, kind_N: NDArray[np.int64], at: Floats) -> Floats:
    """Makes one Gauss-Newton step of the geometry, 4N, towards the drawing nearest to `amount` by least squares."""
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
    """Returns the largest absolute mean of an NHWC array over 3 x 3 pixels, at any position and in any channel, N."""
    rows = left[:, :-2] + left[:, 1:-1] + left[:, 2:]
    boxes = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    return np.abs(boxes).max(axis=(1, 2, 3))
