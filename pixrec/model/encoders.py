"""An item tower of two pretrained encoders, one for text and one for pictures. They stand still, until `tune`.

CLIP (Radford et al., ICML 2021) and SigLIP (Zhai et al., ICCV 2023) are such a pair under one name; otherwise a
sentence encoder reads the text and any image encoder the pictures. An item's vector is what the two say of it, each
reduced to its principal components. The compact tower has a projection into the shared space on top, which is trained.

Tuned encoders stay in evaluation mode: without dropout, and with the running statistics of their pretraining. The
principal components stay those of the pretrained vectors too, so that the projection above them goes on to fit.

Plain torch and transformers: knows neither files nor workers. To the item encoder and to the store of picture tokens
the pair looks like any backbone: a picture is one token, the image encoder's vector of it.

Shapes: U items · T tokens · P pictures · X numbers of a picture's vector · W of a text's vector · S side in pixels
· R principal components of each of the two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import cached_file

from pixrec.config import LoraConfig, ModelConfig
from pixrec.data.pictures import picture_hash
from pixrec.data.tokens import PictureTokens
from pixrec.errors import ConfigError
from pixrec.model.backbone import ADAPTER, Backbone, lora_settings
from pixrec.model.efficientnet import EFFICIENTNET_LITE, EfficientNetLite
from pixrec.model.encoding import Items
from pixrec.model.families import Family
from pixrec.model.seeding import seeded
from pixrec.model.towers import DualTower, length_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["text", "image"]
WHITENING = 0.25
"""Power of the inverse variance that a principal component is scaled by: 0 leaves it, 1 whitens."""
RIDGE = 1e-3
"""Added to each component's variance before, as a share of the largest."""
_OTHER_PART: dict[Part, tuple[str, ...]] = {"text": ("vision", "visual"), "image": ("text",)}
"""What begins, in a model that reads both, the names of all that does not read this part of an item."""


class EncoderFamily(Family):
    """How an image encoder is used, in the terms of a family."""

    tokens_per_picture = 1

    def __init__(self, image: nn.Module | None, image_size_px: int, pad_id: int) -> None:
        self._image_size_px, self._pad_id = image_size_px, pad_id
        blank = torch.zeros(1, 3, image_size_px, image_size_px)
        with torch.no_grad():
            self._width = 0 if image is None else self.encode_pictures(image, blank).shape[-1]

    @property
    def image_token_id(self) -> int:
        return self._pad_id  # which no text encoder looks at

    @property
    def image_size_px(self) -> int:
        return self._image_size_px

    @property
    def picture_width(self) -> int:
        return int(self._width)

    @property
    def vision_settings(self) -> tuple[object, ...]:
        return (self._width,)

    def vision_parameters(self, model: Any) -> list[Any]:
        """All weights of the image encoder, running statistics too."""
        return list(weights_of(model, "image").values())

    def token_parameters(self, model: Any) -> list[Any]:
        return self.vision_parameters(model)

    def encode_pictures(self, model: Any, pixels: Tensor, grid: Tensor | None = None) -> Tensor:
        """Normalised pixels (P, 3, S, S) to the pictures' vectors (P, 1, X)."""
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixel_values=pixels).pooler_output
        elif isinstance(model, EfficientNetLite):
            found = model(pixels)
        else:  # the mean over patches: a pooler is often not among the weights
            found = model(pixel_values=pixels).last_hidden_state.mean(1)
        return found.unsqueeze(1)


