"""One tree of frozen dataclasses: load, override, check, dump.

Every room owns its branch; a docstring under each field says what it means and in which unit.
Knows nothing of files beyond turning YAML text into the tree and back.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from pixrec.errors import ConfigError

Modalities = Literal["both", "text", "image"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    min_user_events: int = 1
    """Users with fewer events are left out (k-core, repeated until stable)."""
    min_item_events: int = 1
    """Items with fewer events are left out of the sequences (they stay in the catalog)."""
    min_rating: float | None = None
    """Events rated below this are left out; needs a rating column."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """How test and validation events are held out."""
    temporal_valid_fraction: float = 0.1
    """Share of events, by time, between the training period and the test period (temporal split)."""
    temporal_test_fraction: float = 0.1
    """Share of events, by time, in the test period (temporal split)."""
    image_size_px: int = 256
    """Pictures are stored once at no more than this on their longer side."""
    max_image_bytes: int = 20_000_000
    """A larger file is rejected unread."""
    max_image_pixels: int = 64_000_000
    """A picture that claims more pixels is rejected undecoded (decompression bombs)."""
    num_cpus_per_task: float = 1.0
    """CPUs a decoding task claims."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "min_user_events", "min_item_events", "image_size_px", "max_image_bytes", "max_image_pixels")
        _at_least(self, 0, "num_cpus_per_task")
        for name in ("temporal_valid_fraction", "temporal_test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"prepare.{name} is {getattr(self, name)}: must lie between 0 and 1")
        if self.temporal_valid_fraction + self.temporal_test_fraction >= 1:
            raise ConfigError("prepare.temporal_valid_fraction and temporal_test_fraction leave no training period")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Shape of `pixrec-tiny`, the embedded default: the SmolVLM class with random weights."""

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
        _at_least(self, 1, *(f.name for f in dataclasses.fields(self)))
        _multiple(self, "hidden_width", 2 * self.num_heads, "twice model.tiny.num_heads")  # rotary heads are even
        _multiple(self, "vision_width", 4, "the heads of the vision part")
        _multiple(self, "image_size_px", 2 * self.patch_size_px, "twice model.tiny.patch_size_px")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    enabled: bool = False
    """Train low-rank adapters in the backbone instead of all its weights."""
    rank: int = 8
    """Rank of each adapter."""
    alpha: int = 16
    """Scale numerator of the adapters."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Module names that receive an adapter; a name that matches nothing is an error."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank", "alpha")
        if not self.targets:
            raise ConfigError("model.lora.targets is empty: name at least one module")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    backbone: str = "pixrec-tiny"
    """`pixrec-tiny`, or a name or folder for `from_pretrained`."""
    user_tower: Literal["interleaved", "compact"] = "interleaved"
    """`interleaved` reads the history's pictures and text through the backbone; `compact` reads its item vectors."""
    user_pooling: Literal["mean", "separator"] = "separator"
    """Interleaved tower: mean over all history tokens (the paper's), or the state at the last separator."""
    modalities: Modalities = "both"
    """What the towers may see; anything but `both` is a knockout."""
    embedding_width: int = 128
    """Width D of the shared space."""
    max_history_items: int = 10
    """Older events of a history are not read."""
    max_text_tokens: int = 32
    """An item's text is cut to this many tokens."""
    compact_layers: int = 2
    """Layers of the compact tower."""
    compact_heads: int = 2
    """Attention heads of the compact tower."""
    compact_dropout: float = 0.1
    """Dropout inside the compact tower."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "embedding_width", "max_history_items", "max_text_tokens", "compact_layers", "compact_heads")
        _between(self, 0, 1, "compact_dropout")
        _multiple(self, "embedding_width", self.compact_heads, "model.compact_heads")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    learning_rate: float = 1e-3
    """Peak rate of AdamW; linear warm-up, cosine decay to a tenth."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay."""
    warmup_fraction: float = 0.1
    """Share of all steps spent warming up."""
    gradient_clip: float = 1.0
    """Upper bound of the gradient's norm."""
    epochs: int = 6
    """Passes over the training histories."""
    max_steps: int | None = None
    """Stops earlier, after this many optimisation steps."""
    histories_per_step: int = 16
    """Histories in one optimisation step, over all workers together."""
    num_workers: int = 2
    """Training processes."""
    cpus_per_worker: float = 0.5
    """CPUs Ray reserves for each worker; workers that claim all starve the rest."""
    threads_per_worker: int = 1
    """Torch threads in each worker."""
    use_gpu: bool = False
    """One GPU a worker, NCCL instead of gloo."""
    max_failures: int = 3
    """Worker failures survived before giving up."""
    alpha: float = 0.05
    """Weight of L_TT; the paper's is 0.125."""
    beta: float = 0.9
    """Weight of L_UT; the paper's is 0.025. L_NIG has the rest, 1 - alpha - beta."""
    temperature: float = 0.07
    """Initial temperature of both InfoNCE terms; the paper's is 0.5."""
    learnable_temperature: bool = True
    """Learn the temperature (bounded below by 0.01)."""
    logq_correction: bool = True
    """Subtract the log of each negative's chance of being in the batch (Yi et al., RecSys 2019)."""
    modality_dropout: float = 0.1
    """Chance that an item loses its picture, and as much again that it loses its text, in a training step."""
    knockouts: tuple[Literal["text", "image"], ...] = ()
    """Also train these single-modality models the same way with the same budget, stored inside the model."""
    validate_every_steps: int = 150
    """Steps between validations and checkpoints."""
    max_validation_users: int = 500
    """Users ranked in a validation during training."""
    seed: int = 0
    """Seed of weights, order and dropout."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "max_steps", "histories_per_step", "validate_every_steps", "max_validation_users")
        _at_least(self, 1, "threads_per_worker")
        _at_least(self, 0, "num_workers", "cpus_per_worker", "max_failures", "weight_decay", "seed")
        _above_zero(self, "learning_rate", "gradient_clip", "temperature")
        _between(self, 0, 1, "warmup_fraction")
        _between(self, 0, 0.5, "modality_dropout")
        if self.alpha + abs(self.beta) > 1 + 1e-9 or self.alpha < 0:
            raise ConfigError(
                f"train.alpha {self.alpha} and train.beta {self.beta} must leave L_NIG a weight of 0 or more"
            )
        if self.histories_per_step < self.num_workers:
            raise ConfigError(
                f"train.histories_per_step {self.histories_per_step} leaves some of train.num_workers "
                f"{self.num_workers} without a history"
            )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    batch_size: int = 128
    """Items in one forward pass."""
    num_actors: int = 1
    """Model actors in the pool."""
    cpus_per_actor: float = 0.5
    """CPUs Ray reserves for each actor."""
    threads_per_actor: int = 2
    """Torch threads in each actor."""
    gpus_per_actor: float = 0.0
    """GPUs Ray reserves for each actor."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored vectors."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "num_actors", "threads_per_actor")
        _at_least(self, 0, "cpus_per_actor", "gpus_per_actor")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    ks: tuple[int, ...] = (1, 5, 10, 50)
    """Cut-offs of recall and NDCG; 1 and 10 are always reported."""
    seen: Literal["allowed", "filtered"] = "allowed"
    """Whether items of the history may be recommended again, in `results`; the other way is reported beside it."""
    bootstrap_samples: int = 1000
    """Resamples of the users behind each 95 % interval."""
    batch_size: int = 64
    """Histories in one forward pass."""
    max_users: int | None = None
    """Evaluate on a seeded sample of the test users (None: all)."""
    report_histories: int = 8
    """Histories shown as pictures in the report."""
    seed: int = 0
    """Seed of the bootstrap and of the samples."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "bootstrap_samples", "batch_size", "max_users")
        _at_least(self, 0, "report_histories", "seed")
        if min(self.ks, default=1) < 1:
            raise ConfigError(f"evaluate.ks is {list(self.ks)}: every cut-off must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    api_key: str | None = None
    """When set, every /v1 route wants it in `Authorization: Bearer` or `X-API-Key`."""
    max_batch_size: int = 32
    """Histories encoded in one forward pass."""
    batch_wait_seconds: float = 0.005
    """How long a batch waits for company."""
    num_replicas: int = 1
    """Replicas of the model deployment."""
    cpus_per_replica: float = 0.5
    """CPUs Ray reserves for each model replica."""
    gpus_per_replica: float = 0.0
    """GPUs Ray reserves for each model replica."""
    threads_per_replica: int = 2
    """Torch threads in each model replica."""
    num_ingress_replicas: int = 1
    """Replicas of the HTTP deployment, which checks requests and holds no model."""
    cpus_per_ingress: float = 0.1
    """CPUs Ray reserves for each HTTP replica."""
    max_ongoing_requests: int = 256
    """Requests under way in a replica; must hold at least one full batch."""
    max_queued_requests: int = 512
    """Requests waiting beyond that; more are answered 503 with Retry-After."""
    retry_after_seconds: int = 1
    """What Retry-After says."""
    request_timeout_seconds: float = 30.0
    """A request the model has not answered by then is answered 503."""
    max_k: int = 200
    """Largest k a request may ask for."""
    max_request_items: int = 1000
    """Longest history, exclusion list or list of filter values a request may hold."""
    max_text_characters: int = 10_000
    """Longest text a search may hold."""
    max_body_bytes: int = 12_000_000
    """Largest request body."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_batch_size", "num_replicas", "max_ongoing_requests", "max_k", "max_request_items")
        _at_least(self, 1, "threads_per_replica", "num_ingress_replicas", "max_queued_requests", "retry_after_seconds")
        _at_least(self, 1, "max_text_characters", "max_body_bytes")
        _at_least(self, 0, "batch_wait_seconds", "cpus_per_replica", "gpus_per_replica", "cpus_per_ingress")
        _above_zero(self, "request_timeout_seconds")
        if self.max_ongoing_requests < self.max_batch_size:
            raise ConfigError(
                f"serve.max_ongoing_requests {self.max_ongoing_requests} is below serve.max_batch_size "
                f"{self.max_batch_size}: batches would never fill"
            )


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """The synthetic catalog and its shoppers."""

    num_items: int = 600
    """Products drawn."""
    num_users: int = 2500
    """Shoppers simulated."""
    min_events: int = 6
    """Shortest history."""
    max_events: int = 12
    """Longest history."""
    image_size_px: int = 128
    """Side of the drawn pictures."""
    seed: int = 7
    """Seed of products, shoppers and pictures."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_items", "num_users", "min_events", "image_size_px")
        _at_least(self, 0, "seed")
        if self.max_events < self.min_events:
            raise ConfigError(f"demo.max_events {self.max_events} is below demo.min_events {self.min_events}")


@dataclass(frozen=True, kw_only=True)
class Config:
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    demo: SyntheticConfig = field(default_factory=SyntheticConfig)


SECRET_KEYS = {"api_key"}


def load_config(text: str = "", overrides: typing.Sequence[str] = (), *, base: Config | None = None) -> Config:
    """Build the tree from YAML `text`, then apply `overrides`, each `section.key=value` with a YAML value.

    `base` supplies what neither names (default: the defaults above). Raises ConfigError on an unknown key,
    naming the nearest known one, and on a value of the wrong type.
    """
    try:
        tree = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the config file must hold a mapping of sections, not {type(tree).__name__}")
    config = _build(Config, tree, "", base or Config())
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {override!r} must look like section.key=value")
        try:
            parsed = yaml.safe_load(value) if value.strip() else None
        except yaml.YAMLError:
            parsed = value
        nested: Any = parsed
        for key in reversed(path.strip().split(".")):
            nested = {key: nested}
        config = _build(Config, nested, "", config)
    return config


def to_dict(node: Any, *, redact: bool = True) -> Any:
    """Plain nested dicts and lists, as `dump_config` writes them; secrets are replaced unless `redact` is off."""
    if not dataclasses.is_dataclass(node):
        return list(node) if isinstance(node, tuple) else node
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return {
        key: "***" if redact and key in SECRET_KEYS and value else to_dict(value, redact=redact)
        for key, value in values.items()
    }


def dump_config(config: Config) -> str:
    """YAML text of the resolved tree, secrets left out; `load_config` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


