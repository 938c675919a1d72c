"""Every family from its own classes, small: saved as the hub lays it out, loaded, and read as our method needs it."""

import contextlib
import copy
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import transformers
from fakes import Seen, fake_efficientnet, tiny_config, tiny_items, tiny_model, write_tokens
from packaging.version import Version
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pixrec.artifact import load_model, new_model, save_model
from pixrec.config import LoraConfig
from pixrec.data.pictures import picture_hash
from pixrec.data.tokens import complete_store, store_folder, write_part
from pixrec.errors import ConfigError
from pixrec.model import gradcache
from pixrec.model.backbone import Backbone, add_lora, compile_layers, use_attention, with_masks
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import Content, ItemEncoder, cut_into_tiles, train_tokenizer
from pixrec.model.families import FAMILIES, family_of
from pixrec.model.objective import TrainingTask
from pixrec.model.parallel import clip_gradients
from pixrec.model.vision import encode_pictures, open_store, vision_fingerprint
from pixrec.model.vision_tower import EfficientNetLiteConfig, register
from pixrec.training.reading import Collator

FAMILY_NAMES = (
    "smolvlm", "idefics3", "paligemma", "paligemma2", "gemma3", "internvl", "llava", "llava_efficientnet",
    "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
)  # fmt: skip
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
OTHER_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "\n\n", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
HISTORY = np.array([1, 7, 4, 2])  # items 6 and beyond have no picture


@pytest.fixture(scope="module")
def items():
    return tiny_items(with_pictures=range(6))


def small(family, tokenizer):
    """A model of 0.3 to 0.6 million parameters of the family's own classes."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
           "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    known, text = tokenizer.get_vocab(), {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192,
                                          "num_hidden_layers": 2, "num_attention_heads": 4, **ids}  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    if family in ("smolvlm", "idefics3"):
        kind = SmolVLMConfig if family == "smolvlm" else Idefics3Config
        config = kind(
            text_config=LlamaConfig(**text), vision_config=vision, image_token_id=known["<image>"], scale_factor=2
        )
    elif family.startswith("paligemma"):  # the first on Gemma, whose attention is sdpa; the second on Gemma 2, eager
        heads = {"num_key_value_heads": 2, "head_dim": 24}
        if family == "paligemma":
            gemma = GemmaConfig(**text, **heads)
        else:
            gemma = Gemma2Config(**text, **heads, query_pre_attn_scalar=24, sliding_window=4096)
        config = PaliGemmaConfig(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=gemma,
            image_token_index=known["<image>"],
            projection_dim=96,
            hidden_size=96,
        )
    elif family == "gemma3":  # a window that no item fits into
        gemma = Gemma3TextConfig(
            **text, num_key_value_heads=2, head_dim=24, query_pre_attn_scalar=24, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        config = Gemma3Config(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False), text_config=gemma,
            image_token_index=known["<image_soft_token>"], mm_tokens_per_image=4,
        )  # fmt: skip
    elif family == "internvl":
        config = InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**text, num_key_value_heads=2),
            image_token_id=known["<IMG_CONTEXT>"],
        )  # fmt: skip
    elif family == "llava":  # the last layer but one, without the class token
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text),
            image_token_index=known["<image>"],
        )  # fmt: skip
    elif family == "llava_efficientnet":
        register()
        vision = EfficientNetLiteConfig(name="small", image_size=32, hidden_size=8, tokens_per_side=2)
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_index=known["<image>"],
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        )  # fmt: skip
    elif family == "llava_onevision":
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=Qwen2Config(**text, num_key_value_heads=2), image_token_index=known["<image>"],
            video_token_index=known["<|video_pad|>"], image_grid_pinpoints=[[32, 32], [32, 64]],
        )  # fmt: skip
    else:
        vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 4,
                  "out_hidden_size": 96}  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [2, 5, 5], "rope_theta": 10000.0}
        if family == "qwen3_vl":  # a picture is also seen by the decoder after its first layer, from the encoder's
            rope |= {"mrope_section": [4, 4, 4], "mrope_interleaved": True}
            text |= {"head_dim": 24}
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        else:
            vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        if family == "qwen2_vl":  # whose encoder is as wide inside as `embed_dim`
            vision |= {"embed_dim": 64, "hidden_size": 96, "mlp_ratio": 2}
        kind = {"qwen3_vl": Qwen3VLConfig, "qwen2_vl": Qwen2VLConfig}.get(family, Qwen2_5_VLConfig)
        config = kind(
            text_config={**text, "num_key_value_heads": 2, "rope_parameters": rope}, vision_config=vision,
            image_token_id=known["<|image_pad|>"], vision_start_token_id=known["<|vision_start|>"],
            vision_end_token_id=known["<|vision_end|>"], video_token_id=known["<|video_pad|>"],
            tie_word_embeddings=True,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        if family == "gemma3":  # which begins without a projection
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.5)
        if family == "llava_efficientnet":  # whose convolutions begin so small that pictures look alike
            for parameter in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
                torch.nn.init.normal_(parameter, std=0.5)
        return model


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def model(request, tmp_path_factory, items):
    """Loaded by `from_pretrained` from a folder, in evaluation mode."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "llava_efficientnet":
            fake_efficientnet(patch)
        yield loaded(request.param, tmp_path_factory.mktemp(request.param), items)


