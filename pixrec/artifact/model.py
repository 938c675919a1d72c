"""Saves and loads a model as one folder. safetensors, YAML and JSON only.

A model is a folder: config.yaml (resolved), adapter/ (PEFT's format) or backbone/, heads.safetensors (with the
connector, where that is trained beside adapters), processor/, embedded_ids/ where items have learned vectors,
model.json (written last). Of a pair of encoders model.json names the pretrained weights by their hash; in place of
backbone/ there is encoders.safetensors, what training may have altered of them, and nothing where they stood still. A
model's fingerprint names the weights, the tokenizer and what the towers may see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import safetensors
import safetensors.torch
import torch
import transformers
import transformers.utils.logging
from safetensors import SafetensorError
from torch import Tensor

import pixrec
from pixrec import storage
from pixrec.config import Config, dump_config, load_config
from pixrec.data.arrays import Arrays, write_index
from pixrec.data.ids import IdIndex
from pixrec.data.images import PixelBudget, size_settings
from pixrec.data.items import load_texts
from pixrec.errors import ArtifactError, ConfigError
from pixrec.model.backbone import (
    ADAPTER,
    DTYPES,
    TINY,
    Backbone,
    add_lora,
    build_tiny,
    cannot_load,
    fill_adapters,
    keep_adapters_whole,
    know_own_encoders,
    learns_with_adapters,
    load_pretrained,
    pretrained_facts,
    pretrained_shape,
    use_attention,
)
from pixrec.model.catalog import Embedder
from pixrec.model.compact import CompactTower
from pixrec.model.encoders import DualEncoder, EncoderTower, load_encoders
from pixrec.model.encoding import ItemEncoder, PictureFacts, picture_facts, train_tokenizer
from pixrec.model.packages import model_place
from pixrec.model.seeding import seeded
from pixrec.model.towers import DualTower

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_MARKER = "model.json"
_KNOCKOUTS = "knockouts"
_EMBEDDED_IDS = "embedded_ids"
_HEADS = "heads.safetensors"
_ENCODERS = "encoders.safetensors"
DESCRIPTION = "description.json"
NO_IDS = pa.array([], pa.large_string())

# What reading damaged files raises. RuntimeError: a tensor of another shape; KeyError: a file that lacks a key;
# TypeError: a tokenizer without its settings.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ConfigError)


@dataclass(frozen=True)
class Model:
    """The towers with what it takes to use them, and what model.json says of their training."""

    tower: DualTower
    encoder: ItemEncoder
    config: Config
    info: dict[str, Any]
    """model.json: fingerprint, metrics, counts of training."""
    embedded_ids: IdIndex = field(default_factory=lambda: IdIndex.of(NO_IDS))
    """Items that have a learned vector of their own, and the row of each among those vectors."""
    pretrained: dict[str, Any] = field(default_factory=dict)
    """Revision and hash of the weights that training began from; empty for `pixrec-tiny`."""

    @property
    def fingerprint(self) -> str:
        return str(self.info["fingerprint"])

    @property
    def temperature(self) -> float:
        """What cosines are divided by to be the logits that training saw."""
        return float((self.tower.compact or self.tower).temperature.detach())

    @property
    def writes_text(self) -> bool:
        """Whether there is a language model that generates."""
        return self.config.model.trains_backbone

    def embedder(self) -> Embedder:
        model = self.config.model
        return Embedder(self.tower, self.encoder, model.modalities, model.max_history_items, self.embedded_ids)


def planned_model(config: Config, texts: list[str]) -> Model:
    """As `new_model`, on torch's `meta` device: shapes without weights, of which none is read or made."""
    return new_model(config, texts, "meta")


def new_model(config: Config, texts: list[str], device: str = "cpu") -> Model:
    """A model before its first training step. `texts` (the catalog's) train the tokenizer of `pixrec-tiny`."""
    if not config.model.trains_backbone:
        return _encoder_model(config, device)
    place = model_place(config.model.backbone)
    if config.model.backbone == TINY:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts, config.model.tiny.vocabulary_tokens)
        pictures = PictureFacts([0.5] * 3, [0.5] * 3, None)
    else:
        tokenizer = _pretrained_tokenizer(place, config.model.revision)
        pictures = picture_facts(place, config.model.revision)
    meta = device == "meta"
    base, pretrained = _shape(config, tokenizer) if meta else _base(config, tokenizer, config.model.revision)
    with seeded(config.train.seed):
        if config.model.lora.enabled:
            add_lora(base, config.model.lora, config.model.learns_vision)
        backbone = _backbone(base, pictures, config, tokenizer)
        tower = DualTower(backbone, config.model, config.train.temperature)
    tower.to(device)
    encoder = ItemEncoder(tokenizer, tower.backbone.family, config.model.max_text_tokens)
    return Model(tower, encoder, config, {}, pretrained=pretrained)


