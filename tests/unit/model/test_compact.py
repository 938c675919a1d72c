"""The compact tower: causal, blind to padding, and the same at one position as at all of them."""

import pytest
import torch

from pixrec.config import CompactConfig
from pixrec.model.compact import CompactTower

WIDTH = 16


@pytest.fixture(params=[1, 2], ids=["one block", "two blocks"])
def tower(request):
    torch.manual_seed(0)
    shape = CompactConfig(layers=request.param, heads=2, max_history_items=8, dropout=0.5)
    return CompactTower(WIDTH, shape, 10, 5).eval()


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(torch.randn(3, 7, WIDTH, generator=generator), dim=-1)


def test_a_prefix_sees_neither_future_nor_padding(tower, vectors):
    whole = tower.user_vectors(vectors)
    changed = vectors.clone()
    changed[:, 4:] = 1e3
    torch.testing.assert_close(tower.user_vectors(changed)[:, :4], whole[:, :4])
    torch.testing.assert_close(tower.user_vectors(vectors[:, :4]), whole[:, :4])


def test_one_position_alone_equals_all_of_them(tower, vectors):
    last = torch.tensor([6, 0, 3])
    everywhere = tower.user_vectors(vectors)[torch.arange(3), last]
    torch.testing.assert_close(tower.user_vectors_at(vectors, last), everywhere)


def test_vectors_are_unit(tower, vectors):
    items = tower.item_vectors(torch.randn(4, 10), torch.tensor([0, 4, -1, -1]))
    for found in (items, tower.user_vectors(vectors)):
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(found.shape[:-1]))


def test_content_and_identity_both_reach_the_vector(tower):
    content = torch.randn(1, 10).expand(3, 10)
    vectors = tower.item_vectors(content, torch.tensor([0, 1, -1]))
    assert (vectors[0] - vectors[1]).abs().max() > 1e-4
    assert (vectors[0] - vectors[2]).abs().max() > 1e-4
    other = tower.item_vectors(-content, torch.tensor([0, 1, -1]))
    assert (other - vectors).abs().max() > 1e-2


def test_item_vectors_of_nothing_are_refused():
    with pytest.raises(ValueError, match="content, identities"):
        CompactTower(WIDTH, CompactConfig(heads=1), None, 0)


def test_sasrec_is_the_tower_without_content_and_without_unit_length():
    sasrec = CompactTower(WIDTH, CompactConfig(heads=1), None, 5, unit=False)
    torch.testing.assert_close(sasrec.item_vectors(None, torch.arange(5)), sasrec.identity.weight)
    assert sasrec.temperature.item() == 1
    assert not sasrec.log_temperature.requires_grad
