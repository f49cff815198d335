"""Draws the pictures of the embedded data set: 4 shapes in 3 colours at 32x32, hence twelve classes or modes.

Picture number i is a function of (seed, i) alone. The class of the picture is i % 12; position, size, angle and shade
vary with i. Edges are anti-aliased by a signed distance function.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE = 32
SHAPES = ("ring", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue")
CLASS_NAMES: tuple[str, ...] = tuple(f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES)
"""Name of each class: class k is shape k % 4 in colour k

4.
"""

PALETTE = np.array([(0.95, 0.22, 0.20), (0.20, 0.85, 0.30), (0.25, 0.42, 1.00)])
"""RGB values, in [0, 1], of each colour at full shade."""
BACKGROUND = 0.08
"""Grey value of the background, in [0, 1]."""
SHADE = (0.8, 1.0)
"""Range of the factor by which the colour of a shape is multiplied."""
SHIFT = 1.0
"""Largest distance of a shape's centre from the middle of the picture along each axis, in pixels."""
AREA = (190.0, 240.0)
"""Range of the area of a shape, in pixels, the same for all four shapes."""
TURN = 0.08
"""Largest angle of a shape from upright, in radians; the angle has no effect on a ring."""
EDGE = 1.5
"""Width of the anti-aliased edge between shape and background, in pixels."""

Floats = NDArray[np.float64]


def draw_shapes(count: int, *, seed: int, first: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws the pictures number `first` to `first + count - 1`; returns them, uint8 NHWC, and their classes, int64 N."""
    index = np.arange(first, first + count, dtype=np.uint64)
    labels = (index % np.uint64(len(CLASS_NAMES))).astype(np.int64)
    unit = [_uniform(index, seed=seed, purpose=purpose) for purpose in range(5)]
    images = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    for start in range(0, count, 2048):
        part = slice(start, start + 2048)
        coverage = cover(
            labels[part] % 4,
            x=(2 * unit[0][part] - 1) * SHIFT,
            y=(2 * unit[1][part] - 1) * SHIFT,
            area=AREA[0] + (AREA[1] - AREA[0]) * unit[2][part],
            angle=(2 * unit[3][part] - 1) * TURN,
        )
        shade = SHADE[0] + (SHADE[1] - SHADE[0]) * unit[4][part]
        images[part] = np.rint(255 * paint(coverage, PALETTE[labels[part] // 4] * shade[:, None]))
    return images, labels


def paint(coverage: Floats, colour: Floats) -> Floats:
    """Paints shapes on the background: returns pictures, RGB in [0, 1], NHWC.

    `coverage` is the coverage of each pixel, NHW, and `colour` the colour of each shape, N3.
    """
    return BACKGROUND + coverage[..., None] * (colour[:, None, None, :] - BACKGROUND)


def cover(shape: NDArray[np.int64], *, x: Floats, y: Floats, area: Floats, angle: Floats) -> Floats:
    """Computes the fraction of each pixel that a shape covers, NHW in [0, 1].

    Args:
        shape: index into SHAPES, N.
        x: centre of gravity right of the middle, in pixels, N.
        y: centre of gravity below the middle, in pixels, N.
        area: area of the shape, in pixels, N.
        angle: rotation clockwise from upright, in radians, N.
    """
    grid = np.arange(SIDE) - (SIDE - 1) / 2
    dx, dy = grid[None, None, :] - x[:, None, None], grid[None, :, None] - y[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance = np.empty((len(shape), SIDE, SIDE))
    for kind, function in enumerate((_ring, _square, _triangle, _cross)):
        mine = shape == kind
        distance[mine] = function(u[mine], v[mine], area[mine, None, None])
    return np.clip(0.5 - distance / EDGE, 0.0, 1.0)


def _ring(u: Floats, v: Floats, area: Floats) -> Floats:
    """Computes the signed distance to a ring, a disc with a hole of half the radius of the disc."""
    radius = np.sqrt(area / (0.75 * np.pi))
    return np.abs(np.hypot(u, v) - 0.75 * radius) - 0.25 * radius


def _square(u: Floats, v: Floats, area: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - np.sqrt(area) / 2


def _triangle(u: Floats, v: Floats, area: Floats) -> Floats:
    """Computes the signed distance to an equilateral triangle, tip up, with its centre of gravity at the origin."""
    inner_radius = np.sqrt(area / (3 * np.sqrt(3)))
    slanted = np.abs(u) * (np.sqrt(3) / 2) - v / 2
    return np.maximum(slanted, v) - inner_radius


def _cross(u: Floats, v: Floats, area: Floats) -> Floats:
    """Computes the signed distance to a cross of two bars, each three times as long as wide, which together cover five
    squares."""
    width = np.sqrt(area / 5)
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1.5 * width, v - 0.5 * width), np.maximum(v - 1.5 * width, u - 0.5 * width))


def _uniform(index: NDArray[np.uint64], *, seed: int, purpose: int) -> Floats:
    """Returns numbers in [0, 1) as a function of (seed, purpose, index).

    The function applies two rounds of SplitMix64's finaliser (Steele et al. 2014).
    """
    word = _mix(index + np.uint64((seed * 16 + purpose) * 0x9E3779B97F4A7C15 % 2**64))
    return (_mix(word ^ np.uint64(purpose + 1)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