def _encoder_model(config: Config, device: str = "cpu") -> Model:
    """A model of two pretrained encoders, or of none, which has not seen a catalog yet."""
    settings, pretrained = config.model, dict[str, Any]()
    if settings.text_encoder is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer([], settings.tiny.vocabulary_tokens)
        backbone = DualEncoder(None, None, 1, [0.5] * 3, [0.5] * 3, tokenizer.pad_token_id)
    else:
        text, image = (model_place(str(name)) for name in (settings.text_encoder, settings.image_encoder))
        tokenizer = _pretrained_tokenizer(text, None)
        try:
            with _without_bars():
                backbone = load_encoders(text, image, tokenizer, picture_facts(image)[:2])
            pretrained = {"text": pretrained_facts(text, None), "image": pretrained_facts(image, None)}
        except (OSError, ValueError) as error:
            raise cannot_load(f"{settings.text_encoder} or {settings.image_encoder}", None, error) from None
    tower = EncoderTower(backbone, settings, config.train.temperature).to(device)
    longest = min(settings.max_text_tokens, backbone.max_text_tokens)
    encoder = ItemEncoder(tokenizer, backbone.family, longest, special_tokens=True)
    return Model(tower, encoder, config, {}, pretrained=pretrained)


def _pretrained_tokenizer(place: str, revision: str | None) -> PreTrainedTokenizerBase:
    know_own_encoders()
    try:
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, revision=revision)
    except (OSError, ValueError) as error:
        raise cannot_load(place, revision, error) from None


def untrained_model(config: Config, data_uris: Sequence[str], device: str = "cpu") -> Model:
    """`new_model` whose tokenizer, where `pixrec-tiny` needs one trained, has read the items of these data sets."""
    texts = [text for uri in data_uris for text in load_texts(uri)] if config.model.backbone == TINY else []
    return new_model(config, texts, device)


def with_compact(model: Model, trained_items: Sequence[str]) -> Model:
    """The model with an untrained compact user tower, which learns a vector for each of `trained_items` if so set."""
    known = pa.array(trained_items, pa.large_string()) if model.config.model.compact.id_embedding else NO_IDS
    return _with_compact(model, IdIndex.of(known))


def _with_compact(model: Model, known: IdIndex) -> Model:
    config = model.config.model
    with seeded(model.config.train.seed):
        tower = CompactTower(config.compact_width, config.compact, config.content_width or None, len(known))
    model.tower.compact = tower.to(model.tower.log_temperature.device)
    return dataclasses.replace(model, embedded_ids=known)


def save_model(folder: str, model: Model, info: dict[str, Any]) -> dict[str, Any]:
    """Write all of a model into a local `folder`, model.json last; returns what model.json says."""
    path = _describe(folder, model)
    backbone = model.tower.backbone
    if model.config.model.trains_backbone:
        backbone.model.save_pretrained(path / ("adapter" if model.config.model.lora.enabled else "backbone"))
    if isinstance(backbone, DualEncoder) and backbone.tuned:
        state = backbone.state_dict()
        tuned = {name: state[name].cpu().contiguous() for name in sorted(backbone.tuned)}
        safetensors.torch.save_file(tuned, path / _ENCODERS)
    safetensors.torch.save_file(_heads(model), path / _HEADS)
    facts = {"fingerprint": fingerprint(model), "pixrec": pixrec.__version__, **info}
    if model.pretrained:
        facts["pretrained"] = model.pretrained
    (path / MODEL_MARKER).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def describe_model(folder: str, model: Model, info: dict[str, Any]) -> None:
    """Write all of a model but its weights into a local `folder`, for `described_model`. Asks no weight for its
    values, so that they may be spread over workers."""
    path = _describe(folder, model)
    if not model.config.model.lora.enabled:
        model.tower.backbone.model.config.save_pretrained(path / "backbone")
    (path / DESCRIPTION).write_text(json.dumps({**info, "pretrained": model.pretrained}))


def described_model(folder: str) -> Model:
    """The model of `describe_model`, which is still to be given the weights of `own_names`: under adapters the base is
    there, else no weight takes memory."""
    path = Path(folder)
    info = json.loads((path / DESCRIPTION).read_text())
    config = load_config((path / "config.yaml").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "processor", trust_remote_code=False)
    if config.model.lora.enabled:
        base, _ = _base(config, tokenizer, info["pretrained"].get("revision"))
        add_lora(base, config.model.lora, config.model.learns_vision)
    else:
        with torch.device("meta"):
            base = pretrained_shape(str(path / "backbone"), None, DTYPES[config.model.dtype])
    pretrained = info.pop("pretrained")
    return _assembled(path, base, tokenizer, config, info, pretrained)