class DualEncoder(Backbone):
    """A text encoder and an image encoder; one module where both are one model. Has no language model.

    Without both of them nothing is read of an item, and its vector has no numbers: the compact tower then knows items
    by their learned vectors alone, as SASRec does.
    """

    tuned: frozenset[str] = frozenset()
    """Names of the parameters that learn or have learned, since `tune`; those of a module that is both stand once."""

    def __init__(
        self, text: Any, image: Any, image_size_px: int, mean: list[float], std: list[float], pad_id: int
    ) -> None:
        nn.Module.__init__(self)
        self.text, self.model, self.pad_id = text, image, pad_id
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        self.family = EncoderFamily(image, image_size_px, pad_id)
        self.text_width = 0
        if text is not None:
            with torch.no_grad():
                self.text_width = self.texts(torch.full((1, 2), pad_id), torch.ones(1, 2, dtype=torch.bool)).shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def max_text_tokens(self) -> int:
        """The longest text that the text encoder was made for."""
        if self.text is None:
            return 1
        config = self.text.config
        return int(getattr(config, "text_config", config).max_position_embeddings)

    def train(self, mode: bool = True) -> DualEncoder:
        """No dropout, no new running statistics, whatever the mode."""
        return super().train(False)

    def tune(self, config: ModelConfig, seed: int) -> set[Part]:
        """Let the encoders learn from now on, where they do not yet: by adapters in their attention (`config.lora`,
        begun at `seed`), or with all weights. Returns which of them do.

        One whose part of an item is not looked at stays as it is, and so does a frozen image encoder, or one without
        attention where there are adapters. Raises ConfigError where nothing is left to learn.
        """
        lora = config.lora
        learns: dict[Part, bool] = {
            "text": config.modalities != "image" and not (lora.enabled and lora.targets == "vision"),
            "image": config.modalities != "text"
            and not config.freeze_vision
            and not (lora.enabled and lora.targets == "language"),
        }
        parts = [part for part in learns if learns[part]]
        if not parts:
            raise ConfigError(
                "train.joint finds nothing to learn in the encoders; change model.modalities, model.freeze_vision or "
                "model.lora, or set train.joint.epochs to 0"
            )
        if lora.enabled and not self.tuned:
            self._add_lora(lora, parts, seed)
        reads = {part: self._weights(part) for part in parts}
        if not self.tuned:
            may = set[str]().union(*reads.values())
            adapters = lora.enabled
            named = {n: p for n, p in self.named_parameters() if n in may and (ADAPTER in n or not adapters)}
            self.tuned = frozenset(named)
            for parameter in named.values():  # a fused optimiser takes weight and gradient as they lie in memory
                parameter.data = parameter.data.contiguous()
        return {part for part in parts if reads[part] & self.tuned}

    def _weights(self, part: Part) -> set[str]:
        """Names of the weights that read this part of an item."""
        module = self._encoder(part)
        prefix = "text" if module is self.text else "model"
        return {f"{prefix}.{name}" for name in weights_of(module, part)}

    def _encoder(self, part: Part) -> Any:
        return self.text if part == "text" else self.model

    def _add_lora(self, config: LoraConfig, parts: Sequence[Part], seed: int) -> None:
        """Insert adapters into the encoders of `parts`, each module once."""
        from peft import inject_adapter_in_model

        wanted: dict[nn.Module, list[str]] = {}
        for part in parts:
            module = self._encoder(part)
            wanted.setdefault(module, []).extend(_adapted(module, part, config))
        found = {name.rsplit(".", 1)[-1] for names in wanted.values() for name in names}
        where = " and ".join(dict.fromkeys(type(module).__name__ for module in wanted))
        for target in () if isinstance(config.targets, str) else config.targets:
            if target not in found:
                raise ConfigError(f"model.lora.targets names {target!r}, which matches no module of {where}")
        if not found:
            raise ConfigError(
                f"model.lora.targets {config.targets} finds no attention to adapt in {where}; choose other targets or "
                "another encoder, or train all weights with model.lora.enabled=false"
            )
        try:
            with seeded(seed):
                for module, names in wanted.items():
                    if names:
                        inject_adapter_in_model(lora_settings(config, names), module)
        except ValueError as error:
            raise ConfigError(f"model.lora.targets: {' '.join(str(error).split())[:200]}") from None
        self.requires_grad_(False).eval()

    def texts(self, token_ids: Tensor, is_token: Tensor) -> Tensor:
        """Vectors (U, W) of texts (U, T), padded on the right; a sentence encoder's is the mean over its tokens."""
        if not hasattr(self.text, "get_text_features"):
            states = self.text(input_ids=token_ids, attention_mask=is_token.long()).last_hidden_state
            weight = is_token.unsqueeze(-1).to(states.dtype)
            return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        config = self.text.config
        if config.model_type.startswith("siglip"):  # was trained on texts of full length, padding not masked
            longest = config.text_config.max_position_embeddings
            token_ids = token_ids.masked_fill(~is_token, self.pad_id)
            token_ids = F.pad(token_ids, (0, longest - token_ids.shape[1]), value=self.pad_id)
            return self.text.get_text_features(input_ids=token_ids).pooler_output
        return self.text.get_text_features(input_ids=token_ids, attention_mask=is_token.long()).pooler_output

    def texts_of(self, texts: Sequence[Tensor]) -> Tensor:
        """As `texts`, of token ids (T,) each; those of like length together, so that little is padding."""
        if not texts:
            return self.pixel_mean.new_zeros(0, self.text_width)
        vectors: list[Tensor] = [texts[0]] * len(texts)
        for rows in length_groups(np.array([len(text) for text in texts])):
            padded = nn.utils.rnn.pad_sequence([texts[row] for row in rows], True, self.pad_id)
            lengths = torch.tensor([len(texts[row]) for row in rows], device=padded.device)
            made = self.texts(padded, torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(1))
            for row, vector in zip(rows, made, strict=True):
                vectors[row] = vector
        return torch.stack(vectors)


