"""Settings of `pixrec train`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from pixrec.config.checks import above_zero, at_least, between
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """How a compact tower is trained to predict the next item from the item vectors of the history."""

    loss: Literal["full", "sampled", "gbce"] = "full"
    """Softmax over the whole catalog, over sampled negatives, or gBCE of gSASRec over sampled negatives."""
    negatives: int = 256
    """Negatives drawn uniformly: shared by a step (`sampled`), or drawn for each of its histories (`gbce`)."""
    calibration: float = 0.75
    """t of gBCE: 0 is plain binary cross-entropy, 1 gives calibrated probabilities."""
    learning_rate: float = 1e-3
    """Rate of AdamW after a linear warm-up."""
    content_learning_rate: float | None = None
    """Rate of the projection of content beside learned ids; None, or without ids: `learning_rate`. Content vectors are
    long, so a step moves all items at once and far: at the full rate content is learned before the ids are, which suits
    rare items; where items have many events it keeps the ids from settling."""
    id_optimizer: Literal["auto", "adamw", "rowwise_adagrad"] = "auto"
    """What moves the learned id vectors. `adamw` moves all of them at every step and keeps 12 bytes for each number;
    `rowwise_adagrad` moves those that a step reads and keeps 4 bytes for each item. `auto`: the latter for 200,000
    items and more."""
    id_learning_rate: float = 0.03
    """Rate of `rowwise_adagrad` after the warm-up."""
    warmup_steps: int = 100
    """Steps spent warming up."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    histories_per_step: int = 128
    """Histories in one optimisation step, over all workers together."""
    epochs: int = 100
    """Most passes over the training histories."""
    max_steps: int | None = None
    """Stop after this many optimisation steps, if the epochs have not ended before."""
    validate_every_epochs: int = 3
    """Passes between validations and checkpoints."""
    validate_every_steps: int | None = None
    """Further validations and checkpoints within an epoch, where epochs are long."""
    patience: int = 5
    """Validations without a better NDCG@10 before training stops; the best weights are kept."""
    max_validation_users: int = 5000
    """Users ranked in a validation."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` does the matrix products in that type: faster where the processor has instructions for it."""
    averaging: float = 0.995
    """Decay per step of the moving average of the weights, which is validated and kept; 0 keeps the last weights."""

    def __post_init__(self) -> None:
        at_least(self, 1, "negatives", "histories_per_step", "epochs", "validate_every_epochs", "patience")
        at_least(self, 1, "max_validation_users", "max_steps", "validate_every_steps")
        at_least(self, 0, "warmup_steps", "weight_decay")
        between(self, 0, 1, "calibration", "averaging")
        above_zero(self, "learning_rate", "content_learning_rate", "id_learning_rate")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of training that comes before the one on --data. A field that is left out is as in `train`."""

    name: str = ""
    """Name of the stage in the log and of its checkpoints: a-z, 0-9, - and _, at most 40 characters."""
    data: tuple[str, ...] = ()
    """Prepared data sets, folders or s3://, whose catalogs and training histories are joined. Empty: that of --data."""
    epochs: int | None = None
    """As `train.epochs`, over the joined histories."""
    max_steps: int | None = None
    """As `train.max_steps`."""
    histories_per_step: int | None = None
    """As `train.histories_per_step`."""
    learning_rate: float | None = None
    """As `train.learning_rate`; every stage has its own warm-up and decay."""
    warmup_fraction: float | None = None
    """As `train.warmup_fraction`."""
    alpha: float | None = None
    """As `train.alpha`."""
    beta: float | None = None
    """As `train.beta`."""
    modality_dropout: float | None = None
    """As `train.modality_dropout`."""
    validate_every_steps: int | None = None
    """As `train.validate_every_steps`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", self.name):
            raise ConfigError(
                f"train.stages: the name {self.name!r} of a stage must be of a-z, 0-9, - and _, begin with a letter or "
                "digit and have at most 40 characters"
            )
        if self.name in ("compact", "compact_joint"):
            raise ConfigError(
                f"train.stages: {self.name} is what the log calls a part of the compact tower's training; name the "
                "stage otherwise"
            )
        places = [uri.rstrip("/") for uri in self.data]
        if not all(places) or len(set(places)) < len(places):
            raise ConfigError(f"train.stages {self.name}: data is {list(self.data)}: name each data set once")


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """How the compact tower and the item tower are trained together, after the compact tower on fixed item vectors.

    The item tower is a backbone with its head, or a pair of encoders: adapters in them where `model.lora` is enabled,
    else all weights, but for what `model.freeze_vision` and `model.modalities` leave out. Loss, batches and weight
    decay are those of train.compact.
    """

    epochs: int = 0
    """Most passes over the training histories; 0: no joint training, the item tower stays as it is."""
    learning_rate: float = 1e-4
    """Rate of the compact tower after a linear warm-up."""
    item_learning_rate: float | None = None
    """Rate of the item tower after a linear warm-up. None: 1e-4, of encoders 2e-4 for adapters and 2e-5 for all
    weights."""
    warmup_steps: int = 50
    """Steps spent warming up."""
    fresh_items_per_step: int = 256
    """Items of a step's histories, over all workers together, that the item tower encodes again, with gradient; drawn
    at random where there are more. The vectors of all others come from a table, without gradient."""
    micro_batch_items: int = 64
    """Items of one worker that are in memory at a time; loss and gradients stay those of all (GradCache, Gao et al.
    2021)."""
    refresh_every_steps: int = 200
    """Steps after which the whole table of item vectors is computed anew; before every validation it is anyway."""
    validate_every_epochs: int = 1
    """Passes between validations and checkpoints."""
    patience: int = 3
    """Validations without a better NDCG@10 before training stops; the best weights are kept, those before the first
    step among them."""

    def __post_init__(self) -> None:
        at_least(self, 0, "epochs", "warmup_steps")
        at_least(self, 1, "fresh_items_per_step", "micro_batch_items", "refresh_every_steps")
        at_least(self, 1, "validate_every_epochs", "patience")
        above_zero(self, "learning_rate", "item_learning_rate")


@dataclass(frozen=True, kw_only=True)
class RatesConfig:
    """Peak rates of the parts of a backbone. A part that is left out has `train.learning_rate` in `pixrec-tiny`, whose
    weights begin at random, and in a pretrained backbone what such models are usually fine-tuned with."""

    backbone: float | None = None
    """Language model, where it is trained whole; pretrained 1e-5."""
    adapters: float | None = None
    """Adapters of `model.lora`; on a pretrained backbone 2e-4."""
    vision: float | None = None
    """Vision part, where it is trained whole; pretrained 2e-6."""
    connector: float | None = None
    """What makes the vision part's output picture tokens; pretrained 1e-5."""

    def __post_init__(self) -> None:
        above_zero(self, *(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    learning_rate: float = 1e-3
    """Peak rate of AdamW for the heads and all of `pixrec-tiny`; linear warm-up, cosine decay to a tenth."""
    rates: RatesConfig = field(default_factory=RatesConfig)
    weight_decay: float = 0.01
    """AdamW's decoupled decay of matrices; norms, biases, the temperature and pretrained embeddings have none."""
    warmup_fraction: float = 0.1
    """Share of all steps spent warming up."""
    gradient_clip: float = 1.0
    """Upper bound of the gradient's norm."""
    epochs: int = 6
    """Passes over the training histories."""
    max_steps: int | None = None
    """Stop after this many optimisation steps, if the epochs have not ended before."""
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
    """torch.compile on each layer of the language model and of the vision encoder: a minute or more at the start."""
    picture_tokens: str | None = "auto"
    """With `model.freeze_vision` or encoders that stand still: the folder, local or s3://, that keeps what these made
    of each picture and text, so that each is encoded once. `auto`: the place of --data with `.tokens` appended. None:
    encode every time."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: a whole copy of the weights on every worker; `fsdp2`: shards of weights, gradients and optimiser state."""
    num_workers: int = 2
    """Training processes."""
    max_workers: int | None = None
    """With this, as many processes as the cluster has room for, from `num_workers` up to this many; the run goes on
    from its last checkpoint when their number changes. None: always `num_workers`."""
    cpus_per_worker: float = 0.5
    """CPUs Ray reserves for each worker; where the workers take them all, nothing else can run."""
    threads_per_worker: int = 1
    """Torch threads in each worker. While they wait they sleep, unless OMP_WAIT_POLICY in the environment is ACTIVE."""
    use_gpu: bool = False
    """One GPU a worker, NCCL instead of gloo."""
    gpu_wait_seconds: float = 600.0
    """How long a run waits for an autoscaler to add nodes where the cluster has too few GPUs for `num_workers`."""
    feed: Literal["auto", "local", "ray_data"] = "auto"
    """Who looks up, decodes and tokenises what the interleaved towers read: each worker itself (`local`), or CPU tasks
    of Ray Data on any node of the cluster. The batches are the same. `auto`: Ray Data, except on a single machine
    without a GPU."""
    reader_wait_seconds: float = 60.0
    """How long a worker waits for a reader of Ray Data, which may find no free CPU, before it reads for itself."""
    cpus_per_reader: float = 0.25
    """CPUs Ray reserves for each reader of Ray Data."""
    readers_per_worker: int | None = None
    """Most readers of Ray Data at work for one worker at a time. None: as many as there are CPUs for, up to 16; those
    that are not needed rest."""
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
    start: str | None = None
    """A model, folder or s3://, of the same `model` settings, whose weights training begins with; None: fresh ones.
    What its compact tower learned of an item goes on; an item that is new to it begins as its content alone."""
    stages: tuple[StageConfig, ...] = ()
    """What comes before the training on --data, in this order: each stage begins with the weights of the best
    checkpoint of the one before, with a fresh optimiser and schedule. Knockouts go through the same stages."""
    compact: SequenceConfig = field(default_factory=SequenceConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    validate_every_steps: int = 150
    """Steps between validations and checkpoints."""
    max_validation_users: int = 500
    """Users ranked in a validation during training."""
    validation_candidates: int = 20_000
    """Larger catalogs are validated on a sample: so many candidates at most, beside the users'
    targets, and so few of both that a validation takes about 5 % of the time of the steps before it. The log has their
    number as `valid_candidates`; figures over samples of different size do not compare."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Further places that get every logged figure, besides TensorBoard and `training.jsonl`. Each needs its extra,
    `pip install 'pixrec[mlflow]'`, and takes its address and credentials from its own environment variables."""
    validate_modalities: bool = True
    """Also validate with the pictures removed and with the text removed, where the model sees both."""
    seed: int = 0
    """Seed of weights, order and dropout."""

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "max_steps", "histories_per_step", "validate_every_steps", "max_validation_users")
        at_least(self, 1, "readers_per_worker", "validation_candidates")
        at_least(self, 1, "threads_per_worker", "micro_batch_histories", "gradient_accumulation", "bucket_steps")
        at_least(self, 0, "extra_negatives", "gpu_wait_seconds")
        at_least(self, 0, "num_workers", "cpus_per_worker", "max_failures", "weight_decay", "seed")
        above_zero(self, "learning_rate", "gradient_clip", "temperature", "cpus_per_reader", "reader_wait_seconds")
        between(self, 0, 1, "warmup_fraction")
        between(self, 0, 0.5, "modality_dropout")
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
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"train.stages has several of one name among {', '.join(names)}: give each its own")
        for stage in self.stages:
            self.of_stage(stage)

    def of_stage(self, stage: StageConfig) -> TrainConfig:
        """These settings with those of a stage in their place. Raises ConfigError where the two contradict."""
        own = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage) if f.name not in ("name", "data")}
        try:
            return dataclasses.replace(self, stages=(), **{key: v for key, v in own.items() if v is not None})
        except ConfigError as error:
            raise ConfigError(f"train.stages {stage.name}: {error}") from None