def own_names(model: Model) -> list[str]:
    """Names of the tensors that a model's folder holds: heads, and adapters or the backbone; tied ones once."""
    tower = model.tower
    tied = {name for name, _ in tower.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in tower.named_parameters()}
    lora, parts = model.config.model.lora, tower.backbone.family.vision_parts
    names = [name for name in tower.state_dict() if name not in tied]
    return [n for n in names if not lora.enabled or _is_head(n) or learns_with_adapters(n, lora, parts)]


def give_weights(model: Model, weights: dict[str, Tensor]) -> None:
    """Give a `described_model` its weights, which become its own: no copy is made."""
    lacking = set(own_names(model)) - set(weights)
    if lacking:
        raise ArtifactError(f"the checkpoint lacks {min(lacking)}; train again")
    model.tower.load_state_dict(weights, strict=False, assign=True)
    model.tower.backbone.model.tie_weights()


def _describe(folder: str, model: Model) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(dump_config(model.config))
    processor = path / "processor"
    model.encoder.tokenizer.save_pretrained(processor)
    backbone = model.tower.backbone
    statistics = {
        "image_mean": backbone.pixel_mean.flatten().tolist(),
        "image_std": backbone.pixel_std.flatten().tolist(),
        **size_settings(model.encoder.picture_size),
    }
    (processor / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2))
    if model.embedded_ids:
        write_index(str(path / _EMBEDDED_IDS), model.embedded_ids.ids)
    return path


def load_model(uri: str, device: str = "cpu") -> Model:
    """Load a model folder (local or s3://). Raises ArtifactError when it is absent, incomplete or altered."""
    if not storage.exists(storage.join(uri, MODEL_MARKER)):
        raise ArtifactError(f"{uri} holds no complete model (no {MODEL_MARKER}); make one with pixrec train")
    with storage.local_folder(uri) as folder, _without_bars():
        try:
            model = _read_model(Path(folder))
        except _DAMAGE as error:
            raise ArtifactError(f"{uri} is damaged: {' '.join(str(error).split())[:200]}; train it again") from None
    model.tower.to(device).eval()
    if fingerprint(model) != model.info.get("fingerprint"):
        raise ArtifactError(
            f"{uri} is not the model its model.json names (weights or tokenizer altered); train it again"
        )
    return model


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows no "Loading weights" on stderr, not even before an error of one line."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def knockout_uri(model_uri: str, modality: str) -> str:
    """The folder of the knockout that was trained beside the model on `modality` alone."""
    return storage.join(model_uri, _KNOCKOUTS, f"{modality}_only")


def fingerprint(model: Model) -> str:
    """Hash of all weights, those that training began from, the tokenizer and the model section of the config: equal
    towers, equal fingerprint.

    Matrices in 4 bits and their biases are left out: their layout and type depend on the device and on use.
    """
    digest = hashlib.blake2b(digest_size=16)
    named = model.tower.named_parameters()
    packed = tuple(name.removesuffix("weight") for name, weight in named if hasattr(weight, "quant_state"))
    for name, tensor in sorted(model.tower.state_dict().items()):
        if name.startswith(packed):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(sorted(model.encoder.tokenizer.get_vocab().items())).encode())
    digest.update(repr(model.config.model).encode())
    if isinstance(model.encoder.picture_size, PixelBudget):
        digest.update(repr(model.encoder.picture_size).encode())
    digest.update(model.embedded_ids.digest.encode() if model.embedded_ids else b"[]")
    digest.update(json.dumps(model.pretrained, sort_keys=True).encode() if model.pretrained else b"")
    return digest.hexdigest()


def _read_model(path: Path) -> Model:
    info = dict(json.loads((path / MODEL_MARKER).read_text()))
    config = load_config((path / "config.yaml").read_text())
    recorded = info.get("pretrained", {})
    if not config.model.trains_backbone:
        model = _encoder_model(config)
        _check_unchanged(f"{config.model.text_encoder} or {config.model.image_encoder}", model.pretrained, recorded)
        if (path / _ENCODERS).exists():
            _give_tuned(path, model)
        return _with_heads(path, dataclasses.replace(model, info=info))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "processor", trust_remote_code=False)
    if config.model.lora.enabled:
        base, pretrained = _base(config, tokenizer, recorded.get("revision"))
        _check_unchanged(f"model.backbone {config.model.backbone!r}", pretrained, recorded)
        base.load_adapter(str(path / "adapter"))
        keep_adapters_whole(base)
        fill_adapters(base, safetensors.torch.load_file(path / "adapter" / "adapter_model.safetensors"))
    else:
        base = load_pretrained(str(path / "backbone"), dtype=DTYPES[config.model.dtype])
        use_attention(base, config.model.attn_implementation)
    return _with_heads(path, _assembled(path, base, tokenizer, config, info, recorded))


