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
    """Pictures are stored once at no more than this on their longer side; no less than the model's own size."""
    max_image_bytes: int = 20_000_000
    """A larger file is rejected unread."""
    max_image_pixels: int = 64_000_000
    """A picture that claims more pixels is rejected undecoded (decompression bombs)."""
    num_cpus_per_task: float = 1.0
    """CPUs a decoding task claims."""
    fetch_concurrency: int = 32
    """Pictures a task fetches at the same time, from files, s3:// and http(s)://."""
    fetch_timeout_seconds: float = 20.0
    """Time for one attempt at an http(s):// picture, name lookup, redirects and body together."""
    fetch_retries: int = 3
    """Further attempts after one that failed in a way that may pass (no answer, HTTP 408, 425, 429, 5xx)."""
    fetch_backoff_seconds: float = 0.5
    """Longest wait before the second attempt; doubles from one to the next, the wait itself is random."""
    fetch_cache: str | None = "auto"
    """Folder, local or s3://, that keeps downloaded pictures, so that a rerun asks only for what is new. `auto`: the
    place of --out with `.pictures` behind its name. None: keep none."""
    allow_private_addresses: bool = False
    """Fetch pictures also from loopback, private and link-local addresses, which are refused otherwise."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "min_user_events", "min_item_events", "image_size_px", "max_image_bytes", "max_image_pixels")
        _at_least(self, 1, "fetch_concurrency")
        _at_least(self, 0, "num_cpus_per_task", "fetch_retries", "fetch_backoff_seconds")
        _above_zero(self, "fetch_timeout_seconds")
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
    base: Literal["as_is", "nf4"] = "as_is"
    """`nf4` holds the backbone's own weights in 4 bits (QLoRA, Dettmers et al. 2023); needs bitsandbytes and a GPU."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "rank", "alpha")
        if not self.targets:
            raise ConfigError("model.lora.targets is empty: name at least one module")


