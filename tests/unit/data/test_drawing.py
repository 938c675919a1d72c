import itertools

import numpy as np
import pytest

from pixrec.data.drawing import COLOURS, CUTS, KINDS, PATTERNS, draw_product


def draw(kind="t-shirt", colour=0, pattern=0, cut=0, size_px=64, seed=0):
    image = draw_product(kind, colour, pattern, cut, size_px=size_px, rng=np.random.default_rng(seed))
    return np.asarray(image)


@pytest.mark.parametrize("size_px", [16, 64, 128])
def test_a_picture_is_square_rgb_of_the_size_asked_for(size_px):
    pixels = draw(size_px=size_px)
    assert pixels.shape == (size_px, size_px, 3)
    assert pixels.dtype == np.uint8


def test_the_same_chance_draws_the_same_picture_and_another_does_not():
    assert np.array_equal(draw(seed=3), draw(seed=3))
    assert not np.array_equal(draw(seed=3), draw(seed=4))


def test_every_kind_cut_and_pattern_gives_another_picture():
    pictures = {draw(k, 0, p, c).tobytes() for k, p, c in itertools.product(KINDS, range(len(PATTERNS)), range(CUTS))}
    assert len(pictures) == len(KINDS) * len(PATTERNS) * CUTS


@pytest.mark.parametrize("kind", KINDS)
def test_the_backdrop_is_light_and_the_product_is_in_the_middle(kind):
    for cut in range(CUTS):
        pixels = draw(kind, 5, 0, cut).astype(int)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 180
        assert pixels[16:48, 16:48].min() < 120


@pytest.mark.parametrize("kind", KINDS)
def test_the_colour_can_be_read_off_the_pixels_at_64_px(kind):
    table = np.array(list(COLOURS.values()))
    looks = itertools.product(range(len(COLOURS)), range(len(PATTERNS)))
    for seed, (colour, pattern) in enumerate(looks):
        cut = (colour + pattern) % CUTS
        pixels = draw(kind, colour, pattern, cut, seed=seed).reshape(-1, 1, 3).astype(int)
        distance = np.linalg.norm(pixels - table, axis=2)
        votes = np.bincount(distance.argmin(axis=1)[distance.min(axis=1) < 40], minlength=len(table))
        assert votes.argmax() == colour, (kind, colour, pattern, cut)


def test_patterns_show_as_lines_along_one_axis_along_both_or_none():
    def steps(pattern):
        """Brightness steps down and across the belly of an upright T-shirt, averaged over poses."""
        patches = [draw("t-shirt", 5, pattern, 0, seed=s)[28:48, 24:40].mean(axis=2) for s in range(6)]
        return np.mean([[np.abs(np.diff(p, axis=a)).mean() for a in (0, 1)] for p in patches], axis=0)

    (plain, stripes, dots, checks) = (steps(PATTERNS.index(p)) for p in ("plain", "stripes", "dots", "checks"))
    assert plain.max() < 5
    assert stripes[0] > 3 * stripes[1]
    assert min(dots.min(), checks.min()) > 3 * plain.max()
