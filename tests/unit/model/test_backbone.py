"""The real loading code, on small models of the real classes saved to a folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_items, tiny_model
from transformers import AutoModelForImageTextToText, Idefics3Config, LlamaConfig

from pixrec.artifact import fingerprint, load_model, new_model, save_model
from pixrec.errors import ArtifactError, ConfigError
from pixrec.model.backbone import build_tiny, load_pretrained, picture_size_of, pretrained_facts
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import train_tokenizer
from pixrec.model.vision import vision_fingerprint


@pytest.fixture(scope="module")
def items():
    return tiny_items()


def save_pretrained(folder, model, tokenizer):
    """A folder as the hub lays it out: weights, tokenizer and image processor side by side."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return str(folder)


def idefics3(tokenizer):
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    image = tokenizer.get_vocab()["<image>"]
    config = Idefics3Config(text_config=text, vision_config=vision, image_token_id=image, scale_factor=2)
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_a_backbone_from_a_folder_embeds_trains_and_loads_again(tmp_path, items, family):
    texts = [items.text(row) for row in range(len(items))]
    if family == "smolvlm":
        tiny = tiny_model()
        folder = save_pretrained(tmp_path / "base", tiny.tower.backbone.model, tiny.encoder.tokenizer)
    else:
        tokenizer = train_tokenizer(texts, 400)
        folder = save_pretrained(tmp_path / "base", idefics3(tokenizer), tokenizer)
    model = new_model(tiny_config(model={"backbone": folder, "user_tower": "interleaved"}), texts)
    assert model.tower.backbone.pixel_mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    catalog = Catalog(items, model.encoder)
    _, batch, sequences = catalog.histories([np.array([0, 1, 2])])
    out = model.tower(batch, sequences, generate=True)
    (out.user.sum() + out.text_logits.sum()).backward()
    vision = model.tower.backbone.family.vision_parameters(model.tower.backbone.model)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in vision)
    model.tower.zero_grad()
    save_model(str(tmp_path / "model"), model, {})
    again = load_model(str(tmp_path / "model"))
    rows = np.arange(len(items))
    assert again.embedder().items(Catalog(items, again.encoder), rows) == pytest.approx(
        model.embedder().items(catalog, rows), abs=1e-6
    )


