"""Vectors of texts that a frozen encoder made once, read in its place."""

import numpy as np
from fakes import small_encoders, tiny_config, tiny_dataset, tiny_items, write_prepared

from pixrec.artifact import untrained_model
from pixrec.data.tokens import complete_store, store_folder, texts_place, write_part
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import Content
from pixrec.model.texts import encode_texts, find_texts, text_fingerprint, text_schema


def test_stored_texts_are_read_in_place_of_the_encoder(tmp_path, monkeypatch):
    config = tiny_config(model=small_encoders(tmp_path))
    dataset = write_prepared(tmp_path / "data", tiny_dataset(tiny_items(with_pictures=False)))
    model, rows = untrained_model(config, []), np.arange(12)
    tower, catalog = model.tower, Catalog(dataset.items, model.encoder)
    plain = model.embedder().items(catalog, rows)
    assert find_texts(dataset.uri, config, tower.backbone) is None
    folder = store_folder(texts_place(dataset.uri, config.model, "auto"), text_fingerprint(tower.backbone))
    tokens = model.encoder.tokenize([dataset.items.text(row) for row in rows])
    write_part(folder, encode_texts(tower.backbone, tokens[:6]))
    write_part(folder, encode_texts(tower.backbone, tokens[4:]))
    complete_store(folder, text_schema(tower.backbone))
    tower.stored_texts = find_texts(dataset.uri, config, tower.backbone)
    assert len(tower.stored_texts) == len({tuple(ids) for ids in tokens})
    with monkeypatch.context() as patch:
        patch.setattr(tower.backbone, "texts", None)
        stored = model.embedder().items(catalog, rows)
    assert np.allclose(stored, plain, atol=1e-3)
    new = Content("a text that nobody stored", None)
    both = model.embedder().contents([new, Content(dataset.items.text(0), None)])
    tower.stored_texts = None
    assert np.allclose(both[0], model.embedder().contents([new])[0], atol=1e-5)
    assert np.allclose(both[1], plain[0], atol=1e-3)
