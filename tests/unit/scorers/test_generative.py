from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_dataset, tiny_model, users_of

from pixrec.config import EvaluateConfig
from pixrec.data.items import ItemTable
from pixrec.errors import InputError
from pixrec.model.catalog import Catalog
from pixrec.scorers.generative import GenerativeBM25, _Index

HISTORY = np.array([0, 1, 2])
INTERLEAVED = tiny_config(model={"user_tower": "interleaved"})


def scorer(items: ItemTable, **settings) -> GenerativeBM25:
    return GenerativeBM25(tiny_model(INTERLEAVED, items), items, EvaluateConfig(**settings))


def test_one_beam_is_the_likeliest_token_each_time(items: ItemTable):
    """Against the plain way: each next token from the states of all before, one text at a time."""
    model = tiny_model(INTERLEAVED, items)
    generative = GenerativeBM25(model, items, EvaluateConfig(generate_beams=1, generate_tokens=3))
    _, encoded, sequence = Catalog(items, model.encoder).histories([HISTORY])
    tokens, slots, pictures = sequence.token_ids, sequence.picture_slot, model.tower.pictures(encoded)
    made = []
    with torch.no_grad():
        for _ in range(3):
            hidden = model.tower.backbone.hidden_states(tokens, tokens >= 0, slots, pictures)
            logits = model.tower.backbone.token_logits(hidden)[0, -1]
            logits[model.encoder.tokenizer.all_special_ids] = -torch.inf
            made.append(int(logits.argmax()))
            tokens = torch.cat([tokens, torch.tensor([[made[-1]]])], 1)
            slots = torch.cat([slots, torch.tensor([[-1]])], 1)
    assert generative.generate(HISTORY) == [model.encoder.tokenizer.decode(made)]


def test_as_many_texts_as_beams_and_none_longer_than_half_of_the_catalogs(items: ItemTable):
    generative = scorer(items, generate_beams=3, generate_tokens=2)
    assert len(generative.generate(HISTORY)) == 3
    assert generative._length == 2
    encoder = generative._catalog.encoder
    lengths = [len(tokens) for tokens in encoder.tokenize([items.text(row) for row in range(12)])]
    assert scorer(items, generate_tokens=500)._length == int(np.median(lengths))


def test_items_rank_by_the_words_of_the_generated_texts(items: ItemTable, monkeypatch: pytest.MonkeyPatch):
    generative = scorer(items)
    monkeypatch.setattr(generative, "generate", lambda history: ["Tile unheard-of", "square by Bob"])
    scores = generative.scores(users_of([HISTORY, HISTORY]))
    assert scores.shape == (2, 12)
    titles = [items.fields(row)["title"] for row in range(12)]
    brands = [items.fields(row)["brand"] for row in range(12)]
    best = {row for row in range(12) if scores[0, row] == scores[0].max()}
    assert best == {row for row in range(12) if (titles[row], brands[row]) == ("Square", "Bob")}
    tiles = {row for row in range(12) if titles[row] == "Tile"}
    rest = {row for row in range(12) if (titles[row], brands[row]) == ("Patch", "Ann")}
    assert min(scores[0, r] for r in tiles) > max(scores[0, r] for r in rest)
    assert len({float(scores[0, r]) for r in rest}) == 1  # no word in common: last, and tied


def test_a_text_without_a_known_word_scores_nothing():
    index = _Index(["red lamp", "blue chair", ""])
    assert index.scores("42 ???").tolist() == [0, 0, 0]
    assert index.scores("RED").argmax() == 0


def test_what_is_missing_is_said(items: ItemTable, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="needs items with a text"):
        _Index(["", "  "])
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'pixrec\[generative\]'"):
        _Index(["lamp"])


def test_it_takes_part_like_any_other_scorer(items: ItemTable):
    dataset = tiny_dataset(items)
    assert dataset.held_out("test").histories
    scores = scorer(items, generate_tokens=2, generate_beams=2).scores(
        dataset.held_out("test").only(np.arange(3)).users
    )
    assert scores.isfinite().all()