def loaded(family, folder, items):
    texts = [items.text(row) for row in range(len(items))]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [*tokenizer.extra_special_tokens, *QWEN_TOKENS, *OTHER_TOKENS]}
    )
    base = small(family, tokenizer)
    assert 200_000 < sum(p.numel() for p in base.parameters()) < 700_000
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    settings = {"backbone": str(folder), "user_tower": "interleaved", "freeze_vision": True, "max_pixels": 64**2}
    model = new_model(tiny_config(model=settings), texts)
    model.tower.eval()
    return model


@pytest.fixture
def catalog(model, items):
    return Catalog(items, model.encoder)


def picture(model, value):
    size = model.encoder.image_size_px
    return np.random.default_rng(value).integers(0, 256, (size, size, 3)).astype(np.uint8)


def test_an_item_is_written_as_the_family_writes_it(model):
    encoded = model.encoder.items([Content("Square", picture(model, 1))])
    family = model.tower.backbone.family
    tokens = model.encoder.tokenizer.convert_ids_to_tokens(encoded.token_ids[0].tolist())
    text, image = len(model.encoder.tokenize(["Square"])[0]), family.image_token_id
    count = family.tokens_per_picture
    assert tuple(tokens[text : text + len(family.picture_prefix)]) == family.picture_prefix
    assert tuple(tokens[len(tokens) - len(family.picture_suffix) :]) == family.picture_suffix
    assert (encoded.token_ids[0] == image).sum() == count
    assert encoded.picture_slot[0][encoded.token_ids[0] == image].tolist() == list(range(count))
    assert encoded.is_text[0].tolist() == [True] * text + [False] * (len(tokens) - text)
    with torch.no_grad():
        assert model.tower.pictures(encoded).shape == (count, family.picture_width)


def test_hidden_states_equal_those_of_the_library_itself(model):
    """Our placement of picture tokens, positions and masks against the forward pass of transformers."""
    backbone, family = model.tower.backbone, model.tower.backbone.family
    kind = backbone.model.config.model_type
    encoded = model.encoder.items([Content("Square", picture(model, n)) for n in range(1 + ("llava" in kind))])
    pixels = (encoded.pixels.permute(0, 3, 1, 2).float() / 255 - backbone.pixel_mean) / backbone.pixel_std
    ids, is_token, slots = (x.view(1, -1) for x in (encoded.token_ids, encoded.is_token, encoded.picture_slot))
    in_picture = (slots >= 0).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if kind in ("smolvlm", "idefics3"):
        inputs["pixel_values"] = pixels.unsqueeze(1)
    elif kind in ("internvl", "llava"):
        pass
    elif kind == "llava_onevision":  # two pictures, or the library would cut the one into tiles
        inputs |= {"image_sizes": torch.tensor([[32, 32]] * 2), "batch_num_images": torch.tensor([2])}
    elif kind in ("paligemma", "gemma3"):  # <bos> before; a token type marks the block that sees all of itself
        bos = torch.tensor([[model.encoder.tokenizer.bos_token_id]])
        outside = int(kind == "paligemma")
        inputs |= {
            "input_ids": torch.cat([bos, ids], 1),
            "attention_mask": torch.ones(1, ids.shape[1] + 1),
            "token_type_ids": torch.cat([torch.zeros_like(bos), in_picture], 1) ^ outside,
        }
    else:
        inputs |= {
            "pixel_values": family.patches(pixels),
            "image_grid_thw": torch.tensor([[1, 16, 16]]),
            "mm_token_type_ids": in_picture,
        }
    with torch.no_grad():
        ours = backbone.hidden_states(ids, is_token, slots, model.tower.pictures(encoded))
        theirs = backbone.model.model(**inputs).last_hidden_state[:, -ids.shape[1] :]
        logits = backbone.model(**inputs).logits[:, -ids.shape[1] :]
        assert torch.allclose(ours, theirs, atol=1e-5)
        cap = getattr(backbone.model.config.text_config, "final_logit_softcapping", None)
        if cap is not None and Version(transformers.__version__) < Version("5.23"):  # which forgets the cap of Gemma 2
            logits = torch.tanh(logits / cap) * cap
        assert torch.allclose(backbone.token_logits(ours), logits, atol=1e-5)