def _give_tuned(path: Path, model: Model) -> None:
    """Give encoders what training made of them. Raises ValueError where that is of others."""
    backbone, tuned = model.tower.backbone, safetensors.torch.load_file(path / _ENCODERS)
    assert isinstance(backbone, DualEncoder)
    backbone.tune(model.config.model, model.config.train.seed)
    if set(tuned) != backbone.tuned:
        raise ValueError(f"{_ENCODERS} does not fit config.yaml")
    backbone.load_state_dict(tuned, strict=False)


def _check_unchanged(name: str, pretrained: dict[str, Any], recorded: dict[str, Any]) -> None:
    if pretrained != recorded:
        raise ArtifactError(
            f"{name} no longer holds the weights that the model was trained on; put those back, or train again"
        )


def _with_heads(path: Path, model: Model) -> Model:
    """The model with all that is not its backbone, as it was saved."""
    with safetensors.safe_open(path / _HEADS, "pt") as file:
        has_compact = any(name.startswith("compact.") for name in file.keys())  # noqa: SIM118, no dictionary
    if has_compact:
        listed = path / _EMBEDDED_IDS
        model = _with_compact(model, Arrays(str(listed)).index if listed.exists() else model.embedded_ids)
    load_heads(model, str(path))
    return model


def load_heads(model: Model, folder: str) -> None:
    """Give a model all that is not its backbone, as it lies in a local folder. Raises ValueError where that is of
    another model."""
    missing, unexpected = model.tower.load_state_dict(safetensors.torch.load_file(Path(folder) / _HEADS), strict=False)
    if unexpected or set(_beside_backbone(model)) & set(missing):
        raise ValueError("heads.safetensors does not fit config.yaml")


def _assembled(
    path: Path,
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    info: dict[str, Any],
    pretrained: dict[str, Any],
) -> Model:
    """A backbone and what lies beside it in the folder, with fresh heads."""
    backbone = _backbone(base, picture_facts(str(path / "processor")), config, tokenizer)
    tower = DualTower(backbone, config.model, config.train.temperature)
    encoder = ItemEncoder(tokenizer, backbone.family, config.model.max_text_tokens)
    return Model(tower, encoder, config, info, pretrained=pretrained)


def _base(config: Config, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """The backbone without adapters, and what tells its pretrained weights from all others."""
    settings, dtype = config.model, DTYPES[config.model.dtype]
    pretrained: dict[str, Any] = {}
    if settings.backbone == TINY:
        base = build_tiny(settings.tiny, len(tokenizer), _special_ids(tokenizer), config.train.seed, dtype)
    else:
        place = model_place(settings.backbone)
        base = load_pretrained(place, settings.lora.base == "nf4", revision, dtype)
        pretrained = pretrained_facts(place, revision)
    use_attention(base, settings.attn_implementation)
    return base, pretrained


def _shape(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, Any]]:
    """As `_base`, on the meta device."""
    settings, dtype = config.model, DTYPES[config.model.dtype]
    with torch.device("meta"):
        if settings.backbone == TINY:
            base = build_tiny(settings.tiny, len(tokenizer), _special_ids(tokenizer), config.train.seed, dtype)
        else:
            base = pretrained_shape(model_place(settings.backbone), settings.revision, dtype)
    use_attention(base, settings.attn_implementation)
    return base, {}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    names = {"image": "<image>", "pad": "<pad>", "bos": "<s>", "eos": "<end_of_utterance>"}
    return {key: tokenizer.get_vocab()[token] for key, token in names.items()}


def _backbone(base: Any, pictures: PictureFacts, config: Config, tokenizer: PreTrainedTokenizerBase) -> Backbone:
    backbone = Backbone(base, pictures.mean, pictures.std, _instruction(config, tokenizer))
    backbone.family.limit_pixels(pictures.limits, config.model.min_pixels, config.model.max_pixels)
    return backbone


def _instruction(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = config.model.instruction
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _heads(model: Model) -> dict[str, Tensor]:
    """Everything that neither the backbone nor its adapters hold."""
    state = model.tower.state_dict()
    return {name: state[name].detach().cpu().contiguous() for name in _beside_backbone(model)}


def _beside_backbone(model: Model) -> list[str]:
    """Names of what heads.safetensors holds."""
    lora, parts = model.config.model.lora, model.tower.backbone.family.vision_parts
    names = list(model.tower.state_dict())
    return [n for n in names if _is_head(n) or (ADAPTER not in n and learns_with_adapters(n, lora, parts))]


def _is_head(name: str) -> bool:
    return not name.startswith("backbone.")
