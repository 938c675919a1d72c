"""Product pictures for the synthetic catalog, drawn with Pillow.

A drawing is a list of parts on a 100 × 100 board, each a path in a subset of SVG's path language. Its cloth takes the
colour and the pattern, the kind of product gives the shape, the cut one of its two variants. Light, backdrop, size and
pose vary by chance, as between real photographs.

Knows how products look; does not know who sells or buys them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.float64]
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "crimson": (193, 32, 54),
    "orange": (243, 128, 33),
    "yellow": (247, 200, 46),
    "green": (38, 128, 78),
    "sky": (78, 184, 226),
    "navy": (36, 52, 124),
    "violet": (138, 92, 204),
    "pink": (244, 132, 178),
}
"""In the order of a ring, so that neighbours resemble each other; apart in hue or in lightness."""
PATTERNS = ("plain", "stripes", "dots", "checks")
CUTS = 2

_SUPERSAMPLING = 4
_CURVE_STEPS = 14
_PAPER: RGB = (252, 249, 243)  # the second colour of every pattern
_MATERIALS: dict[str, RGB] = {
    "white": (247, 245, 241),
    "cream": (236, 226, 208),
    "wood": (176, 124, 78),
    "brass": (201, 164, 92),
    "dark": (62, 54, 52),
    "coffee": (84, 52, 36),
}
_BACKDROPS: tuple[RGB, ...] = ((244, 241, 236), (238, 240, 242), (247, 243, 239), (236, 238, 234), (243, 238, 241))


class Part(NamedTuple):
    path: str
    """`M x y`, `L x y`, `C` for a cubic curve, `E cx cy rx ry` for an ellipse; absolute, y downwards; `Z` optional."""
    fill: str = "cloth"
    """`cloth` (colour and pattern), `body` (colour alone), `shade` (darker colour) or one of the materials."""
    width: float = 0.0
    """Draws the path as a line this wide; 0 fills it."""


class Drawing(NamedTuple):
    parts: tuple[Part, ...]
    """From back to front."""
    floor: str | None = None
    """Where a standing product touches the ground; the others lie flat."""


_TEE_NECK = (
    Part("M 38 15 C 44 12 56 12 62 15 C 58 23 42 23 38 15 Z", "shade"),
    Part("M 37.5 15 C 42 25 58 25 62.5 15", "body", 3.4),
)
_TEE = Drawing(
    (
        Part(
            "M 37 15 C 42 23 58 23 63 15 L 75 19 C 84 24 90 35 95 48 L 80 55 C 78 50 76 46 74 43 L 74 88"
            " C 60 91 40 91 26 88 L 26 43 C 24 46 22 50 20 55 L 5 48 C 10 35 16 24 25 19 Z"
        ),
        *_TEE_NECK,
        Part("M 95 48 L 80 55 M 5 48 L 20 55 M 26 87 C 40 90 60 90 74 87", "shade", 1.4),
        Part("M 74 43 C 73 34 74 27 76 20 M 26 43 C 27 34 26 27 24 20", "shade", 0.8),
    )
)
_LONG_TEE = Drawing(
    (
        Part(
            "M 37 15 C 42 23 58 23 63 15 L 75 19 C 85 25 90 52 95 82 L 83 85 C 80 66 77 54 74 44 L 74 89"
            " C 60 92 40 92 26 89 L 26 44 C 23 54 20 66 17 85 L 5 82 C 10 52 15 25 25 19 Z"
        ),
        *_TEE_NECK,
        Part("M 94 79 L 82.5 82 M 6 79 L 17.5 82", "body", 5.0),
        Part("M 74 44 C 73 34 74 27 76 20 M 26 44 C 27 34 26 27 24 20", "shade", 0.8),
    )
)
_SNEAKER_SOLE = (
    Part("M 79 57 C 91 59 96 66 95 74 L 73 74 C 72 66 74 60 79 57 Z", "white"),
    Part("M 6 72 L 95 72 C 98 78 96 84 91 84 L 13 84 C 7 84 5 79 6 72 Z", "white"),
    Part("M 8 78 L 95 78", "shade", 1.4),
)
_SNEAKER = Drawing(
    (
        Part("M 14 38 C 22 46 36 42 44 31 L 50 36 L 30 52 Z", "dark"),
        Part(
            "M 7 36 C 9 31 15 31 18 36 C 24 45 36 41 45 29 C 47 27 50 28 52 31 C 58 43 67 52 80 56"
            " C 92 59 96 66 95 75 L 7 75 C 5 62 4 48 7 36 Z"
        ),
        *_SNEAKER_SOLE,
        Part("M 7 36 C 9 31 15 31 18 36 C 19 48 19 60 18 74 L 7 74 C 5 62 4 48 7 36 Z", "shade"),
        Part("M 46 41 L 55 35 M 51 47.5 L 60 41.5 M 57 53 L 66 47.5 M 63.5 57.5 L 72 53", "white", 2.8),
    ),
    floor="E 51 85 46 4",
)
_HIGH_SNEAKER = Drawing(
    (
        Part("E 28 12 17 5", "dark"),
        Part(
            "M 9 12 C 20 18 34 18 46 11 C 48 10 50 12 50 15 C 50 28 54 40 62 47 C 68 52 74 54 80 56"
            " C 92 59 96 66 95 75 L 7 75 C 6 52 8 32 9 12 Z"
        ),
        *_SNEAKER_SOLE,
        Part("M 9 50 C 14 50 19 56 19 74 L 7 74 Z", "shade"),
        Part("M 42 22 L 51 20 M 43 30 L 53 27 M 46 38 L 56 34 M 51 46 L 61 41 M 58 53 L 68 48", "white", 2.8),
        Part("E 25 34 7 7", "white"),
    ),
    floor="E 51 85 46 4",
)
_CAP = Drawing(
    (
        Part("M 54 60 C 68 52 92 58 98 71 C 98 75 94 76 88 74 C 76 69 62 68 50 70 Z", "shade"),
        Part("M 10 66 C 6 34 24 16 45 16 C 66 16 80 36 78 64 C 58 71 30 72 10 66 Z"),
        Part("M 45 17 C 58 30 62 48 60 68 M 45 17 C 32 30 27 48 28 69", "shade", 0.9),
        Part("E 45 16 4 2.6", "shade"),
    )
)
_SUN_HAT = Drawing(
    (
        Part("M 2 66 C 6 52 94 52 98 66 C 98 82 76 88 50 88 C 24 88 2 82 2 66 Z"),
        Part(
            "M 23 66 C 24 34 30 18 42 18 C 46 18 47 20 50 20 C 53 20 54 18 58 18 C 70 18 76 34 77 66"
            " C 64 74 36 74 23 66 Z"
        ),
        Part("M 23.4 57 C 36 65 64 65 76.6 57 L 77 66 C 64 74 36 74 23 66 Z", "dark"),
    )
)
_TOTE_HEM = Part("M 18 38 L 82 38 L 82.5 44 L 17.5 44 Z", "body")
_TOTE = Drawing(
    (
        Part("M 37 40 C 38 16 62 16 63 40", "shade", 4.0),
        Part("M 18 38 L 82 38 C 84 58 86 76 87 92 C 64 95 36 95 13 92 C 14 76 16 58 18 38 Z"),
        _TOTE_HEM,
        Part("M 34 52 C 34 12 66 12 66 52", "body", 4.6),
    )
)
_SHOULDER_TOTE = Drawing(
    (
        Part("M 37 46 C 38 -2 62 -2 63 46", "shade", 3.2),
        Part("M 20 44 L 80 44 L 80 88 C 80 93 77 95 72 95 L 28 95 C 23 95 20 93 20 88 Z"),
        Part("M 19.5 43 L 80.5 43 L 80.5 49 L 19.5 49 Z", "body"),
        Part("M 33 57 C 34 -8 66 -8 67 57", "body", 3.6),
    )
)
_MUG = Drawing(
    (
        Part("M 68 38 C 98 30 98 78 66 74", "body", 7.5),
        Part("M 12 24 L 13 76 C 14 87 22 90 42 90 C 62 90 70 87 71 76 L 72 24 C 60 32 24 32 12 24 Z"),
        Part("E 42 24 30 8", "white"),
        Part("E 42 25 26.5 6", "coffee"),
    ),
    floor="E 44 89 34 5",
)
_CUP = Drawing(
    (
        Part("M 4 84 C 12 79 78 79 86 84 C 82 93 66 95 45 95 C 24 95 8 93 4 84 Z", "white"),
        Part("M 74 44 C 98 38 94 70 66 70", "body", 6.0),
        Part("M 9 34 C 9 66 20 87 45 87 C 70 87 81 66 81 34 C 66 42 24 42 9 34 Z"),
        Part("E 45 34 36 9", "white"),
        Part("E 45 35 32 6.6", "coffee"),
    ),
    floor="E 46 93 40 4",
)
_LAMP = Drawing(
    (
        Part("M 43 58 C 30 68 30 82 42 91 L 58 91 C 70 82 70 68 57 58 Z", "white"),
        Part("E 50 92 15 3.6", "brass"),
        Part("M 45 54 L 55 54 L 55 61 L 45 61 Z", "brass"),
        Part("M 33 8 C 42 6 58 6 67 8 L 88 54 C 70 60 30 60 12 54 Z"),
        Part("M 12.6 53 C 30 59 70 59 87.4 53", "body", 2.6),
        Part("M 33 8.6 C 42 6.6 58 6.6 67 8.6", "body", 2.2),
    ),
    floor="E 50 93 26 4",
)
_FLOOR_LAMP = Drawing(
    (
        Part("M 50 44 L 51 93", "wood", 2.8),
        Part("M 50 46 L 30 96 M 50 46 L 70 96", "wood", 3.2),
        Part("M 42 44 L 58 44 L 56 51 L 44 51 Z", "brass"),
        Part("M 27 4 L 73 4 C 75 18 77 32 79 46 C 64 49 36 49 21 46 C 23 32 25 18 27 4 Z"),
        Part("M 21.2 45 C 36 48 64 48 78.8 45 M 27 5 L 73 5", "body", 2.4),
    ),
    floor="E 50 95 28 3.4",
)
_CHAIR = Drawing(
    (
        Part("M 30 64 L 28 90 M 70 64 L 72 90", "wood", 3.4),
        Part("M 29 44 L 29 58 M 71 44 L 71 58", "wood", 4.0),
        Part("M 22 12 C 24 5 76 5 78 12 C 80 24 80 38 77 48 C 66 51 34 51 23 48 C 20 38 20 24 22 12 Z"),
        Part("M 20 66 L 15 97 M 80 66 L 85 97", "wood", 4.6),
        Part("M 20 56 C 30 53 70 53 80 56 C 85 60 88 66 87 71 C 72 76 28 76 13 71 C 12 66 15 60 20 56 Z"),
    ),
    floor="E 50 95 38 4",
)
_ARMCHAIR = Drawing(
    (
        Part("M 20 84 L 17 96 M 80 84 L 83 96", "wood", 4.6),
        Part("M 19 30 C 18 2 82 2 81 30 L 80 72 L 20 72 Z"),
        Part("M 18 60 C 30 56 70 56 82 60 L 82 74 C 70 77 30 77 18 74 Z"),
        Part("M 14 70 L 86 70 L 86 86 C 70 88 30 88 14 86 Z"),
        Part(
            "M 5 50 C 5 40 22 40 23 50 L 24 85 C 20 88 11 88 7 85 Z"
            " M 95 50 C 95 40 78 40 77 50 L 76 85 C 80 88 89 88 93 85 Z"
        ),
    ),
    floor="E 50 94 42 4",
)
_DRESS = Drawing(
    (
        Part("M 36 8 C 42 12 58 12 64 8 L 62 20 L 38 20 Z", "shade"),
        Part(
            "M 32 6 L 40 6 C 41 22 59 22 60 6 L 68 6 C 68 17 70 24 74 29 C 70 35 66 40 65 46"
            " C 73 58 82 72 88 88 C 66 95 34 95 12 88 C 18 72 27 58 35 46 C 34 40 30 35 26 29 C 30 24 32 17 32 6 Z"
        ),
        Part("M 34.6 43 C 44 46 56 46 65.4 43 L 65.6 49 C 56 52 44 52 34.4 49 Z", "body"),
        Part("M 42 52 C 38 66 35 78 33 91 M 58 52 C 62 66 65 78 67 91", "shade", 0.8),
    )
)
_LONG_DRESS = Drawing(
    (
        Part("M 40 5 C 45 8 55 8 60 5 L 58 14 L 42 14 Z", "shade"),
        Part(
            "M 37 4 L 42 3 C 43 15 57 15 58 3 L 63 4 C 71 8 76 22 79 36 L 68 39 C 67 33 66 29 64 26 L 62 36"
            " C 68 56 76 76 80 95 C 62 99 38 99 20 95 C 24 76 32 56 38 36 L 36 26 C 34 29 33 33 32 39 L 21 36"
            " C 24 22 29 8 37 4 Z"
        ),
        Part("M 37.6 33 C 45 35 55 35 62.4 33 L 62.6 38 C 55 40 45 40 37.4 38 Z", "body"),
        Part("M 45 40 C 43 60 40 78 39 96 M 55 40 C 57 60 60 78 61 96", "shade", 0.8),
    )
)
_DRAWINGS: dict[str, tuple[Drawing, Drawing]] = {
    "t-shirt": (_TEE, _LONG_TEE),
    "sneaker": (_SNEAKER, _HIGH_SNEAKER),
    "hat": (_CAP, _SUN_HAT),
    "tote bag": (_TOTE, _SHOULDER_TOTE),
    "mug": (_MUG, _CUP),
    "lamp": (_LAMP, _FLOOR_LAMP),
    "chair": (_CHAIR, _ARMCHAIR),
    "dress": (_DRESS, _LONG_DRESS),
}
KINDS = tuple(_DRAWINGS)


def draw_product(
    kind: str, colour: int, pattern: int, cut: int, *, size_px: int, rng: np.random.Generator
) -> Image.Image:
    """A square RGB picture of one product; `colour`, `pattern` and `cut` are positions in the tables above."""
    drawing = _DRAWINGS[kind][cut]
    board = _Board(size_px, rng)
    base = tuple(COLOURS.values())[colour]
    fills = {name: board.flat(rgb) for name, rgb in _MATERIALS.items()}
    fills["body"] = board.flat(base)
    fills["shade"] = board.flat(_mix(base, (0, 0, 0), 0.28))
    fills["cloth"] = board.blend(fills["body"], board.flat(_PAPER), board.pattern(PATTERNS[pattern]))
    masks = [board.mask(part.path, part.width) for part in drawing.parts]
    board.cast_shadow(np.maximum.reduce(masks), drawing.floor)
    for part, mask in zip(drawing.parts, masks, strict=True):
        board.paint(fills[part.fill], mask)
    return board.picture()


def _mix(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


class _Board:
    """A picture under way: `pixels` (S, S, 3) from 0 to 255, and the pose in which everything is drawn."""

    def __init__(self, size_px: int, rng: np.random.Generator) -> None:
        self.size_px = size_px
        turn, self._scale = math.radians(rng.uniform(-5, 5)), rng.uniform(0.84, 0.92)
        flip = rng.choice([-1.0, 1.0])
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        self._pose = self._scale * rotation @ np.diag([flip, 1.0])
        self._shift = 50 + rng.uniform(-2.5, 2.5, size=2)
        self._light = rng.uniform(0.97, 1.03)
        backdrop = np.array(_BACKDROPS[rng.integers(len(_BACKDROPS))], dtype=np.float64)
        falloff = np.linspace(1.02, rng.uniform(0.92, 0.96), size_px)[:, None, None]
        self.pixels = np.broadcast_to(backdrop * falloff, (size_px, size_px, 3)).copy()
        coarse = Image.fromarray(rng.normal(0, 1, (5, 5)).astype(np.float32))
        self._drape = 1 + 0.022 * np.asarray(coarse.resize((size_px, size_px), Image.Resampling.BICUBIC))

    def flat(self, colour: RGB) -> Floats:
        return np.broadcast_to(np.array(colour, dtype=np.float64), (self.size_px, self.size_px, 3))

    @staticmethod
    def blend(under: Floats, over: Floats, share: Floats) -> Floats:
        return under + (over - under) * share[..., None]

    def _place(self, points: Floats) -> list[tuple[float, float]]:
        """Board units to supersampled pixels, in pose."""
        placed = ((points - 50) @ self._pose.T + self._shift) * (self.size_px * _SUPERSAMPLING / 100)
        return [(x, y) for x, y in placed.tolist()]

    def mask(self, path: str, width: float = 0.0) -> Floats:
        """(S, S) coverage from 0 to 1."""
        canvas = Image.new("L", (self.size_px * _SUPERSAMPLING,) * 2)
        pen = ImageDraw.Draw(canvas)
        for points in _outlines(path):
            if width:
                line_px = max(1, round(width * self._scale * self.size_px * _SUPERSAMPLING / 100))
                pen.line(self._place(points), fill=255, width=line_px, joint="curve")
            else:
                pen.polygon(self._place(points), fill=255)
        return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float64) / 255

    def pattern(self, name: str) -> Floats:
        """(S, S) share of the second colour, from 0 to 1."""
        lines = np.arange(-20, 121, 13.0)
        rows = " ".join(f"M -20 {y} L 120 {y}" for y in lines)
        columns = " ".join(f"M {x} -20 L {x} 120" for x in lines)
        if name == "stripes":
            return self.mask(rows, 5.4)
        if name == "checks":  # gingham: the two bands of thread add up where they cross
            return 0.45 * (self.mask(rows, 6.0) + self.mask(columns, 6.0))
        if name == "dots":
            centres = ((x + 6.5 * (row % 2), y) for row, y in enumerate(np.arange(-20, 121, 9.0)) for x in lines)
            return self.mask(" ".join(f"E {x} {y} 3.5 3.5" for x, y in centres))
        return np.zeros((self.size_px, self.size_px))

    def _soft(self, mask: Floats, radius: float) -> Floats:
        image = Image.fromarray((mask * 255).astype(np.uint8))
        blurred = image.filter(ImageFilter.GaussianBlur(radius * self.size_px / 100))
        return np.asarray(blurred, dtype=np.float64) / 255

    def _moved(self, values: Floats, x: float, y: float) -> Floats:
        return np.roll(values, (round(y * self.size_px / 100), round(x * self.size_px / 100)), axis=(0, 1))

    def cast_shadow(self, mask: Floats, floor: str | None) -> None:
        self.pixels *= (1 - 0.20 * self._moved(self._soft(mask, 3.5), 1.6, 2.8))[..., None]
        if floor:
            self.pixels *= (1 - 0.34 * self._soft(self.mask(floor), 2.2))[..., None]

    def paint(self, fill: Floats, mask: Floats) -> None:
        """Lay a part on top: it darkens what lies under its rim and is itself lit from the upper left."""
        soft = self._soft(mask, 2.6)
        self.pixels *= (1 - 0.30 * self._moved(soft, 0.8, 1.6))[..., None]
        relief = self._moved(soft, -1.6, -1.6) - self._moved(soft, 1.6, 1.6)
        lit = self._light * self._drape * (1 + 0.22 * relief - 0.20 * (1 - soft))
        self.pixels = self.blend(self.pixels, fill * lit[..., None], mask)

    def picture(self) -> Image.Image:
        return Image.fromarray(np.clip(np.rint(self.pixels), 0, 255).astype(np.uint8))


@lru_cache(maxsize=512)
def _outlines(path: str) -> list[Floats]:
    """The points (n, 2) of every stroke of a path, curves cut into short lines."""
    words = path.split()
    outlines: list[Floats] = []
    points: list[Floats] = []
    at = 0

    def numbers(count: int) -> Floats:
        nonlocal at
        at += count
        return np.array([float(word) for word in words[at - count : at]]).reshape(-1, 2)

    while at < len(words):
        command = words[at]
        at += 1
        if command in "ME" and points:
            outlines.append(np.concatenate(points))
            points = []
        if command in "ML":
            points.append(numbers(2))
        elif command == "C":
            points.append(_curve(np.concatenate([points[-1][-1:], numbers(6)])))
        elif command == "E":
            centre, radii = numbers(4)
            angle = np.linspace(0, 2 * math.pi, 4 * _CURVE_STEPS)[:, None]
            outlines.append(centre + radii * np.hstack([np.cos(angle), np.sin(angle)]))
    if points:
        outlines.append(np.concatenate(points))
    return outlines


def _curve(control: Floats) -> Floats:
    """A cubic Bézier curve through its four control points (4, 2), without its first point."""
    t = np.linspace(0, 1, _CURVE_STEPS + 1)[1:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return weights @ control