class NoWaits(TorchFunctionMode):
    """Refuses to move anything to a device in a way that waits for it. On `meta`, nothing can be read off a tensor:
    a number, a truth value, how many are marked."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor):
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", "made here, copied there, and waited for"
        made = function(*args, **kwargs)
        if function is torch.Tensor.to and args[0].device != made.device:
            assert kwargs.get("non_blocking"), "copied and waited for"
        return made


@pytest.mark.parametrize("way", ["whole", "in parts"])
def test_a_step_waits_for_no_gpu(model, catalog, way, monkeypatch):
    monkeypatch.setattr(gradcache, "reseed", lambda seed, device: None)  # meta has no random numbers
    tower, config = copy.deepcopy(model.tower).train().to("meta"), model.config
    tower.requires_grad_(True)
    train = dataclasses.replace(config.train, mask_history=True, symmetric=True)
    task = TrainingTask(tower, train)
    task.autocast = contextlib.nullcontext  # which knows no meta device
    collator = Collator(catalog, np.ones(12), config, 4.0)
    plan = collator.plan([HISTORY, np.array([3, 8]), np.array([5, 5, 9])], np.random.default_rng(0))
    one_pass = collator.encoded(plan)
    parts = one_pass.parts(model.encoder, 2, 4)
    with NoWaits():
        if way == "whole":
            loss, _ = task(one_pass.batch().to("meta"))
            loss.backward()
        else:
            loss, _, _ = gradcache.backward(task, parts, None, 0)
        norm = clip_gradients(tower.parameters(), 1.0)
    assert loss.is_meta
    assert norm.is_meta
    assert all(p.grad is not None for p in tower.backbone.family.token_parameters(tower.backbone.model))


def test_padding_and_company_change_no_vector(model, catalog):
    embedder = model.embedder()
    together = embedder.items(catalog, np.arange(12))
    alone = np.concatenate([embedder.items(catalog, np.array([row])) for row in range(12)])
    assert together == pytest.approx(alone, abs=2e-5)
    histories = [np.array([1]), HISTORY, np.array([8, 9])]
    users = embedder.users(catalog, histories, together)
    assert users == pytest.approx(np.concatenate([embedder.users(catalog, [h], together) for h in histories]), abs=2e-5)


def test_the_mask_of_padding_changes_no_state(model, monkeypatch):
    """To the bit: those families that look back only are given none."""
    backbone, family = model.tower.backbone, model.tower.backbone.family
    if not family.causal:
        pytest.skip("its pictures see all of themselves, which a mask says")
    encoded = model.encoder.items([Content(text, picture(model, 1)) for text in ("Square", "Tile Patch Square by Ann")])
    assert not encoded.is_token.all()
    inputs = encoded.token_ids, encoded.is_token, encoded.picture_slot, model.tower.pictures(encoded)
    language = family.language_model(backbone.model)
    monkeypatch.setattr(language, "config", language.config)  # put back afterwards
    seen = []

    def masked(**inputs):
        seen.append(inputs.get("attention_mask"))
        with_masks(backbone.model)
        return language(**{**inputs, "attention_mask": encoded.is_token.long()})

    with torch.no_grad():
        without = backbone.hidden_states(*inputs)
        monkeypatch.setattr(family, "language_model", lambda model: masked)
        assert torch.equal(backbone.hidden_states(*inputs)[encoded.is_token], without[encoded.is_token])
    assert seen == [None]


def vision_type(model):
    return model.tower.backbone.model.config.vision_config.model_type


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # at which the compiler looks
def test_compiled_layers_change_no_vector_and_no_gradient(model, catalog, monkeypatch):
    """Traced, but not turned into C++, which takes minutes: that is in `benchmarks.speed.levers`."""
    if model.tower.backbone.model.config.model_type in ("idefics3", "llava_onevision", "qwen2_vl"):
        pytest.skip("layers like those of another family")
    if vision_type(model) == "efficientnet_lite":
        pytest.skip("whose encoder has no layers of a transformer")
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: plain(module, backend="eager", **options))
    encoded, found = catalog.items(np.array([1, 7, 3])), []
    for compiled in (False, True):
        tower = copy.deepcopy(model.tower).requires_grad_(True)
        torch._dynamo.reset()
        if compiled:
            compile_layers(tower.backbone.model)
        vectors = tower.item_vectors(encoded)
        vectors.square().sum().backward()
        found.append([vectors, *(p.grad for p in tower.parameters() if p.grad is not None)])
    compiled_layers = [m for m in tower.backbone.model.modules() if m._compiled_call_impl is not None]
    assert len(compiled_layers) == 4, "two layers that see and two that read"
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_a_prefix_does_not_see_its_future(model, catalog):
    _, batch, sequences = catalog.histories([HISTORY])
    with torch.no_grad():
        whole = model.tower(batch, sequences, generate=True)
    prefixes = model.embedder().users(catalog, [HISTORY[:n] for n in range(1, 4)], None)
    assert whole.user.numpy() == pytest.approx(prefixes, abs=2e-5)


def test_generation_sees_the_history_and_never_what_it_must_name(model):
    encoder, shown = model.encoder, picture(model, 1)

    def first_scores(before, target):
        items = encoder.items([Content("Tile", before), Content(*target)])
        with torch.no_grad():
            return model.tower(items, encoder.histories(items, [np.array([0, 1])]), generate=True).text_logits[0]

    scores = first_scores(shown, ("Square", None))
    assert torch.allclose(scores, first_scores(shown, ("Patch", shown)), atol=1e-5)
    assert (scores - first_scores(picture(model, 2), ("Square", None))).abs().max() > 1e-4


def test_adapters_reach_the_attention_of_the_part_that_is_named(model):
    sees = vision_type(model) != "efficientnet_lite"  # which has no attention
    if not sees:
        with pytest.raises(ConfigError, match=r"model.lora.targets: .*not found"):
            add_lora(copy.deepcopy(model.tower.backbone.model), LoraConfig(enabled=True, targets="vision"))
    for where in ("language", "vision", "all") if sees else ("language", "all"):
        base = copy.deepcopy(model.tower.backbone.model)
        family = family_of(base)
        vision = {id(p) for p in family.vision_parameters(base)}
        layers = {"language": base.config.text_config.num_hidden_layers, "vision": 2 * sees}
        names = {"language": family.language_attention, "vision": family.vision_attention}
        add_lora(base, LoraConfig(enabled=True, targets=where))
        found = {"language": 0, "vision": 0}
        for name, module in base.named_modules():
            if hasattr(module, "lora_A"):
                assert isinstance(module.base_layer, torch.nn.Linear)
                assert "attn" in name or "attention" in name
                found["vision" if id(module.base_layer.weight) in vision else "language"] += 1
        assert found == {part: layers[part] * len(names[part]) * (where in (part, "all")) for part in found}


def test_attention_that_the_family_cannot_use_is_refused(model):
    backbone = model.tower.backbone
    base, kind = copy.deepcopy(backbone.model), backbone.model.config.model_type
    if not backbone.family.causal:
        with pytest.raises(ConfigError, match=f"flash_attention_2 .* {kind}|package flash_attn"):
            use_attention(base, "flash_attention_2")
    if base.config.text_config.model_type == "gemma2":
        with pytest.raises(ConfigError, match="sdpa does not suit"):
            use_attention(base, "sdpa")
    else:
        use_attention(base, "sdpa")
    use_attention(base, "eager")


def test_it_learns_is_saved_and_loaded(model, catalog, tmp_path):
    _, batch, sequences = catalog.histories([HISTORY])
    out = model.tower(batch, sequences, generate=True)
    loss = torch.nn.functional.cross_entropy(out.text_logits, out.text_ids) + out.user.sum()
    loss.backward()
    backbone = model.tower.backbone
    vision = backbone.family.vision_parameters(backbone.model)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in vision)
    model.tower.zero_grad(set_to_none=True)
    save_model(str(tmp_path / "model"), model, {})
    again = load_model(str(tmp_path / "model"))
    assert again.tower.backbone.pixel_mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    rows = np.arange(12)
    assert again.embedder().items(Catalog(catalog.table, again.encoder), rows) == pytest.approx(
        model.embedder().items(catalog, rows), abs=1e-6
    )


def test_the_key_of_stored_tokens_follows_what_they_are_made_by_and_nothing_else(model):
    """An equal vision part finds its tokens, whatever a seed drew for adapters and for weights that no token is made
    by: those of the language model, and in the vision part those that get no gradient from the tokens."""
    tower = copy.deepcopy(model.tower)
    backbone, base = tower.backbone, tower.backbone.model
    before = vision_fingerprint(backbone)
    backbone.picture_tokens(*cut_into_tiles([picture(model, 1)], backbone.family.tile_px)).square().sum().backward()
    vision = {id(p) for p in backbone.family.vision_parameters(base)}
    made_by = {id(p) for p in tower.parameters() if p.grad is not None and id(p) in vision}
    assert {id(p) for p in backbone.family.token_parameters(base)} == made_by
    with torch.no_grad():
        for parameter in tower.parameters():
            if id(parameter) not in made_by:
                parameter.add_(0.1)
    assert vision_fingerprint(backbone) == before
    for seed in (1, 2):
        adapted = copy.deepcopy(model.tower.backbone)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            add_lora(adapted.model, LoraConfig(enabled=True), vision=False)
        assert vision_fingerprint(adapted) == before
    with torch.no_grad():
        next(p for p in tower.parameters() if id(p) in made_by).view(-1)[0] += 0.1
    assert vision_fingerprint(backbone) != before


def test_of_a_llava_the_layers_behind_the_one_that_is_read_make_no_token():
    tokenizer = train_tokenizer(["Square Tile"], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *QWEN_TOKENS]})
    base = small("llava_onevision", tokenizer)
    base.config.vision_feature_layer = -2
    backbone = Backbone(base, [0.5] * 3, [0.5] * 3)
    before = vision_fingerprint(backbone)
    last = base.model.vision_tower.encoder.layers[-1]
    torch.nn.init.normal_(last.mlp.fc1.weight)
    assert vision_fingerprint(backbone) == before
    torch.nn.init.normal_(base.model.vision_tower.encoder.layers[0].mlp.fc1.weight)
    assert vision_fingerprint(backbone) != before


def test_stored_picture_tokens_do_for_the_pictures(model, catalog, tmp_path, monkeypatch):
    backbone, embedder = model.tower.backbone, model.embedder()
    rows, histories = np.arange(12), [HISTORY, np.array([3, 5])]
    items, users = embedder.items(catalog, rows), embedder.users(catalog, histories, None)
    write_tokens(tmp_path, model, catalog.table)
    cached = Catalog(catalog.table, model.encoder, tokens=open_store(str(tmp_path), backbone))
    seen = Seen(monkeypatch, model)
    assert np.sum(embedder.items(cached, rows) * items, axis=1) == pytest.approx(1, abs=1e-3)
    assert np.sum(embedder.users(cached, histories, None) * users, axis=1) == pytest.approx(1, abs=1e-3)
    assert seen.pictures == 0


def qwen(family):
    tokenizer = train_tokenizer(["Square Tile"], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": QWEN_TOKENS})
    return small(family, tokenizer)


def test_what_deeper_layers_see_of_a_picture_belongs_to_its_tokens():
    """Qwen3-VL's; a store without it would give other states, and another choice of it is another fingerprint."""
    base = qwen("qwen3_vl").eval()
    backbone = Backbone(base, [0.5] * 3, [0.5] * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    slots = torch.cat([torch.full((2, 3), -1), torch.arange(128).view(2, 64)], dim=1)
    ids, is_token = torch.ones_like(slots), torch.ones_like(slots, dtype=torch.bool)
    with torch.no_grad():
        pictures = backbone.picture_tokens(*cut_into_tiles(pixels, 8)).flatten(0, 1)
        assert pictures.shape == (128, 2 * backbone.width + 2)
        cut = pictures.clone()
        cut[:, backbone.width : -2] = 0
        states, without = (backbone.hidden_states(ids, is_token, slots, tokens) for tokens in (pictures, cut))
        assert (states - without).abs().max() > 1e-2
        turned = backbone.hidden_states(ids[[1, 0]], is_token, slots[[1, 0]], pictures)
        assert torch.allclose(turned[[1, 0]], states, atol=1e-5), "each row has its own picture's"
    before = vision_fingerprint(backbone)
    base.config.vision_config.deepstack_visual_indexes = [1]
    assert vision_fingerprint(backbone) != before


@pytest.mark.parametrize(("family", "statistics"), [("qwen2_5_vl", None), ("qwen3_vl", [0.5] * 3)])
def test_patches_are_laid_out_as_the_library_lays_them_out(family, statistics):
    """Qwen3-VL takes the same processor with its own mean and deviation."""
    adapter = FAMILIES[family](qwen(family))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        do_resize=False,
        **({} if statistics is None else {"image_mean": statistics, "image_std": statistics}),
    )
    theirs = processor(images=[pixels], return_tensors="pt")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    scaled = cut_into_tiles([pixels], adapter.tile_px)[0].permute(0, 3, 1, 2).float() / 255
    assert theirs["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert torch.allclose(adapter.patches((scaled - mean) / std), theirs["pixel_values"], atol=1e-5)


SHAPES = ((40, 96), (64, 64), (130, 50), (20, 30))  # width, height; the last is enlarged


def png(seed, width, height):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(sink, "PNG")
    return sink.getvalue()


def any_shape(family):
    """A backbone of a Qwen family that takes 12 to 64 tokens a picture, its encoder and the library's processor."""
    tokenizer = train_tokenizer(["Square Tile"], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": QWEN_TOKENS})
    backbone = Backbone(small(family, tokenizer).eval(), [0.5] * 3, [0.5] * 3)
    backbone.family.limit_pixels((800, 10**6), None, 64**2)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 800, "longest_edge": 64**2}, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    return backbone, ItemEncoder(tokenizer, backbone.family, 8), processor


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_of_any_shape_are_read_as_the_library_reads_them(family):
    """Token ids, grid, pixel values and hidden states of a history, with the library's own processor and forward."""
    backbone, encoder, processor = any_shape(family)
    data = [png(seed, *shape) for seed, shape in enumerate(SHAPES)]
    items = encoder.items([Content("Square", encoder.decode(picture)) for picture in data])
    history = encoder.histories(items, [np.arange(len(data))])
    theirs = processor(images=[Image.open(io.BytesIO(picture)) for picture in data], return_tensors="pt")
    grid = theirs["image_grid_thw"]
    assert (2 * items.grid).tolist() == grid[:, 1:].tolist()
    assert len({tuple(shape) for shape in grid.tolist()}) == len(SHAPES)
    known = encoder.tokenizer.get_vocab()
    expected = []
    for count in (grid.prod(1) // 4).tolist():
        expected += [*encoder.tokenize(["Square"])[0], known["<|vision_start|>"], *[known["<|image_pad|>"]] * count]
        expected += [known["<|vision_end|>"], encoder.separator_id]
    assert history.token_ids[0].tolist() == expected
    patches = backbone.family.patches((items.pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
    assert float((patches - theirs["pixel_values"]).abs().max()) < 2.5 * 2 / 255  # of Pillow's rounding

    with torch.no_grad():
        encoded = backbone.picture_tokens(items.pixels, items.grid).flatten(0, 1)
        ours = backbone.hidden_states(history.token_ids, history.is_token, history.picture_slot, encoded)
        output = backbone.model.model(
            input_ids=history.token_ids,
            attention_mask=torch.ones_like(history.token_ids),
            pixel_values=patches,
            image_grid_thw=grid,
            mm_token_type_ids=(history.picture_slot >= 0).long(),
        )
    assert torch.allclose(ours, output.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_items_of_pictures_of_several_shapes_are_chosen_and_stored(family, tmp_path):
    backbone, encoder, _ = any_shape(family)
    data = [png(seed, *shape) for seed, shape in enumerate(SHAPES)]
    texts = ["Square", "Tile", "", "Square Tile", "Tile"]
    contents = [Content(t, None if p is None else encoder.decode(p)) for t, p in zip(texts, [*data, None], strict=True)]
    rows = encode_pictures(backbone, data)
    stored = [
        Content(text, np.array(tokens, np.float16).reshape(-1, backbone.family.picture_width))
        for text, tokens in zip(texts, rows.column("tokens").to_pylist(), strict=False)
    ]

    def states(items):
        with torch.no_grad():
            made = backbone.picture_tokens(items.pixels, items.grid) if len(items.pixels) else items.ready[:0]
            pictures = torch.cat([made, items.ready]).flatten(0, 1) if len(items.ready) else made.flatten(0, 1)
            return backbone.hidden_states(items.token_ids, items.is_token, items.picture_slot, pictures)

    mixed = [contents[0], stored[1], contents[4], stored[3], contents[2]]
    items = encoder.items(mixed)
    together = states(items)
    for chosen in ([4, 0], [1], [3, 2, 0], [2], [0, 1, 2, 3, 4]):
        part, alone = encoder.select(items, np.array(chosen)), encoder.items([mixed[i] for i in chosen])
        for field in dataclasses.fields(part):
            assert torch.equal(getattr(part, field.name), getattr(alone, field.name)), field.name
        for row, found in zip(chosen, states(alone), strict=True):
            count = int(items.is_token[row].sum())
            assert torch.allclose(found[:count], together[row, :count], atol=1e-5)
    folder = store_folder(str(tmp_path), vision_fingerprint(backbone))
    write_part(folder, rows)
    complete_store(folder, rows.schema)
    for tokens, content in zip(open_store(str(tmp_path), backbone).of_hashes(list(map(picture_hash, data))), stored,
                               strict=True):  # fmt: skip
        np.testing.assert_array_equal(tokens, content.pixels)
    backbone.family.limit_pixels(None, None, 48**2)
    assert open_store(str(tmp_path), backbone) is None, "another budget makes other tokens"


def test_an_unknown_family_is_said_with_what_is_known():
    model = tiny_model().tower.backbone.model
    model.config.model_type = "flamingo"
    with pytest.raises(ConfigError, match=r"'flamingo'; known: gemma3, idefics3, internvl.*pixrec/model/families"):
        family_of(model)


def test_a_gemma_3_item_is_written_as_its_processor_writes_it():
    tokenizer = train_tokenizer(["Square Tile"], 300)
    names = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *OTHER_TOKENS]})
    for name, token in names.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.get_vocab()[token])
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4
    )
    theirs = processor(text="Square<start_of_image>", images=[pixels], add_special_tokens=False)
    encoder = ItemEncoder(tokenizer, FAMILIES["gemma3"](small("gemma3", tokenizer)), 8)
    assert encoder.items([Content("Square", pixels)]).token_ids[0].tolist() == theirs["input_ids"][0]


@pytest.mark.parametrize(
    ("processor", "more"),
    [
        (Gemma3ImageProcessorPil, {}),
        (GotOcr2ImageProcessorPil, {"crop_to_patches": False}),  # InternVL's
        (LlavaOnevisionImageProcessorPil, {"image_grid_pinpoints": [[32, 32]]}),
    ],
    ids=["gemma3", "internvl", "llava_onevision"],
)
def test_pixel_values_equal_those_of_the_library(processor, more):
    """Of a picture of the family's size, with the statistics in the processor's file."""
    made = processor(size={"height": 32, "width": 32}, **more)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    theirs = torch.as_tensor(np.array(made(images=[list(pixels)])["pixel_values"]))
    backbone = Backbone(tiny_model().tower.backbone.model, list(made.image_mean), list(made.image_std))
    seen = []
    backbone.family.encode_pictures = lambda model, pixels, grid: seen.append(pixels)
    backbone.picture_tokens(*cut_into_tiles(pixels, 32))
    assert torch.allclose(seen[0], theirs.reshape(-1, *seen[0].shape[1:])[:2], atol=1e-5)
