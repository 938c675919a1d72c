"""Neighbours by content, worked out by hand."""

import numpy as np
import pytest
import torch
from fakes import users_of

from pixrec.scorers.neighbours import DECAY, LAST_ITEMS, TEMPERATURES, ContentNeighbours

ANGLES = np.array([0.0, 0.2, 1.0, 3.0])
SIDE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
CONTENT = np.concatenate([SIDE, np.zeros_like(SIDE)], axis=1)
"""Items with a text and no picture."""


def rows(*histories: list[int]) -> list[np.ndarray]:
    return [np.array(history, dtype=np.int64) for history in histories]


def expected(item: int, vectors: np.ndarray = SIDE, temperature: float = TEMPERATURES[0]) -> np.ndarray:
    cosines = vectors.astype(np.float64) @ vectors[item]
    cosines[item] = -np.inf
    chances = np.exp(cosines / temperature) * vectors.any(1)
    return chances / chances.sum()


def test_a_softmax_over_cosines_the_last_item_weighing_most():
    neighbours = ContentNeighbours(CONTENT)
    assert neighbours.parts == ["alike in text at 0.05", "alike in text at 0.1"]
    for found, temperature in zip(neighbours.chances(rows([2, 0], [], [3])), TEMPERATURES, strict=True):
        first, second, last = (expected(item, temperature=temperature) for item in (0, 2, 3))
        np.testing.assert_allclose(found[0], (first + DECAY * second) / (1 + DECAY), atol=1e-6)
        assert not found[1].any()
        np.testing.assert_allclose(found[2], last, atol=1e-6)
    older = rows([3] * 5 + [0] * LAST_ITEMS, [0])
    np.testing.assert_allclose(*neighbours.chances(older)[0], atol=1e-6)


def test_text_and_picture_are_told_apart():
    pictures = SIDE[::-1].copy()
    pictures[1] = 0
    neighbours = ContentNeighbours(np.concatenate([SIDE, pictures], axis=1))
    by_text, _, by_picture, _ = neighbours.chances(rows([2]))[:, 0]
    np.testing.assert_allclose(by_text, expected(2), atol=1e-6)
    np.testing.assert_allclose(by_picture, expected(2, pictures), atol=1e-6)
    by_text, _, by_picture, _ = neighbours.chances(rows([1]))[:, 0]
    np.testing.assert_allclose(by_text, expected(1), atol=1e-6)
    assert not by_picture.any(), "item 1 has no picture"


def test_an_item_of_which_nothing_is_known_is_nobodys_neighbour_and_has_none():
    content = CONTENT.copy()
    content[1] = 0
    found = ContentNeighbours(content).chances(rows([0], [1], [0, 1]))[0]
    assert found[0, 1] == 0
    assert found[0].sum() == pytest.approx(1)
    assert not found[1].any()
    torch.testing.assert_close(found[2], found[0])


def test_content_that_moved_counts_where_it_stands():
    moved = np.array([1, 3]), np.stack([CONTENT[3], CONTENT[1]])
    found = ContentNeighbours(CONTENT[:3]).chances(rows([0]), moved)[0, 0]
    np.testing.assert_allclose(found, expected(0, SIDE[[0, 3, 2, 1]]), atol=1e-6)


def test_equal_items_are_equally_near():
    content = np.tile(CONTENT, (26, 1))[:-1].astype(np.float16)
    found = ContentNeighbours(content).scores(users_of(rows([2])))[0]
    for first in range(4):
        assert len(found[first::4][found[first::4] > found.min()].unique()) <= 1
    assert ContentNeighbours(np.zeros((0, 2), np.float32)).chances([]).shape == (0, 0, 0)