@dataclass(frozen=True, kw_only=True)
class CompactConfig:
    """Shape of the compact user tower: a causal transformer over item vectors."""

    max_history_items: int = 200
    """Older events of a history are not read."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 2
    """Attention heads."""
    feed_forward_multiple: int = 4
    """Width of the feed-forward layers, in widths of the tower."""
    dropout: float = 0.2
    """Dropout of inputs and residual branches."""
    identity: bool = True
    """Add a learned vector for each item of the training histories to the vector of its content."""
    identity_dropout: float = 0.1
    """Chance that an item is read and ranked by its content alone in a training step."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_history_items", "layers", "heads", "feed_forward_multiple")
        _between(self, 0, 1, "dropout", "identity_dropout")


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
    """Older events of a history are not read by the interleaved tower; model.compact has its own."""
    max_text_tokens: int = 32
    """An item's text is cut to this many tokens."""
    freeze_vision: bool = False
    """Leave the vision part and its projection as they are; their output can then be computed once for each item."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    compact: CompactConfig = field(default_factory=CompactConfig)

    def __post_init__(self) -> None:
        _at_least(self, 1, "embedding_width", "max_history_items", "max_text_tokens")
        _multiple(self, "embedding_width", self.compact.heads, "model.compact.heads")
        if self.lora.base == "nf4" and not (self.lora.enabled and self.backbone != "pixrec-tiny"):
            raise ConfigError("model.lora.base nf4 needs model.lora.enabled and a pretrained model.backbone")


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """How a compact tower learns to name the next item from item vectors."""

    loss: Literal["full", "sampled", "gbce"] = "full"
    """Softmax over the whole catalog, over sampled negatives, or gBCE of gSASRec over sampled negatives."""
    negatives: int = 256
    """Items sampled uniformly for each step (`sampled`, `gbce`)."""
    calibration: float = 0.75
    """t of gBCE: 0 is plain binary cross-entropy, 1 gives calibrated probabilities."""
    learning_rate: float = 1e-3
    """Rate of AdamW after a linear warm-up."""
    warmup_steps: int = 100
    """Steps spent warming up."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    histories_per_step: int = 128
    """Histories in one optimisation step, over all workers together."""
    epochs: int = 100
    """At most so many passes over the training histories."""
    validate_every_epochs: int = 3
    """Passes between validations and checkpoints."""
    patience: int = 5
    """Validations without a better NDCG@10 before training stops; the best weights are kept."""
    max_validation_users: int = 5000
    """Users ranked in a validation."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` does the matrix products in that type: faster where the processor has instructions for it."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "negatives", "histories_per_step", "epochs", "validate_every_epochs", "patience")
        _at_least(self, 1, "max_validation_users")
        _at_least(self, 0, "warmup_steps", "weight_decay")
        _between(self, 0, 1, "calibration")
        _above_zero(self, "learning_rate")


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
    bucket_steps: int = 1
    """Steps whose histories are drawn together and sorted by length, so that those of a step are of like length and
    little is padding. 1: drawn at random, whatever their length."""
    micro_batch_histories: int | None = None
    """Histories of one worker that are in memory at a time; loss and gradients stay those of the whole batch
    (GradCache, Gao et al. 2021, at the price of a second forward pass). None: all of them."""
    gradient_accumulation: int = 1
    """Passes that a step's histories are split into; each contrasts within itself only."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` runs the towers under autocast; weights, losses and optimiser stay float32."""
    activation_checkpointing: bool = False
    """Compute the backbone's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile on the language model."""
    picture_tokens: str | None = "auto"
    """With `model.freeze_vision`: the folder, local or s3://, that keeps what the vision part made of each picture, so
    that it works once for each. `auto`: the place of --data with `.tokens` behind its name. None: encode at every
    step."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """Whole copies of the weights on every worker, or shards of weights, gradients and optimiser state."""
    num_workers: int = 2
    """Training processes."""
    max_workers: int | None = None
    """With this, as many processes as the cluster has room for, from `num_workers` up to this many; the run goes on
    from its last checkpoint when their number changes. None: always `num_workers`."""
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
    """Weight of L_UT; the paper's is 0.025. L_NIG has the rest, 1 - alpha - |beta|. Below 0 it pushes users away from
    their targets, as the paper's reference code does."""
    symmetric: bool = False
    """Average both InfoNCE terms with their other direction: each target against all users of the batch."""
    negatives: Literal["global", "local"] = "global"
    """Whose items are negatives: those of all workers, with gradients, or each worker's own."""
    extra_negatives: int = 0
    """Items drawn uniformly from the catalog at every step as further negatives. Their vectors come from a table that
    is computed before the first step and at every validation, so they are up to `validate_every_steps` old and get no
    gradient."""
    mask_history: bool = False
    """Items of the shopper's own history are never negatives."""
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
    compact: SequenceConfig = field(default_factory=SequenceConfig)
    validate_every_steps: int = 150
    """Steps between validations and checkpoints."""
    max_validation_users: int = 500
    """Users ranked in a validation during training."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Further places that get every logged figure, besides TensorBoard and `training.jsonl`. Each needs its extra,
    `pip install 'pixrec[mlflow]'`, and takes its address and credentials from its own environment variables."""
    validate_modalities: bool = True
    """Also validate with the pictures removed and with the text removed, where the model sees both."""
    seed: int = 0
    """Seed of weights, order and dropout."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "epochs", "max_steps", "histories_per_step", "validate_every_steps", "max_validation_users")
        _at_least(self, 1, "threads_per_worker", "micro_batch_histories", "gradient_accumulation", "bucket_steps")
        _at_least(self, 0, "extra_negatives")
        _at_least(self, 0, "num_workers", "cpus_per_worker", "max_failures", "weight_decay", "seed")
        _above_zero(self, "learning_rate", "gradient_clip", "temperature")
        _between(self, 0, 1, "warmup_fraction")
        _between(self, 0, 0.5, "modality_dropout")
        if self.alpha + abs(self.beta) > 1 + 1e-9 or self.alpha < 0:
            raise ConfigError(
                f"train.alpha {self.alpha} and train.beta {self.beta} must leave L_NIG a weight of 0 or more"
            )
        contrasted = self.histories_per_step // self.gradient_accumulation
        if self.negatives == "local":
            contrasted //= max(1, self.num_workers)
        if contrasted < 2 and (self.alpha or self.beta) and not self.extra_negatives:
            raise ConfigError(
                f"train.histories_per_step {self.histories_per_step} leaves one history to contrast at a time, so no "
                "item of another shopper is a negative; raise it, set train.extra_negatives, or set train.alpha and "
                "train.beta to 0"
            )
        most = max(self.num_workers, self.max_workers or 0)
        if self.max_workers is not None and not 1 <= self.num_workers <= self.max_workers:
            raise ConfigError(f"train.max_workers {self.max_workers} is below train.num_workers {self.num_workers}")
        if self.histories_per_step < most * self.gradient_accumulation:
            raise ConfigError(
                f"train.histories_per_step {self.histories_per_step} leaves some of train.num_workers "
                f"{most} without a history in one of {self.gradient_accumulation} passes"
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
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type of the stored vectors; int8 has a scale for each vector."""
    cpus_per_decode: float = 0.5
    """CPUs Ray reserves for each task that reads and decodes items."""
    max_part_items: int = 1024
    """Items whose vectors are stored at a time: what a killed run loses of each actor's work."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "num_actors", "threads_per_actor", "max_part_items")
        _at_least(self, 0, "cpus_per_actor", "gpus_per_actor", "cpus_per_decode")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    ks: tuple[int, ...] = (1, 5, 10, 50)
    """Cut-offs of the metrics; 1 and 10 are always reported."""
    seen: Literal["allowed", "filtered"] = "allowed"
    """Whether items of the history may be recommended again, in `results`; the other way is reported beside it."""
    scorers: tuple[str, ...] = ("popularity", "recent_popularity", "repeat_last", "item_transition")
    """What stands beside the model and its knockouts. Also: sasrec, sasrec_full, sasrec_sampled, sasrec_gbce (trained
    on the spot), content_linear, generative_bm25, rrf, round_robin (both of `fused`), and inference-time knockouts:
    pixrec_image_constant (one grey picture for all items), pixrec_image_noise (a picture of noise for each),
    pixrec_text_constant (one text for all), pixrec_text_noise (another item's text)."""
    fused: tuple[str, ...] = ("pixrec", "item_transition")
    """The scorers that `rrf` and `round_robin` merge."""
    recent_share: float = 0.05
    """The last share of the training events, by time, that `recent_popularity` counts."""
    transition_steps: int = 2
    """Steps over the graph of item transitions; 1 is what followed directly."""
    transition_damping: float = 0.3
    """Weight of each further step, in weights of the one before."""
    generate_beams: int = 4
    """Texts that `generative_bm25` generates for a user."""
    generate_tokens: int = 24
    """Longest text it generates."""
    bootstrap_samples: int = 1000
    """Resamples of the users behind each 95 % interval, and random signs behind each p-value."""
    batch_size: int = 64
    """Histories in one forward pass; fewer where the catalog is so large that their scores would not fit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run and scores are ranked; `auto` takes a GPU where there is one."""
    num_actors: int = 0
    """Actors of Ray that share the users between them; 0 ranks in this process."""
    cpus_per_actor: float = 1.0
    """CPUs Ray reserves for each actor."""
    gpus_per_actor: float = 0.0
    """GPUs Ray reserves for each actor."""
    max_users: int | None = None
    """Evaluate on a seeded sample of the test users (None: all)."""
    report_histories: int = 8
    """Histories drawn at random that the report shows as pictures."""
    report_cases: int = 4
    """Histories in each of the report's grids: best, worst, cold, and what text alone gets wrong."""
    seed: int = 0
    """Seed of the bootstrap and of the samples."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "bootstrap_samples", "batch_size", "max_users", "transition_steps")
        _at_least(self, 1, "generate_beams", "generate_tokens")
        _at_least(self, 0, "report_histories", "report_cases", "seed", "num_actors", "cpus_per_actor", "gpus_per_actor")
        _between(self, 0, 1, "transition_damping")
        if not 0 < self.recent_share <= 1:
            raise ConfigError(f"evaluate.recent_share is {self.recent_share}: must lie above 0 and not above 1")
        if len(set(self.fused)) < 2:
            raise ConfigError(f"evaluate.fused is {list(self.fused)}: name two different scorers or more")
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
    max_new_items: int = 20
    """Most items a request may bring that the catalog lacks."""
    max_text_characters: int = 10_000
    """Longest text a search may hold."""
    max_body_bytes: int = 12_000_000
    """Largest request body."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_batch_size", "num_replicas", "max_ongoing_requests", "max_k", "max_request_items")
        _at_least(self, 1, "threads_per_replica", "num_ingress_replicas", "max_queued_requests", "retry_after_seconds")
        _at_least(self, 1, "max_text_characters", "max_body_bytes", "max_new_items")
        _at_least(self, 0, "batch_wait_seconds", "cpus_per_replica", "gpus_per_replica", "cpus_per_ingress")
        _above_zero(self, "request_timeout_seconds")
        if self.max_ongoing_requests < self.max_batch_size:
            raise ConfigError(
                f"serve.max_ongoing_requests {self.max_ongoing_requests} is below serve.max_batch_size "
                f"{self.max_batch_size}: batches would never fill"
            )


