"""Picture tokens computed once: the same vectors as without, and never a stale one."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from fakes import Seen, square, tiny_config, tiny_items, tiny_model, write_tokens

from pixrec import storage
from pixrec.data.pictures import picture_hash
from pixrec.data.tokens import (
    StoredPictures,
    complete_store,
    sort_hashes,
    store_folder,
    stored_pictures,
    tokens_place,
    write_part,
)
from pixrec.errors import ArtifactError
from pixrec.model.catalog import Catalog
from pixrec.model.vision import encode_pictures, find_tokens, open_store, token_schema, vision_fingerprint
from pixrec.training.interleaved import choose_trainable

ITEMS = tiny_items(with_pictures=range(8))
PICTURES = [picture for row in range(12) if (picture := ITEMS.image(row)) is not None]


def frozen_model():
    model = tiny_model(tiny_config(model={"freeze_vision": True}), ITEMS)
    choose_trainable(model.tower, model.config)
    return model


def stored(place, model, items=ITEMS):
    folder, backbone = write_tokens(place, model, items), model.tower.backbone
    write_part(folder, encode_pictures(backbone, PICTURES[2:4]))  # pictures that are there twice
    write_part(folder, token_schema(backbone).empty_table())
    complete_store(folder, token_schema(backbone))
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
    monkeypatch.setattr("pixrec.model.encoding.decode_picture", None)
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


def test_a_picture_without_tokens_is_shown_to_the_vision_part(tmp_path, monkeypatch):
    """New and changed pictures stand in one batch with stored ones."""
    model = frozen_model()
    write_tokens(tmp_path, model, tiny_items(with_pictures=[1, 2, 5]))
    tokens = open_store(str(tmp_path), model.tower.backbone)
    assert not tokens.hold(ITEMS)
    assert tokens.of(square(0.123)) is None
    rows, histories = np.arange(12), [np.array([0, 1, 3, 5]), np.array([8, 2])]
    plain, cached = Catalog(ITEMS, model.encoder), Catalog(ITEMS, model.encoder, tokens=tokens)
    embedder = model.embedder()
    expected = embedder.items(plain, rows), embedder.users(plain, histories, None)
    seen = Seen(monkeypatch, model)
    found = embedder.items(cached, rows)
    assert seen.pictures == 5
    users = embedder.users(cached, histories, None)
    assert seen.pictures == 5 + 2
    assert np.sum(found * expected[0], axis=1) == pytest.approx(1, abs=1e-3)
    assert np.sum(users * expected[1], axis=1) == pytest.approx(1, abs=1e-3)
    others = expected[0] @ expected[0].T
    assert others[~np.eye(12, dtype=bool)].max() < 0.999, "another picture's vector lies farther off"


def test_a_store_that_is_not_whole_is_not_used(tmp_path):
    model = frozen_model()
    folder = write_tokens(tmp_path, model, ITEMS)
    assert folder == store_folder(str(tmp_path), vision_fingerprint(model.tower.backbone))
    storage.remove(f"{folder}/tokens.json")
    assert open_store(str(tmp_path), model.tower.backbone) is None


@pytest.mark.parametrize("harm", ["a part is gone", "hashes cut short", "cut short", "another shape", "hashes of more"])
def test_a_damaged_store_is_said(tmp_path, harm):
    model = frozen_model()
    folder, backbone = write_tokens(tmp_path, model, ITEMS), model.tower.backbone
    part, (hashes,) = storage.list_files(folder, ".lance")[1], storage.list_files(folder, ".npy")
    if harm == "another shape":
        schema = token_schema(backbone)
        storage.remove(storage.join(folder, "parts"))
        complete_store(folder, schema.set(1, pa.field("tokens", pa.list_(pa.float16(), 7))))
    elif harm == "cut short":
        storage.write_bytes(part, storage.read_bytes(part)[:-10])
    elif harm == "hashes cut short":
        storage.write_bytes(hashes, storage.read_bytes(hashes)[:-10])
    elif harm == "hashes of more":
        np.save(hashes, np.concatenate([np.load(hashes)] * 2, axis=1))
    else:
        storage.remove(part)
    with pytest.raises(ArtifactError, match=r"is damaged: .*; remove"):
        open_store(str(tmp_path), backbone).of_hashes([picture_hash(picture) for picture in PICTURES])


def test_a_part_that_went_is_not_left_out_in_silence(tmp_path):
    model = frozen_model()
    folder = write_tokens(tmp_path, model, ITEMS)
    storage.remove(storage.list_files(folder, ".lance")[1])
    with pytest.raises(ArtifactError, match="1 of its 3 files are gone; remove the folder"):
        complete_store(folder, token_schema(model.tower.backbone))


def test_a_part_that_is_still_being_written_is_not_read(tmp_path):
    """Until it is indexed the store is the one that it was."""
    model = frozen_model()
    folder, backbone = write_tokens(tmp_path, model, tiny_items(with_pictures=range(3))), model.tower.backbone
    early = open_store(str(tmp_path), backbone)
    write_part(folder, encode_pictures(backbone, PICTURES[3:]))
    tokens = open_store(str(tmp_path), backbone)
    assert len(tokens) == len(early) == 3
    assert tokens.of_hash(picture_hash(PICTURES[3])) is None
    assert tokens.of(PICTURES[2]) is not None
    complete_store(folder, token_schema(backbone))
    assert open_store(str(tmp_path), backbone).hold(ITEMS)
    assert early.of(PICTURES[4]) is None, "who opened it before goes on with what there was"
    assert np.array_equal(early.of(PICTURES[2]), tokens.of(PICTURES[2]))


def test_many_pictures_are_read_together_in_the_order_asked_for(tmp_path):
    model = frozen_model()
    tokens = stored(tmp_path, model)
    hashes = [picture_hash(picture) for picture in PICTURES]
    asked = [hashes[5], None, picture_hash(b"another"), hashes[0], hashes[5]]
    found = tokens.of_hashes(asked)
    assert [of is None for of in found] == [False, True, True, False, False]
    family = model.tower.backbone.family
    for at, picture in ((0, 5), (3, 0), (4, 5)):
        assert found[at].shape == (family.tokens_per_picture, family.picture_width)
        np.testing.assert_array_equal(found[at], tokens.of(PICTURES[picture]))


def test_a_store_without_pictures_is_whole(tmp_path):
    backbone = frozen_model().tower.backbone
    folder = store_folder(str(tmp_path), vision_fingerprint(backbone))
    assert len(stored_pictures(folder)) == 0
    complete_store(folder, token_schema(backbone))
    tokens = open_store(str(tmp_path), backbone)
    assert len(tokens) == 0
    assert tokens.of(PICTURES[0]) is None


def test_pictures_are_found_by_their_hash_alone():
    hashes = [picture_hash(bytes([number])) for number in range(50)]
    same_beginning = hashes[3][:8] + bytes(8)
    pictures = StoredPictures(sort_hashes(b"".join([*hashes, *hashes[:7]])))
    assert len(pictures) == 50
    assert [pictures.place(picture) for picture in hashes] == list(range(50))
    assert pictures.hash_of(bytes([3])) == hashes[3]
    assert pictures.place(same_beginning) is None
    assert pictures.hash_of(b"another") is None
    assert StoredPictures(sort_hashes(b"")).place(hashes[0]) is None
    both = StoredPictures(sort_hashes(same_beginning + hashes[3]))
    assert (both.place(same_beginning), both.place(hashes[3])) == (0, 1)


def test_where_tokens_are_kept():
    frozen = tiny_config(model={"freeze_vision": True}).model
    assert tokens_place("s3://b/data/", frozen, "auto") == "s3://b/data.tokens"
    assert tokens_place("data", tiny_config().model, "auto") is None
    blind = tiny_config(model={"freeze_vision": True, "modalities": "text"}).model
    assert tokens_place("data", blind, "auto") is None
    assert tokens_place("data", frozen, "/cache") == "/cache"
    assert tokens_place("data", frozen, None) is None


def test_the_stores_of_several_data_sets_are_read_as_one(tmp_path):
    model = frozen_model()
    first, second = tiny_items(with_pictures=[0, 1, 2]), tiny_items(with_pictures=[2, 5, 7])
    sets = [str(tmp_path / "a"), str(tmp_path / "b")]
    write_tokens(f"{sets[0]}.tokens", model, first)
    assert find_tokens(sets, model.config, model.tower.backbone) is None, "one of them has none"
    write_tokens(f"{sets[1]}.tokens", model, second)
    joined = find_tokens(sets, model.config, model.tower.backbone)
    assert len(joined) == 5
    assert joined.hold(first)
    assert joined.hold(second)
    for place, row in ((0, 0), (0, 2), (1, 5), (1, 7)):
        alone = find_tokens(sets[place], model.config, model.tower.backbone)
        np.testing.assert_array_equal(joined.of(ITEMS.image(row)), alone.of(ITEMS.image(row)))