def test_hidden_states_equal_those_of_the_library_itself(items):
    """Our merge of picture tokens against transformers' own forward on ids and pixels."""
    model = tiny_model(tiny_config(model={"user_tower": "interleaved"}))
    catalog, backbone = Catalog(items, model.encoder), model.tower.backbone
    batch = catalog.items(np.array([3]))
    model.tower.eval()
    with torch.no_grad():
        ours = backbone.hidden_states(batch.token_ids, batch.is_token, batch.picture_slot, model.tower.pictures(batch))
        pixels = (batch.pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        theirs = backbone.model.model(
            input_ids=batch.token_ids, attention_mask=batch.is_token.long(), pixel_values=pixels.unsqueeze(1)
        ).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_tiny_weights_follow_the_seed():
    ids = {"image": 6, "pad": 0, "bos": 2, "eos": 3}
    tiny = tiny_config().model.tiny
    first, same, other = (build_tiny(tiny, 50, ids, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_an_absent_backbone_is_said(items):
    with pytest.raises(ConfigError, match="nowhere"):
        new_model(tiny_config(model={"backbone": "/nowhere"}), ["text"])


def test_lora_on_no_module_is_said():
    with pytest.raises(ConfigError, match="'q_projection', which matches no module"):
        tiny_model(tiny_config(model={"lora": {"enabled": True, "targets": ["q_projection"]}}))


def test_four_bits_without_their_package_are_refused_with_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes.*pip install 'pixrec\[nf4\]'"):
        load_pretrained("anything", nf4=True)


def test_adapters_train_on_a_base_in_four_bits(tmp_path, items):
    """The vision part stays whole, adapters alone learn, and the model loads again as the one that was saved."""
    pytest.importorskip("bitsandbytes")
    tiny = {"hidden_width": 128, "vision_width": 64}
    whole = tiny_model(tiny_config(model={"tiny": tiny}))
    folder = save_pretrained(tmp_path / "base", whole.tower.backbone.model, whole.encoder.tokenizer)
    config = tiny_config(model={"backbone": folder, "tiny": tiny, "lora": {"enabled": True, "base": "nf4"}})
    model = new_model(config, [])
    backbone = model.tower.backbone.model
    packed = {name for name, weight in backbone.named_parameters() if hasattr(weight, "quant_state")}
    assert packed
    assert all("text_model" in name for name in packed)
    batch = Catalog(items, model.encoder).items(np.arange(4))
    vectors = model.tower.item_vectors(batch)
    vectors.sum().backward()
    learns = {name for name, weight in backbone.named_parameters() if weight.grad is not None}
    assert learns
    assert all("lora_" in name for name in learns)
    save_model(str(tmp_path / "model"), model, {})
    again = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        model.tower.eval()
        assert torch.allclose(again.tower.item_vectors(batch), model.tower.item_vectors(batch), atol=0.02)


FIRST, SECOND, THIRD = (letter * 40 for letter in "abc")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with two commits of one model, the second of which is main; nothing is asked for outside."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # peft asks the environment
    repository = tmp_path / "models--team--tiny"
    for seed, commit in enumerate((FIRST, SECOND)):
        tiny = tiny_model(tiny_config(train={"seed": seed}))
        save_pretrained(repository / "snapshots" / commit, tiny.tower.backbone.model, tiny.encoder.tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SECOND)
    return repository


def of_hub(**model):
    return new_model(tiny_config(model={"backbone": "team/tiny", **model}), [])


def test_a_revision_pins_the_weights_and_is_kept(hub, tmp_path):
    pinned, newest = of_hub(revision=FIRST), of_hub()
    assert pinned.pretrained["revision"] == FIRST
    assert newest.pretrained["revision"] == SECOND
    assert pinned.pretrained["weights"] != newest.pretrained["weights"]
    first = tiny_model(tiny_config(train={"seed": 0})).tower.backbone.state_dict()
    assert all(torch.equal(weight, first[name]) for name, weight in pinned.tower.backbone.state_dict().items())
    info = save_model(str(tmp_path / "model"), pinned, {})
    assert info["pretrained"] == pinned.pretrained
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.pretrained == pinned.pretrained
    other = dict(pinned.pretrained, weights="another")
    assert fingerprint(loaded) != fingerprint(type(loaded)(**{**vars(loaded), "pretrained": other}))


def test_an_absent_revision_is_said(hub):
    with pytest.raises(ConfigError, match=r"'team/tiny' cannot be loaded at revision 'v9'"):
        of_hub(revision="v9")


@pytest.mark.filterwarnings("ignore:Could not find a config file in team/tiny:UserWarning")  # peft's, without a hub
def test_adapters_find_their_base_again_though_main_has_moved(hub, tmp_path):
    save_model(str(tmp_path / "model"), of_hub(lora={"enabled": True}), {})
    shutil.copytree(hub / "snapshots" / FIRST, hub / "snapshots" / THIRD)
    (hub / "refs" / "main").write_text(THIRD)
    assert load_model(str(tmp_path / "model")).pretrained["revision"] == SECOND
    weights = hub / "snapshots" / SECOND / "model.safetensors"
    shutil.copy(hub / "snapshots" / FIRST / "model.safetensors", weights)
    with pytest.raises(ArtifactError, match="'team/tiny' no longer holds the weights"):
        load_model(str(tmp_path / "model"))


def test_weights_in_several_files_are_hashed_like_those_in_one(hub, tmp_path):
    """Only in that each file counts."""
    base = load_pretrained("team/tiny")
    tiny = tiny_model()
    folder = tmp_path / "parts"
    save_pretrained(folder, base, tiny.encoder.tokenizer)
    (folder / "model.safetensors").unlink()
    base.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    before = pretrained_facts(str(folder), None)["weights"]
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes() + b" ")
    assert pretrained_facts(str(folder), None)["weights"] != before


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_in_bf16_under_heads_in_float32(tmp_path, items, lora):
    settings = {"user_tower": "interleaved", "lora": {"enabled": lora}}
    whole, model = (tiny_model(tiny_config(model={**settings, "dtype": dtype})) for dtype in ("float32", "bf16"))
    kinds = {n: p.dtype for n, p in model.tower.named_parameters()}
    assert {kind for n, kind in kinds.items() if n.startswith("backbone.") and "lora_" not in n} == {torch.bfloat16}
    assert {kind for n, kind in kinds.items() if not n.startswith("backbone.") or "lora_" in n} == {torch.float32}
    catalog, rows = Catalog(items, model.encoder), np.arange(len(items))
    vectors = model.embedder().items(catalog, rows)
    exact = whole.embedder().items(Catalog(items, whole.encoder), rows)
    assert np.sum(vectors * exact, axis=1) == pytest.approx(1, abs=1e-3)
    _, batch, sequences = catalog.histories([np.array([0, 1, 2])])
    out = model.tower.train()(batch, sequences, generate=True)
    assert out.user.dtype == out.item.dtype == torch.float32
    (out.user.sum() + out.text_logits.float().logsumexp(-1).sum()).backward()
    assert all(p.grad is not None for n, p in model.tower.named_parameters() if "lora_B" in n and "text_model" in n)
    save_model(str(tmp_path / "model"), model, {})
    again = load_model(str(tmp_path / "model"))
    assert {n: p.dtype for n, p in again.tower.named_parameters()} == kinds
    assert again.embedder().items(catalog, rows) == pytest.approx(vectors, abs=1e-6)
    one, other = (vision_fingerprint(m.tower.backbone) for m in (whole, model))
    assert one != other, "tokens computed in another type"


def test_attention_as_the_setting_says(items):
    catalog, rows = Catalog(items, tiny_model().encoder), np.arange(len(items))
    models = {kind: tiny_model(tiny_config(model={"attn_implementation": kind})) for kind in ("auto", "sdpa", "eager")}
    used = {kind: model.tower.backbone.model.config.text_config._attn_implementation for kind, model in models.items()}
    assert used == {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager"}
    assert models["eager"].tower.backbone.model.config.vision_config._attn_implementation == "eager"
    vectors = [model.embedder().items(catalog, rows) for model in models.values()]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    assert len({model.fingerprint for model in models.values()}) == 1


def test_attention_whose_package_is_lacking_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"flash_attention_2 needs the package flash_attn or kernels; .*auto"):
        tiny_model(tiny_config(model={"attn_implementation": "flash_attention_2", "dtype": "bf16"}))


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_forms_of_adapters(tmp_path, items, kind):
    plain, model = (
        tiny_model(tiny_config(model={"lora": {"enabled": True, "rank": 2, **more}})) for more in ({}, {kind: True})
    )
    adapters = [m.tower.backbone.model.peft_config["default"] for m in (plain, model)]
    assert [getattr(config, kind) for config in adapters] == [False, True]
    magnitudes = [n for n, _ in model.tower.named_parameters() if "lora_magnitude" in n]
    assert bool(magnitudes) == (kind == "use_dora")
    with torch.no_grad():
        for tower in (plain.tower, model.tower):
            for name, parameter in tower.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    rows = np.arange(len(items))
    vectors, others = (m.embedder().items(Catalog(items, m.encoder), rows) for m in (model, plain))
    assert np.abs(vectors - others).max() > 1e-3
    save_model(str(tmp_path / "model"), model, {})
    again = load_model(str(tmp_path / "model"))
    assert again.embedder().items(Catalog(items, again.encoder), rows) == pytest.approx(vectors, abs=1e-6)


@pytest.mark.parametrize("targets", ["all", ["q_proj", "out_proj"]])
def test_a_frozen_vision_part_is_the_same_under_adapters_of_any_seed(targets):
    """Or its stored tokens would not be found."""
    frozen = [tiny_config(model={"freeze_vision": True})]
    for seed in (0, 1):
        lora = {"enabled": True, "targets": targets}
        frozen.append(tiny_config(model={"freeze_vision": True, "lora": lora}, train={"seed": seed}))
    models = [tiny_model(config) for config in frozen]
    models[2].tower.backbone.load_state_dict(models[1].tower.backbone.state_dict())  # the base follows the seed too
    assert len({vision_fingerprint(model.tower.backbone) for model in models}) == 1
    adapters = {n for n, _ in models[1].tower.named_parameters() if "lora_" in n}
    assert adapters
    assert all("text_model" in name for name in adapters)


def test_a_model_without_a_backbone_asks_no_hub_for_the_size_of_pictures(monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    config = tiny_config(model={"backbone": "none", "modalities": "text", "user_tower": "compact"})
    assert picture_size_of(config.model) == tiny_config().model.tiny.image_size_px