@dataclass(frozen=True, kw_only=True)
class SasrecTowerConfig(CompactConfig):
    """Shape of SASRec; the settings of identities do not concern it."""

    max_history_items: int = 50
    """Older events of a history are not read."""
    layers: int = 1
    """Transformer layers."""
    heads: int = 1
    """Attention heads."""
    dropout: float = 0.5
    """Dropout of inputs and residual branches."""


@dataclass(frozen=True, kw_only=True)
class SasrecTrainingConfig(SequenceConfig):
    """How SASRec learns."""

    loss: Literal["full", "sampled", "gbce"] = "sampled"
    """As `train.compact.loss`; the scorers `sasrec_full`, `sasrec_sampled` and `sasrec_gbce` have their own."""


@dataclass(frozen=True, kw_only=True)
class SasrecConfig:
    """The baseline SASRec (Kang & McAuley 2018), which `evaluate.scorers` can name: the compact tower on learned
    vectors alone. Defaults are those published as strong on the Amazon sets."""

    width: int = 64
    """Width of its vectors."""
    tower: SasrecTowerConfig = field(default_factory=SasrecTowerConfig)
    training: SasrecTrainingConfig = field(default_factory=SasrecTrainingConfig)
    refit: bool = False
    """Once validation has told the number of epochs, train anew for as many on the validation events too. More events
    than the towers see: for comparison with tables made that way, not with the towers."""
    seed: int = 0
    """Seed of weights, order and dropout."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "width")
        _multiple(self, "width", self.tower.heads, "sasrec.tower.heads")


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
    sasrec: SasrecConfig = field(default_factory=SasrecConfig)
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


_SECTIONS = {
    "SyntheticConfig": "demo",
    "TinyConfig": "model.tiny",
    "LoraConfig": "model.lora",
    "CompactConfig": "model.compact",
    "SequenceConfig": "train.compact",
    "SasrecTowerConfig": "sasrec.tower",
    "SasrecTrainingConfig": "sasrec.training",
}


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
    deepest_first = sorted(_paths(Config, ""), key=lambda path: -path.count("."))
    anywhere = {path.rsplit(".", 1)[-1]: path for path in deepest_first}  # of equal names the least deep one stays
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