_SECTIONS = {"SyntheticConfig": "demo", "TinyConfig": "model.tiny", "LoraConfig": "model.lora"}


def _require(node: Any, names: typing.Iterable[str], fits: typing.Callable[[Any], bool], what: str) -> None:
    """Raise ConfigError unless the named fields fit; None, where a field may be it, always does."""
    for name in names:
        value = getattr(node, name)
        if value is not None and not fits(value):
            section = _SECTIONS.get(type(node).__name__) or type(node).__name__.removesuffix("Config").lower()
            raise ConfigError(f"{section}.{name} is {value}: must be {what}")


def _at_least(node: Any, least: int, *names: str) -> None:
    _require(node, names, lambda value: value >= least, f"at least {least}")


def _above_zero(node: Any, *names: str) -> None:
    _require(node, names, lambda value: value > 0, "above 0")


def _between(node: Any, low: float, high: float, *names: str) -> None:
    _require(node, names, lambda value: low <= value <= high, f"between {low} and {high}")


def _multiple(node: Any, name: str, of: int, what: str) -> None:
    _require(node, [name], lambda value: value % of == 0, f"a multiple of {of} ({what})")


def _build(cls: type, tree: dict[str, Any], where: str, base: Any) -> Any:
    hints = typing.get_type_hints(cls)
    changes = {}
    for key, value in tree.items():
        path = f"{where}{key}"
        if key not in hints:
            raise ConfigError(f"unknown config key {path!r}{_suggest(str(key), where)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(f"config key {path!r} is a section; give its keys, not {value!r}")
            changes[key] = _build(typing.cast(type, hint), value, f"{path}.", getattr(base, key))
        else:
            changes[key] = _coerce(value, hint, path)
    return dataclasses.replace(base, **changes)


def _suggest(key: str, where: str) -> str:
    here = {child: f"{where}{child}" for child in _children(where)}
    anywhere = {path.rsplit(".", 1)[-1]: path for path in _paths(Config, "")}
    for names, likeness in ((here, 0.6), (anywhere, 0.8)):
        if close := difflib.get_close_matches(key, names, n=1, cutoff=likeness):
            return f"; did you mean {names[close[0]]!r}?"
    return f"; known here: {', '.join(here)}"


def _paths(cls: type, where: str) -> typing.Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _paths(typing.cast(type, hint), f"{where}{name}.")
        else:
            yield f"{where}{name}"


def _children(where: str) -> list[str]:
    return list(dict.fromkeys(p[len(where) :].split(".")[0] for p in _paths(Config, "") if p.startswith(where)))


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type, without guessing: an int may stand for a float, a list for a tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), path)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"config key {path!r} is {value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"config key {path!r} is {value!r}: must be a list, such as [a, b]")
        return tuple(_coerce(v, args[0], path) for v in value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 (no dot) as text
        except (ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            raise ConfigError(f"config key {path!r} is {value!r}: must be a number")
        return number
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        raise ConfigError(f"config key {path!r} is {value!r}: must be of type {hint.__name__}")
    return value
