"""Picture tokens computed once: the same vectors as without, and never a stale one."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes import square, tiny_config, tiny_items, tiny_model

from pixrec import storage
from pixrec.model.catalog import Catalog
from pixrec.model.vision import (
    complete_store,
    encode_pictures,
    open_store,
    picture_hash,
    store_folder,
    tokens_place,
    vision_fingerprint,
    write_part,
)
from pixrec.training import choose_trainable

ITEMS = tiny_items(with_pictures=range(8))
PICTURES = [picture for row in range(12) if (picture := ITEMS.image(row)) is not None]


def frozen_model():
    model = tiny_model(tiny_config(model={"freeze_vision": True}), ITEMS)
    choose_trainable(model.tower, model.config)
    return model


def stored(place, model, pictures=PICTURES):
    backbone = model.tower.backbone
    folder = store_folder(str(place), vision_fingerprint(backbone))
    for number, some in enumerate((pictures[:3], pictures[2:])):  # one of them twice
        write_part(folder, number, encode_pictures(backbone, some), backbone.family.tokens_per_picture)
    complete_store(folder, len(pictures))
    return open_store(str(place), backbone)


def test_vectors_and_gradients_equal_those_of_the_uncached_path(tmp_path):
    model = frozen_model()
    tokens = stored(tmp_path, model)
    assert len(tokens) == len(PICTURES)
    plain, cached = Catalog(ITEMS, model.encoder), Catalog(ITEMS, model.encoder, tokens=tokens)
    rows, histories = np.arange(12), [np.array([0, 9, 3, 5]), np.array([8, 10])]
    embedder = model.embedder()
    assert np.sum(embedder.items(cached, rows) * embedder.items(plain, rows), axis=1) == pytest.approx(1, abs=1e-3)
    users = embedder.users(cached, histories, None) * embedder.users(plain, histories, None)
    assert np.sum(users, axis=1) == pytest.approx(1, abs=1e-3)

    def gradient(catalog):
        model.tower.zero_grad()
        _, items, sequences = catalog.histories(histories)
        model.tower(items, sequences, generate=True).text_logits.logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.tower.parameters() if p.grad is not None])

    one, other = gradient(cached), gradient(plain)
    assert float((one - other).norm() / other.norm()) < 1e-3


def test_a_picture_is_not_decoded_again(tmp_path, monkeypatch):
    model = frozen_model()
    catalog = Catalog(ITEMS, model.encoder, tokens=stored(tmp_path, model))
    monkeypatch.setattr("pixrec.model.catalog.decode_image", None)
    monkeypatch.setattr(model.tower.backbone, "picture_tokens", None)
    assert model.embedder().items(catalog, np.arange(12)).shape == (12, 16)


@pytest.mark.parametrize("change", ["weights", "statistics", "decoder"])
def test_a_stale_store_is_not_found(tmp_path, monkeypatch, change):
    model = frozen_model()
    assert stored(tmp_path, model) is not None
    backbone = model.tower.backbone
    if change == "weights":
        with torch.no_grad():
            backbone.family.vision_parameters(backbone.model)[-1].view(-1)[0] += 1e-3
    elif change == "statistics":
        backbone.pixel_mean[0, 0] = 0.4
    else:
        monkeypatch.setattr("pixrec.model.vision.DECODER", "another")
    assert open_store(str(tmp_path), backbone) is None


def test_training_the_language_model_leaves_the_store_valid(tmp_path):
    model = frozen_model()
    before = vision_fingerprint(model.tower.backbone)
    with torch.no_grad():
        for parameter in model.tower.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert vision_fingerprint(model.tower.backbone) == before


def test_a_store_that_is_not_whole_or_lacks_a_picture_is_not_used(tmp_path):
    model = frozen_model()
    tokens = stored(tmp_path, model)
    changed = tiny_items(with_pictures=range(9))  # one picture more
    assert Catalog(changed, model.encoder, tokens=tokens).tokens is None
    assert tokens.of(square(0.123)) is None
    assert picture_hash(b"a") != picture_hash(b"b")
    folder = store_folder(str(tmp_path), vision_fingerprint(model.tower.backbone))
    storage.remove(f"{folder}/tokens.json")
    assert open_store(str(tmp_path), model.tower.backbone) is None


def test_where_tokens_are_kept():
    frozen = tiny_config(model={"freeze_vision": True})
    assert tokens_place("s3://b/data/", frozen) == "s3://b/data.tokens"
    assert tokens_place("data", tiny_config()) is None
    assert tokens_place("data", tiny_config(model={"freeze_vision": True, "modalities": "text"})) is None
    elsewhere = dataclasses.replace(frozen, train=dataclasses.replace(frozen.train, picture_tokens="/cache"))
    assert tokens_place("data", elsewhere) == "/cache"