class Standardised(nn.Module):
    """The principal components of an encoder's vectors, centred, each scaled towards equal variance.

    Vectors of a pretrained encoder lie in a narrow cone, and a few directions hold most of the variance (Su et al.,
    arXiv 2103.15316).
    """

    mean: Tensor
    components: Tensor

    def __init__(self, width: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.zeros(width, components))

    def fit(self, vectors: Tensor) -> None:
        """Take the statistics of `vectors` (N, W)."""
        if len(vectors) < 2:
            return
        mean = vectors.double().mean(0)
        centred = vectors.double() - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(vectors))
        kept = min(self.components.shape[1], len(vectors) - 1, len(variances))
        variances, directions = variances.flip(0)[:kept].clamp(min=0), directions.flip(1)[:, :kept]
        ridge = RIDGE * variances[0].clamp(min=1e-12)
        scale = (variances + ridge) ** (-WHITENING / 2)
        scale = scale / (scale.square() * variances).mean().sqrt().clamp(min=1e-12)  # mean variance 1
        self.mean.copy_(mean)
        self.components.zero_()[:, :kept].copy_(directions * scale)

    def forward(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) @ self.components


class EncoderTower(DualTower):
    """The item tower of a `DualEncoder`. The user tower is the compact one, with the projection into the shared space.

    Until `fit` has seen the encoders' vectors of a catalog, an item's vector is these themselves (U, W + X).
    """

    backbone: DualEncoder
    unit = False
    fitted: Tensor

    def __init__(self, backbone: DualEncoder, config: ModelConfig, temperature: float) -> None:
        nn.Module.__init__(self)
        self.backbone, self.compact = backbone, None
        self.widths = (backbone.text_width, backbone.family.picture_width)
        self.standardised = nn.ModuleList(Standardised(width, config.content_width // 2) for width in self.widths)
        self.register_buffer("fitted", torch.tensor(False))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=False)
        self.stored_texts: PictureTokens | None = None
        """Where vectors of texts are looked up before they are made."""

    def item_vectors(self, items: Items, pictures: Tensor | None = None) -> Tensor:
        """Vectors (U, 2·R): the components of the text, then those of the picture, zeros for what an item has not."""
        raw = self._encoded(items)
        return self._standardise(raw) if self.fitted else raw

    def search_vectors(self, content: Tensor) -> Tensor:
        """Both parts of an item's vector (U, 2·R) as unit vectors, which no purchase has shaped unless by tuning the
        encoders: their product with a query's is the sum of the cosines of text and picture."""
        return torch.cat([F.normalize(part, dim=-1) for part in content.chunk(2, dim=1)], dim=1)

    def fit(self, raw: Tensor) -> Tensor:
        """Take the statistics of items' vectors (N, W + X), made before; returns what they become, (N, 2·R)."""
        for part, standardised in zip(raw.split(self.widths, dim=1), self.standardised, strict=True):
            cast(Standardised, standardised).fit(part[part.any(1)])
        self.fitted.fill_(True)
        return self._standardise(raw)

    def _standardise(self, raw: Tensor) -> Tensor:
        parts = zip(raw.split(self.widths, dim=1), self.standardised, strict=True)
        return torch.cat([standardised(part) * part.any(1, keepdim=True) for part, standardised in parts], dim=1)

    def _encoded(self, items: Items) -> Tensor:
        """(U, W + X): unit vectors of text and picture, zeros for what an item has not."""
        device = items.token_ids.device
        found = [torch.zeros(len(items), width, device=device) for width in self.widths]
        with_text = items.is_text.any(1)
        if self.widths[0] and with_text.any():
            lengths = items.is_text[with_text].sum(1).tolist()
            texts = [ids[:length] for ids, length in zip(items.token_ids[with_text], lengths, strict=True)]
            found[0][with_text] = F.normalize(self._texts(texts), dim=-1)
        slot = items.picture_slot.max(1).values
        if self.widths[1] and (slot >= 0).any():
            made = self.backbone.picture_tokens(items.pixels, items.grid) if len(items.pixels) else None
            parts = [part.to(device).float() for part in (made, items.ready) if part is not None and len(part)]
            pictures = torch.cat(parts)[:, 0]
            found[1][slot >= 0] = F.normalize(pictures[slot[slot >= 0]], dim=-1)
        return torch.cat(found, dim=1)

    def _texts(self, texts: Sequence[Tensor]) -> Tensor:
        """Vectors (U, W) of texts by their tokens (T,): as they are stored, or made."""
        stored: Sequence[np.ndarray | None] = [None] * len(texts)
        if self.stored_texts is not None:
            stored = self.stored_texts.of_hashes([text_key(text.cpu().numpy()) for text in texts])
        vectors = torch.empty(len(texts), self.widths[0], device=self.fitted.device)
        new = [row for row, vector in enumerate(stored) if vector is None]
        vectors[new] = self.backbone.texts_of([texts[row] for row in new]).float()
        for row, vector in enumerate(stored):
            if vector is not None:
                vectors[row] = torch.from_numpy(vector[0].astype(np.float32))
        return vectors


def weights_of(model: nn.Module, part: Part) -> dict[str, Tensor]:
    """All that the vectors of texts, or of pictures, follow from in an encoder, by name; of one that reads both, what
    is not named after the other part."""
    return {name: tensor for name, tensor in model.state_dict().items() if _reads(model, name, part)}


def _reads(model: nn.Module, name: str, part: Part) -> bool:
    both = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
    return not (both and name.startswith(_OTHER_PART[part]))


def _adapted(model: nn.Module, part: Part, config: LoraConfig) -> list[str]:
    """Names of the layers of an encoder that receive adapters: projections of its attention, or those named."""
    modules = [(name, module) for name, module in model.named_modules() if _reads(model, name, part)]
    if not isinstance(config.targets, str):
        return [name for name, _ in modules if name.rsplit(".", 1)[-1] in config.targets]
    # The projection of a torch.nn.MultiheadAttention, as SigLIP pools with, has a type of its own: it is never called.
    return [name for name, module in modules if type(module) is nn.Linear and "att" in name.lower()]


def text_key(token_ids: np.ndarray) -> bytes:
    """What the vector of a text of these tokens (T,) is stored under."""
    return picture_hash(token_ids.astype(np.int64).tobytes())


def load_encoders(
    text: str, image: str, tokenizer: PreTrainedTokenizerBase, statistics: tuple[list[float], list[float]]
) -> DualEncoder:
    """Both encoders, from the hub or a local folder; safetensors only."""
    pad = tokenizer.pad_token_id
    text_model = _load(text)
    image_model = text_model if image == text else _load(image)
    return DualEncoder(text_model, image_model, _image_size(image), *statistics, 0 if pad is None else int(pad))


def _load(place: str) -> nn.Module:
    facts = _facts(place)
    if facts.get("model_type") != EFFICIENTNET_LITE:
        with seeded(0):  # what the files lack (a pooler that is not used) is the same every time
            return transformers.AutoModel.from_pretrained(place, use_safetensors=True, trust_remote_code=False)
    network = EfficientNetLite(facts["name"])
    network.network.load_state_dict(safetensors.torch.load_file(Path(place) / "model.safetensors"))
    return network


def _image_size(place: str) -> int:
    facts = _facts(place)
    size = facts.get("vision_config", facts).get("image_size")
    if size is None:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        size = getattr(config, "vision_config", config).image_size
    return int(size if isinstance(size, int) else size[0])


def _facts(place: str) -> dict[str, Any]:
    return dict(json.loads(Path(cached_file(place, "config.json")).read_text()))
