"""The real loading code, on small models of the real classes saved to a folder."""

import json

import numpy as np
import pytest
import torch
from fakes import tiny_config, tiny_items, tiny_model
from transformers import AutoModelForImageTextToText, Idefics3Config, LlamaConfig

from pixrec.artifact import load_model, new_model, save_model
from pixrec.errors import ConfigError
from pixrec.model.backbone import build_tiny, load_pretrained
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import train_tokenizer


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
