"""GradCache against the plain pass on the same batch: loss, parts and every gradient, in float32."""

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model

from pixrec.model import gradcache
from pixrec.model.catalog import Catalog
from pixrec.model.objective import Extra, TrainingTask
from pixrec.training.reading import Collator
from pixrec.training.windows import ShiftedWindows

TOLERANCE = 1e-5


def setting(**train):
    config = tiny_config(train={"alpha": 0.3, "beta": 0.4, "modality_dropout": 0.3, "histories_per_step": 9, **train})
    dataset = tiny_dataset(tiny_items(with_pictures=range(8)), num_users=9, num_events=7)
    model = tiny_model(config, dataset.items)
    source = ShiftedWindows(dataset.training_histories(), config.model.max_history_items, config.train)
    collator = Collator(Catalog(dataset.items, model.encoder), dataset.training_counts(), config, 30.0)
    task = TrainingTask(model.tower.train(), config.train)
    windows = [w[: 2 + i % 4] for i, w in enumerate(source.step(0))]  # of different lengths
    return task, collator, collator.plan(windows, np.random.default_rng(3))


def parts_of(collator, plan, at_a_time):
    return collator.encoded(plan, in_parts=True).parts(collator.catalog.encoder, at_a_time, 4)


def gradients(task):
    found = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
    task.zero_grad(set_to_none=True)
    return found


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        difference = float((ours[name] - expected).norm())
        assert difference <= TOLERANCE * max(float(expected.norm()), 1e-3), (name, difference)


@pytest.mark.parametrize("at_a_time", [1, 2, 4, 100])  # 9 histories: 4 leaves an uneven tail
@pytest.mark.parametrize(
    "train",
    [
        {},
        {"alpha": 1.0, "beta": 0.0},
        {"alpha": 0.0, "beta": 1.0},
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 0.2, "beta": -0.3},
        {"symmetric": True, "mask_history": True},
        {"logq_correction": False, "learnable_temperature": False},
    ],
    ids=["all", "tt", "ut", "nig", "negative", "symmetric", "fixed"],
)
def test_loss_and_gradients_equal_the_plain_path(monkeypatch, train, at_a_time):
    monkeypatch.setattr(gradcache, "_ANCHORS_AT_A_TIME", 5)  # several blocks of anchors, the last uneven
    task, collator, plan = setting(**train)
    batch = collator.encoded(plan).batch()
    loss, totals = task(batch)
    loss.backward()
    plain = gradients(task)
    cached, sums, used = gradcache.backward(task, parts_of(collator, plan, at_a_time), None, seed=0)
    same(gradients(task), plain)
    assert float(cached) == pytest.approx(float(loss.detach()), rel=TOLERANCE)
    wanted = [i for i, name in enumerate(("nig", "tt", "ut")) if name != "nig" or task.generates]
    assert sums[wanted].numpy() == pytest.approx(totals[wanted].numpy(), rel=TOLERANCE)
    real, slots = batch.tokens()
    assert used[0] == real
    assert used[1] <= slots if at_a_time == 1 else used[0] <= used[1]


def test_extra_negatives_count_the_same():
    task, collator, plan = setting()
    rows = torch.tensor([0, 3, 11])
    vectors = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    extra = Extra(vectors, rows, torch.from_numpy(collator.log_inclusion)[rows], 0.25)
    task(collator.encoded(plan).batch(), extra)[0].backward()
    plain = gradients(task)
    gradcache.backward(task, parts_of(collator, plan, 2), extra, seed=0)
    same(gradients(task), plain)


def test_both_passes_draw_the_same_dropout():
    """With dropout in the backbone the cached vectors are those that the second pass sends its gradient to."""
    task, collator, plan = setting()
    for layer in task.tower.backbone.model.model.text_model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
    parts = parts_of(collator, plan, 2)
    cache = gradcache._Cache(task, parts, seed=5)
    vectors = cache.vectors()
    again = torch.cat([cache._items(i, count=False) for i, _ in cache.items.parts])
    users = torch.cat([cache._histories(i, generate=False)[1].user for i, _ in cache.history_parts])
    assert torch.equal(vectors.item, again)
    assert torch.equal(vectors.user, users)
    other = gradcache._Cache(task, parts, seed=6).vectors()
    assert not torch.allclose(vectors.user, other.user)


@pytest.mark.parametrize(("frozen", "times"), [(False, 2), (True, 1)], ids=["vision learns", "vision stands still"])
def test_a_picture_is_encoded_once_for_each_pass_that_needs_it(monkeypatch, frozen, times):
    """Whatever reads it: its own item and any number of histories, in as many parts as there are."""
    task, collator, plan = setting()
    backbone = task.tower.backbone
    for parameter in backbone.family.vision_parameters(backbone.model):
        parameter.requires_grad_(not frozen)
    pictures = sum(kept != "text" and row < 8 for row, kept in zip(plan.rows, plan.modalities, strict=True))
    task(collator.encoded(plan).batch())[0].backward()
    plain = gradients(task)
    shown = []
    encode = backbone.picture_tokens
    monkeypatch.setattr(
        backbone, "picture_tokens", lambda pixels, grid: shown.append(len(grid)) or encode(pixels, grid)
    )
    gradcache.backward(task, parts_of(collator, plan, 1), None, seed=0)
    same(gradients(task), plain)
    assert sum(shown) == times * pictures > 0


def test_a_share_scales_the_gradient():
    task, collator, plan = setting()
    gradcache.backward(task, parts_of(collator, plan, 3), None, seed=0)
    whole = gradients(task)
    gradcache.backward(task, parts_of(collator, plan, 3), None, seed=0, share=0.25)
    same(gradients(task), {name: gradient / 4 for name, gradient in whole.items()})
