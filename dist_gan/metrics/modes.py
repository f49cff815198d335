"""Counts modes of the embedded data set: reads each picture by fitting the drawing to it, with no learned weights.

The colour is the one that leaves the least behind; centre, area and shade come from moments of the coverage, the
angle of each shape from the phase of its third or fourth moment; then the fitted shape is drawn and compared with
the picture. A picture whose best drawing leaves too much unexplained, or which lies outside the range of the real
ones, belongs to no mode.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_gan.data.shapes import AREA, BACKGROUND, CLASS_NAMES, PALETTE, SHADE, SHAPES, SHIFT, SIDE, cover, paint

LARGEST_ERROR = 0.055
"""Root mean square over pixels and channels, in [0, 1], between a valid picture and its drawing. Real pictures stay
below 0.02; averages of two and noise of sigma 0.3 begin above 0.06."""
MARGIN = 0.8
"""The best shape's error is at most this share of the second best's: otherwise it is neither."""

Pictures = NDArray[np.uint8]
Floats = NDArray[np.float64]


def judge(images: Pictures) -> NDArray[np.int64]:
    """Mode of each picture, int64 N in 0..11, or -1 where it is none. `images` are uint8, N x 32 x 32 x 3."""
    if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"pictures of shape {images.shape} and type {images.dtype}; give uint8, N x {SIDE} x {SIDE} x 3"
        )
    parts = [_judge_some(images[start : start + 1024] / 255.0) for start in range(0, len(images), 1024)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def mode_report(modes: NDArray[np.int64], *, modes_total: int = len(CLASS_NAMES)) -> dict[str, float | int]:
    """How many modes are covered and how evenly.

    Args:
        modes: as `judge` gives them.
        modes_total: modes there are.

    Returns:
        `modes_covered`: modes with at least one sample; `modes_total`; `smallest_share`: the rarest mode's count over
        its fair share of all samples, valid or not; `valid_fraction`: samples that belong to a mode.
    """
    counts = np.bincount(modes[modes >= 0], minlength=modes_total)
    return {
        "modes_covered": int((counts > 0).sum()),
        "modes_total": modes_total,
        "smallest_share": float(counts.min() / (len(modes) / modes_total)),
        "valid_fraction": float((modes >= 0).mean()),
    }


def _judge_some(pictures: Floats) -> NDArray[np.int64]:
    colour, coverage = _colour_of(pictures)
    x, y, area, shade = _moments(coverage)
    count = len(pictures)
    errors = np.empty((len(SHAPES), count))
    for shape in range(len(SHAPES)):
        errors[shape] = _error_of(pictures, colour, coverage, np.full(count, shape), x=x, y=y, area=area, shade=shade)
    ranked = np.sort(errors, axis=0)
    fits = (ranked[0] <= LARGEST_ERROR) & (ranked[0] <= MARGIN * ranked[1])
    in_range = (
        (np.maximum(np.abs(x), np.abs(y)) <= SHIFT + 1.5)
        & (area >= 0.8 * AREA[0])
        & (area <= 1.2 * AREA[1])
        & (shade >= SHADE[0] - 0.1)
        & (shade <= SHADE[1] + 0.1)
    )
    return np.where(fits & in_range, colour * len(SHAPES) + errors.argmin(axis=0), -1)


def _colour_of(pictures: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The colour that explains each picture best, and how much of it (shade times coverage) each pixel holds."""
    ink = pictures - BACKGROUND
    directions = PALETTE - BACKGROUND
    amounts = np.clip(
        np.einsum("nhwc,kc->nkhw", ink, directions) / np.square(directions).sum(axis=1)[:, None, None], 0, 2
    )
    left = ink[:, None] - amounts[..., None] * directions[:, None, None, :]
    colour = np.square(left).sum(axis=(2, 3, 4)).argmin(axis=1)
    return colour, amounts[np.arange(len(pictures)), colour]


def _moments(amount: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Centre, area and shade of what is drawn: a shape of area A and shade s holds s A in sum and s^2 A in squares."""
    grid = np.arange(SIDE) - (SIDE - 1) / 2
    inked = np.where(amount > 0.15, amount, 0.0)
    total = np.maximum(inked.sum(axis=(1, 2)), 1e-9)
    x = (inked.sum(axis=1) * grid).sum(axis=1) / total
    y = (inked.sum(axis=2) * grid).sum(axis=1) / total
    area = np.maximum(total**2 / np.maximum(np.square(inked).sum(axis=(1, 2)), 1e-9), 1.0)
    return x, y, area, total / area


def _error_of(
    pictures: Floats,
    colour: NDArray[np.int64],
    amount: Floats,
    shape: NDArray[np.int64],
    *,
    x: Floats,
    y: Floats,
    area: Floats,
    shade: Floats,
) -> Floats:
    """Root mean square error of the best drawing of a shape, over a few sizes and angles around the moments'."""
    angle = _angle_of(SHAPES[int(shape[0])], amount, x=x, y=y)
    best = np.full(len(pictures), np.inf)
    turns = (0.0,) if shape[0] == 0 else (-0.08, 0.0, 0.08)
    for growth in (0.93, 1.0):
        for turn in turns:
            drawn = cover(shape, x=x, y=y, area=area * growth, angle=np.clip(angle + turn, -0.4, 0.4))
            ink = (amount * drawn).sum(axis=(1, 2)) / np.maximum(np.square(drawn).sum(axis=(1, 2)), 1e-9)
            ideal = paint(drawn, PALETTE[colour] * np.clip(ink, *SHADE)[:, None])
            best = np.minimum(best, np.sqrt(np.square(pictures - ideal).mean(axis=(1, 2, 3))))
    return best


def _angle_of(shape: str, amount: Floats, *, x: Floats, y: Floats) -> Floats:
    """Angle from upright by the phase of the moment of the shape's symmetry: order 3 or 4."""
    grid = np.arange(SIDE) - (SIDE - 1) / 2
    z = (grid[None, None, :] - x[:, None, None]) + 1j * (grid[None, :, None] - y[:, None, None])
    order, upright = {"ring": (1, 0.0), "square": (4, np.pi), "triangle": (3, np.pi / 2), "cross": (4, 0.0)}[shape]
    phase = np.angle((amount * z**order).sum(axis=(1, 2)) * np.exp(-1j * upright))
    return phase / order
