"""The compact tower: causal, blind to padding, and the same at one position as at all of them."""

import pytest
import torch

from pixrec.config import CompactConfig
from pixrec.model.compact import (
    ID_EMBEDDING_STD,
    TIME_BUCKETS,
    UNKNOWN_TIME,
    CompactTower,
    _rotary_angles,
    _rotated,
    time_buckets,
)

WIDTH = 16


@pytest.fixture(params=[(1, "learned"), (1, "rotary"), (2, "rotary")], ids=lambda p: f"{p[0]} {p[1]}")
def tower(request):
    torch.manual_seed(0)
    layers, positions = request.param
    shape = CompactConfig(layers=layers, heads=2, max_history_items=8, dropout=0.5, positions=positions)
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
    with pytest.raises(ValueError, match="content, id vectors"):
        CompactTower(WIDTH, CompactConfig(heads=1), None, 0)


def test_sasrec_is_the_tower_without_content_and_without_unit_length():
    sasrec = CompactTower(WIDTH, CompactConfig(heads=1), None, 5, unit=False)
    torch.testing.assert_close(sasrec.item_vectors(None, torch.arange(5)), sasrec.id_embedding.weight)
    assert sasrec.temperature.item() == 1
    assert not sasrec.log_temperature.requires_grad


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_order_of_a_history_counts(vectors, positions):
    """Seen from one block: without positions it would read the events before the newest as a set."""
    torch.manual_seed(0)
    tower = CompactTower(WIDTH, CompactConfig(layers=1, max_history_items=8, positions=positions), 10, 5).eval()
    with torch.no_grad():
        for weight in tower.user.parameters():
            weight.mul_(10)
    swapped = vectors[:, [1, 0, 2, 3, 4, 5, 6]]
    assert (tower.user_vectors(vectors)[:, -1] - tower.user_vectors(swapped)[:, -1]).abs().max() > 1e-3


def test_turned_products_see_distances_only():
    """Shifted by one place, queries and keys have the products they had."""
    angles, (q, k) = _rotary_angles(12, WIDTH), torch.randn(2, 1, WIDTH)
    products = _rotated(q.expand(12, -1), angles) @ _rotated(k.expand(12, -1), angles).T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])
    assert products[0].diff().abs().min() > 1e-3


DAY = 86_400_000
MOMENTS = torch.tensor([[0, 0, 5_000, 60_000, DAY, DAY, 9 * DAY]]) + 1_700_000_000_000


@pytest.fixture(params=["gaps", "ages", "both"])
def timed(request):
    """A tower of two blocks whose time has weight enough to be seen."""
    torch.manual_seed(0)
    shape = CompactConfig(layers=2, heads=2, max_history_items=8, dropout=0.0, time=request.param, time_dropout=0.0)
    tower = CompactTower(WIDTH, shape, 10, 5).eval()
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if "age" in name or "gap" in name:
                weight.normal_()
    return tower


def test_buckets_double_in_length():
    begins = [0, 1000, 3000, 7000, 1000 * (2**29 - 1), 1000 * 2**40]
    moment = torch.tensor([0, *(m + d for m in begins[1:] for d in (-1, 0))])
    expected = [1, 1, 2, 2, 3, 3, 4, 29, 30, TIME_BUCKETS - 1, TIME_BUCKETS - 1]
    assert time_buckets(moment, torch.tensor(0)).tolist() == expected
    unknown = torch.tensor(UNKNOWN_TIME)
    assert time_buckets(unknown, moment).unique().tolist() == [0]
    assert time_buckets(moment, unknown).unique().tolist() == [0]
    assert time_buckets(unknown, unknown) == 0
    assert time_buckets(torch.tensor(0), torch.tensor(5000)) == 1  # what cannot be still has a bucket


def test_no_state_knows_when_a_later_event_was(timed, vectors):
    timestamps = MOMENTS.expand(3, -1)
    later = timestamps.clone()
    later[:, 4:] += 400 * DAY
    before, after = timed.user_vectors(vectors, timestamps), timed.user_vectors(vectors, later)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=0)
    assert ((before[:, 4] - after[:, 4]).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(timed.user_vectors(vectors[:, :4], timestamps[:, :4]), before[:, :4])


def test_only_differences_of_time_count(timed, vectors):
    timestamps = MOMENTS.expand(3, -1)
    torch.testing.assert_close(
        timed.user_vectors(vectors, timestamps + 77 * DAY), timed.user_vectors(vectors, timestamps)
    )


def test_no_timestamps_are_unknown_ones(timed, vectors):
    unknown = torch.full(vectors.shape[:2], UNKNOWN_TIME)
    torch.testing.assert_close(timed.user_vectors(vectors), timed.user_vectors(vectors, unknown))
    assert not torch.allclose(timed.user_vectors(vectors), timed.user_vectors(vectors, MOMENTS.expand(3, -1)))


def test_timed_histories_together_and_one_position_alone(timed, vectors):
    """Of several lengths, one without timestamps, one with some."""
    timestamps, last = MOMENTS.repeat(3, 1), torch.tensor([6, 3, 4])
    timestamps[1] = UNKNOWN_TIME
    timestamps[2, 2] = UNKNOWN_TIME
    together = timed.user_vectors_at(vectors, last, timestamps)
    torch.testing.assert_close(together, timed.user_vectors(vectors, timestamps)[torch.arange(3), last])
    for i, end in enumerate((last + 1).tolist()):
        alone = timed.user_vectors(vectors[i : i + 1, :end], timestamps[i : i + 1, :end])[0, -1]
        torch.testing.assert_close(together[i], alone)
    torch.testing.assert_close(together[1], timed.user_vectors_at(vectors, last)[1])


def test_time_learns_in_either_precision(timed, vectors):
    """A gradient reaches every weight of time, and nothing of minus infinity reaches the loss."""
    timestamps = MOMENTS.expand(3, -1)
    for bf16 in (False, True):
        timed.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = timed.user_vectors(vectors, timestamps)
        out.float()[:, :, 0].sum().backward()
        gradients = {n: p.grad for n, p in timed.named_parameters() if "age" in n or "gap" in n}
        assert gradients
        assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients.values())


def test_in_training_some_histories_lose_their_timestamps(timed, vectors):
    timed.train()
    timed.user.time_dropout = 1.0
    timestamps = MOMENTS.expand(3, -1)
    torch.testing.assert_close(timed.user_vectors(vectors, timestamps), timed.user_vectors(vectors))
    timed.eval()
    assert not torch.allclose(timed.user_vectors(vectors, timestamps), timed.user_vectors(vectors))


def test_a_tower_without_time_has_no_weights_for_it(tower, vectors):
    assert not [name for name in tower.state_dict() if "age" in name or "gap" in name]
    timestamps = MOMENTS.expand(3, -1)
    torch.testing.assert_close(tower.user_vectors(vectors, timestamps), tower.user_vectors(vectors), rtol=0, atol=0)


def test_content_begins_whitened():
    """What all items have in common goes, and each direction begins as wide as a learned vector's, noise narrower."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([3.0, 1.0, 0.3, 1e-6])
    content = torch.randn(4000, 4, generator=generator) * spread + 5
    tower = CompactTower(4, CompactConfig(), 4, 0)
    tower.whiten(content)
    assert tower.content is not None
    made = tower.content(content).detach()
    assert made.mean(0).abs().max() < 1e-6
    widths = torch.linalg.eigvalsh(torch.cov(made.T)).clamp(min=0).sqrt()
    assert widths[-1] == pytest.approx(ID_EMBEDDING_STD, rel=0.05)
    assert widths[0] < 1e-3 * ID_EMBEDDING_STD
