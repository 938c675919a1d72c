"""Save and load a model or an index as one versioned unit. safetensors, YAML, JSON and Parquet only.

A model is a folder: config.yaml (resolved), adapter/ (PEFT's format) or backbone/, heads.safetensors, processor/,
model.json (written last). Its fingerprint names the weights, the tokenizer and what the towers may see.
An index is a folder of versions; CURRENT names the one in use and is written after that version is whole.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import pixrec
from pixrec import storage
from pixrec.config import Config, dump_config, load_config
from pixrec.errors import ArtifactError, ConfigError
from pixrec.model.backbone import TINY, Backbone, add_lora, build_tiny, load_pretrained
from pixrec.model.catalog import Embedder
from pixrec.model.encoding import ItemEncoder, picture_statistics, train_tokenizer
from pixrec.model.towers import DualTower
from pixrec.schema import CONTENT_HASH, EMBEDDING, ITEM_ID, index_schema

MODEL_MARKER = "model.json"
_KNOCKOUTS = "knockouts"
_MANIFEST, _CURRENT, _VERSIONS = "manifest.json", "CURRENT", "versions"
_ROWS_PER_PART = 50_000


@dataclass(frozen=True)
class Model:
    """A tower with what it takes to use it, and the facts of its making."""

    tower: DualTower
    encoder: ItemEncoder
    config: Config
    info: dict[str, Any]
    """model.json: fingerprint, metrics, counts of training."""

    @property
    def fingerprint(self) -> str:
        return str(self.info["fingerprint"])

    def embedder(self) -> Embedder:
        model = self.config.model
        return Embedder(self.tower, self.encoder, model.modalities, model.max_history_items)


def new_model(config: Config, texts: list[str], device: str = "cpu") -> Model:
    """A model before its first training step. `texts` (the catalog's) train the tokenizer of `pixrec-tiny`."""
    if config.model.backbone == TINY:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts, config.model.tiny.vocabulary_tokens)
        statistics = ([0.5] * 3, [0.5] * 3)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model.backbone, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"model.backbone {config.model.backbone!r} cannot be loaded: {reason}") from None
        statistics = picture_statistics(config.model.backbone)
    base = _base(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        if config.model.lora.enabled:
            add_lora(base, config.model.lora)
        tower = DualTower(Backbone(base, *statistics), config.model, config.train.temperature)
    tower.to(device)
    return Model(tower, ItemEncoder(tokenizer, tower.backbone.family, config.model.max_text_tokens), config, {})


def save_model(folder: str, model: Model, info: dict[str, Any]) -> dict[str, Any]:
    """Write all of a model into a local `folder`, model.json last; returns what model.json says."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(dump_config(model.config))
    processor = path / "processor"
    model.encoder.tokenizer.save_pretrained(processor)
    backbone = model.tower.backbone
    statistics = {
        "image_mean": backbone.pixel_mean.flatten().tolist(),
        "image_std": backbone.pixel_std.flatten().tolist(),
        "size": {"height": model.encoder.image_size_px, "width": model.encoder.image_size_px},
    }
    (processor / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2))
    backbone.model.save_pretrained(path / ("adapter" if model.config.model.lora.enabled else "backbone"))
    safetensors.torch.save_file(_heads(model.tower), path / "heads.safetensors")
    facts = {"fingerprint": fingerprint(model), "pixrec": pixrec.__version__, **info}
    (path / MODEL_MARKER).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def load_model(uri: str, device: str = "cpu") -> Model:
    """Load a model folder (local or s3://). Raises ArtifactError when it is absent, incomplete or altered."""
    if not storage.exists(storage.join(uri, MODEL_MARKER)):
        raise ArtifactError(f"{uri} holds no complete model (no {MODEL_MARKER}); make one with pixrec train")
    with storage.local_folder(uri) as folder:
        try:
            model = _read_model(Path(folder))
        # RuntimeError: a tensor of another shape; KeyError: a file that lacks a key
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ConfigError) as error:
            raise ArtifactError(f"{uri} is damaged: {' '.join(str(error).split())[:200]}; train it again") from None
    model.tower.to(device).eval()
    if fingerprint(model) != model.info.get("fingerprint"):
        raise ArtifactError(
            f"{uri} is not the model its model.json names (weights or tokenizer altered); train it again"
        )
    return model


def knockout_uri(model_uri: str, modality: str) -> str:
    """Where the knockout that sees only `modality`, trained with the model, lies."""
    return storage.join(model_uri, _KNOCKOUTS, f"{modality}_only")


def fingerprint(model: Model) -> str:
    """Hash of all weights, the tokenizer and the model section of the config: equal towers, equal fingerprint."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(sorted(model.encoder.tokenizer.get_vocab().items())).encode())
    digest.update(repr(model.config.model).encode())
    return digest.hexdigest()


def _read_model(path: Path) -> Model:
    info = json.loads((path / MODEL_MARKER).read_text())
    config = load_config((path / "config.yaml").read_text())
    tokenizer = AutoTokenizer.from_pretrained(path / "processor", trust_remote_code=False)
    if config.model.lora.enabled:
        base = _base(config, tokenizer)
        base.load_adapter(str(path / "adapter"))
    else:
        base = load_pretrained(str(path / "backbone"))
    backbone = Backbone(base, *picture_statistics(str(path / "processor")))
    tower = DualTower(backbone, config.model, config.train.temperature)
    heads = safetensors.torch.load_file(path / "heads.safetensors")
    missing, unexpected = tower.load_state_dict(heads, strict=False)
    if unexpected or [name for name in missing if not name.startswith("backbone.")]:
        raise ValueError("heads.safetensors does not fit config.yaml")
    return Model(tower, ItemEncoder(tokenizer, backbone.family, config.model.max_text_tokens), config, info)


def _base(config: Config, tokenizer: PreTrainedTokenizerBase) -> Any:
    if config.model.backbone != TINY:
        return load_pretrained(config.model.backbone)
    names = {"image": "<image>", "pad": "<pad>", "bos": "<s>", "eos": "<end_of_utterance>"}
    ids = {key: tokenizer.get_vocab()[token] for key, token in names.items()}
    return build_tiny(config.model.tiny, len(tokenizer), ids, config.train.seed)


def _heads(tower: DualTower) -> dict[str, Tensor]:
    """Everything that is not the backbone."""
    return {n: t.detach().cpu().contiguous() for n, t in tower.state_dict().items() if not n.startswith("backbone.")}


@dataclass(frozen=True)
class Index:
    """One published version: N item vectors and what made them."""

    version: str
    item_ids: list[str]
    vectors: np.ndarray
    """(N, D) float32"""
    manifest: dict[str, Any]


class IndexWriter:
    """Collects vectors into part files of one version; nothing is visible before `index_version` ends."""

    def __init__(self, folder: str, width: int, dtype: str) -> None:
        self._folder, self._schema, self._dtype = folder, index_schema(width, dtype), dtype
        self._pending: list[pa.Table] = []
        self._parts = 0
        self.rows = 0
        self.item_ids: set[str] = set()

    def add(self, item_ids: list[str], vectors: np.ndarray, content_hashes: list[str]) -> None:
        """Vectors (U, D) of U items. Raises ValueError on a repeated item or a value that is not finite."""
        stored = vectors.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"the vector of an item near {item_ids[0]!r} is not finite")
        self.item_ids.update(item_ids)
        self.rows += len(item_ids)
        if len(self.item_ids) != self.rows:
            raise ValueError(f"an item near {item_ids[0]!r} came twice")
        values = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
        columns = {ITEM_ID: item_ids, EMBEDDING: values, CONTENT_HASH: content_hashes}
        self._pending.append(pa.table(columns, schema=self._schema))
        if sum(t.num_rows for t in self._pending) >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            part = storage.join(self._folder, f"part-{self._parts:05d}.parquet")
            storage.write_table(part, pa.concat_tables(self._pending))
            self._parts, self._pending = self._parts + 1, []


@contextlib.contextmanager
def index_version(
    uri: str, model_fingerprint: str, width: int, dtype: str, facts: dict[str, Any]
) -> Iterator[IndexWriter]:
    """Write a new version of the index at `uri`; when the block ends well it is published and CURRENT."""
    now = datetime.datetime.now(datetime.UTC)
    version = f"{now:%Y%m%dT%H%M%S%f}-{model_fingerprint[:8]}"
    with storage.staged_folder(storage.join(uri, _VERSIONS, version), _MANIFEST, "index version") as staging:
        writer = IndexWriter(staging, width, dtype)
        yield writer
        writer.flush()
        manifest = {
            "version": version,
            "model_fingerprint": model_fingerprint,
            "width": width,
            "dtype": dtype,
            "rows": writer.rows,
            "time": now.isoformat(timespec="seconds"),
            "pixrec": pixrec.__version__,
            **facts,
        }
        storage.write_json(storage.join(staging, _MANIFEST), manifest)
    storage.write_bytes(storage.join(uri, _CURRENT), version.encode())


def check_index_writable(uri: str) -> None:
    """Raise OutputError when no index can be published at `uri`."""
    storage.check_writable(uri, _VERSIONS, "index")  # a first version that failed left that folder and no CURRENT


def index_manifest(uri: str) -> dict[str, Any]:
    """The manifest of the current version. Raises ArtifactError when there is none."""
    current = storage.join(uri, _CURRENT)
    if not storage.exists(current):
        raise ArtifactError(f"{uri} holds no published index (no {_CURRENT}); make one with pixrec embed")
    manifest = storage.join(uri, _VERSIONS, storage.read_text(current).strip(), _MANIFEST)
    if not storage.exists(manifest):
        raise ArtifactError(f"{uri}: {_CURRENT} names a version that is not there; run pixrec embed again")
    return dict(storage.read_json(manifest))


def load_index(uri: str, model_fingerprint: str | None = None) -> Index:
    """The current version. Raises ArtifactError when absent, damaged, or made by another model than the one named."""
    manifest = index_manifest(uri)
    if model_fingerprint not in (None, manifest["model_fingerprint"]):
        raise ArtifactError(
            f"{uri} was made by model {manifest['model_fingerprint'][:8]}, not {str(model_fingerprint)[:8]}; "
            "run pixrec embed with this model"
        )
    version = str(manifest["version"])
    table = storage.read_table(storage.join(uri, _VERSIONS, version), [ITEM_ID, EMBEDDING])
    if table.num_rows != manifest["rows"]:
        raise ArtifactError(
            f"{uri}: version {version} holds {table.num_rows} rows, its manifest says {manifest['rows']}"
        )
    flat = table.column(EMBEDDING).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = flat.astype(np.float32).reshape(-1, manifest["width"])
    return Index(version, table.column(ITEM_ID).to_pylist(), vectors, manifest)
