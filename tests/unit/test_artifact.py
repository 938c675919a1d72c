from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from fakes import square, tiny_config, tiny_model, write_model

from pixrec import storage
from pixrec.artifact import (
    Model,
    check_index_writable,
    fingerprint,
    index_manifest,
    index_version,
    knockout_uri,
    load_index,
    load_model,
    save_model,
)
from pixrec.config import Config, load_config
from pixrec.data.images import decode_image
from pixrec.data.items import ItemTable
from pixrec.errors import ArtifactError, ConfigError, InputError, OutputError
from pixrec.model.catalog import Catalog
from pixrec.model.encoding import Content

LORA = tiny_config(model={"user_tower": "interleaved", "lora": {"enabled": True, "rank": 2, "targets": ["q_proj"]}})


def item_vectors(model: Model, items: ItemTable) -> np.ndarray:
    return model.embedder().items(Catalog(items, model.encoder), np.arange(len(items)))


def user_vectors(model: Model, items: ItemTable) -> np.ndarray:
    histories = [np.array([0, 1, 2]), np.array([5])]
    return model.embedder().users(Catalog(items, model.encoder), histories, item_vectors(model, items))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, model)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A saved model to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(model={"user_tower": "interleaved", "user_pooling": "mean", "modalities": "image"}),
        tiny_config(train={"temperature": 0.5, "seed": 3}),
    ],
)
def test_a_loaded_model_gives_the_same_vectors(tmp_path: Path, items: ItemTable, config: Config):
    made = tiny_model(config, items)
    facts = save_model(str(tmp_path), made, {"step": 7})
    loaded = load_model(str(tmp_path))
    assert loaded.config == config
    assert loaded.info == facts
    assert (loaded.info["step"], loaded.fingerprint) == (7, made.fingerprint)
    np.testing.assert_array_equal(item_vectors(loaded, items), item_vectors(made, items))
    np.testing.assert_array_equal(user_vectors(loaded, items), user_vectors(made, items))


def test_a_model_that_reads_time_is_loaded_with_it_and_one_that_does_not_keeps_its_name(
    tmp_path: Path, items: ItemTable
):
    """Fingerprints are older than the settings of time: a model saved before them must not be called altered."""
    timed = tiny_config(model={"user_tower": "compact", "compact": {"time": "both"}})
    made = tiny_model(timed, items)
    save_model(str(tmp_path), made, {})
    loaded = load_model(str(tmp_path))
    asked = (Catalog(items, made.encoder), [np.array([1, 2, 3])], item_vectors(made, items), [np.array([0, 5, 99_000])])
    np.testing.assert_array_equal(loaded.embedder().users(*asked), made.embedder().users(*asked))
    assert not np.allclose(made.embedder().users(*asked), made.embedder().users(*asked[:3]))

    shapes = [{}, {"time": "gaps"}, {"time": "ages"}, {"time": "both"}, {"positions": "learned"}, {"width": 8}]
    forms = [tiny_config(model={"user_tower": "compact", "compact": shape}) for shape in shapes]
    assert len({tiny_model(config, items).fingerprint for config in forms}) == len(forms)
    assert len({repr(config.model) for config in forms}) == 1


def test_the_width_of_the_compact_tower_is_its_own(tmp_path: Path, items: ItemTable):
    """And that of the index, where it answers."""
    config = tiny_config(model={"user_tower": "compact", "compact": {"width": 32}})
    assert (config.model.embedding_width, config.model.index_width) == (16, 32)
    made = tiny_model(config, items)
    assert item_vectors(made, items).shape == (len(items), 32)
    save_model(str(tmp_path), made, {})
    np.testing.assert_array_equal(item_vectors(load_model(str(tmp_path)), items), item_vectors(made, items))
    assert tiny_config(model={"compact": {"width": 32}}).model.index_width == 16


def test_a_model_folder_holds_what_the_contract_says(saved: Path):
    assert sorted(path.name for path in saved.iterdir()) == [
        "backbone",
        "config.yaml",
        "heads.safetensors",
        "model.json",
        "processor",
    ]
    files = [path.name for path in saved.rglob("*") if path.is_file()]
    assert all(name.endswith((".json", ".yaml", ".safetensors", ".jinja", ".txt")) for name in files), files


def test_the_same_seed_makes_the_same_model(items: ItemTable, model: Model):
    torch.manual_seed(1)
    assert tiny_model(items=items).fingerprint == model.fingerprint
    assert tiny_model(tiny_config(train={"seed": 1}), items).fingerprint != model.fingerprint
    assert tiny_model(LORA, items).fingerprint == tiny_model(LORA, items).fingerprint


def test_the_fingerprint_names_weights_tokenizer_and_towers(items: ItemTable, model: Model):
    other = tiny_model(items=items)
    with torch.no_grad():
        other.tower.item_proj.bias[0] += 1e-6
    words = Model(model.tower, tiny_model(items=ItemTable(items._table.slice(0, 1))).encoder, model.config, {})
    blind = Model(model.tower, model.encoder, tiny_config(model={"modalities": "text"}), {})
    prints = [fingerprint(each) for each in (model, other, words, blind)]
    assert len(set(prints)) == 4
    slower = Model(model.tower, model.encoder, tiny_config(train={"learning_rate": 0.5}), {})
    assert fingerprint(slower) == fingerprint(model)


def test_no_model_at_all(tmp_path: Path, saved: Path):
    for uri in (tmp_path, tmp_path / "nowhere", saved / "model.json"):
        with pytest.raises(ArtifactError, match=r"holds no complete model .* make one with pixrec train"):
            load_model(str(uri))


def alter_heads(folder: Path) -> None:
    heads = safetensors.torch.load_file(folder / "heads.safetensors")
    heads["item_proj.bias"] += 0.5
    safetensors.torch.save_file(heads, folder / "heads.safetensors")


def alter_backbone(folder: Path) -> None:
    file = folder / "backbone" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] *= 2
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})


def drop_a_head(folder: Path) -> None:
    heads = safetensors.torch.load_file(folder / "heads.safetensors")
    del heads["item_proj.bias"]
    safetensors.torch.save_file(heads, folder / "heads.safetensors")


def alter_config(folder: Path, **model: object) -> None:
    text = (folder / "config.yaml").read_text()
    for key, value in model.items():
        old = getattr(load_config(text).model, key)
        text = text.replace(f"{key}: {old}", f"{key}: {value}")
    (folder / "config.yaml").write_text(text)


def alter_json(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (alter_heads, "is not the model its model.json names"),
        (alter_backbone, "is not the model its model.json names"),
        (drop_a_head, "heads.safetensors does not fit config.yaml"),
        (lambda folder: alter_config(folder, modalities="text"), "is not the model its model.json names"),
        (lambda folder: alter_config(folder, embedding_width=8), "is damaged"),
        (lambda folder: alter_config(folder, user_tower="sideways"), "is damaged"),
        (lambda folder: alter_json(folder, "model.json"), "is not the model its model.json names"),
        (lambda folder: cut(folder, "model.json"), "is damaged"),
        (lambda folder: (folder / "model.json").write_text("[]"), "is not the model its model.json names"),
        (lambda folder: (folder / "model.json").write_text("7"), "is damaged"),
        (lambda folder: (folder / "processor" / "tokenizer_config.json").unlink(), "is damaged"),
        (lambda folder: cut(folder, "heads.safetensors"), "is damaged"),
        (lambda folder: cut(folder, "backbone/model.safetensors"), "is damaged"),
        (lambda folder: cut(folder, "processor/tokenizer.json"), "is damaged"),
        (lambda folder: (folder / "config.yaml").unlink(), "is damaged"),
        (lambda folder: shutil.rmtree(folder / "backbone"), "is damaged"),
        (lambda folder: shutil.rmtree(folder / "processor"), "is damaged"),
    ],
)
def test_a_model_that_was_altered_or_lost_a_part(copy: Path, harm: Callable[[Path], None], message: str):
    harm(copy)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_model(str(copy))
    assert str(copy) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_knockout_lies_inside_the_model():
    assert knockout_uri("s3://bucket/model/", "text") == "s3://bucket/model/knockouts/text_only"
    assert knockout_uri("out/model", "image") == "out/model/knockouts/image_only"


@pytest.mark.parametrize("name", ["no/such/backbone", "nowhere"])
def test_a_backbone_that_is_not_there(tmp_path: Path, items: ItemTable, name: str):
    with pytest.raises(ConfigError, match=r"model.backbone .* cannot be loaded"):
        tiny_model(tiny_config(model={"backbone": str(tmp_path / name)}), items)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_an_adapter_comes_back_and_is_plain_peft(tmp_path: Path, items: ItemTable):
    from peft import PeftModel

    made = tiny_model(LORA, items)
    with torch.no_grad():  # a fresh adapter changes nothing
        for name, parameter in made.tower.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    save_model(str(tmp_path), made, {})
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # the adapter and the heads, not the backbone
    loaded = load_model(str(tmp_path))
    np.testing.assert_array_equal(item_vectors(loaded, items), item_vectors(made, items))
    np.testing.assert_array_equal(user_vectors(loaded, items), user_vectors(made, items))

    plain = tiny_model(tiny_config(model={"user_tower": "interleaved"}), items)
    contents = [Content("Square", decode_image(square(0.2), 32)), Content("Tile", None)]
    seen = plain.encoder.items(contents)
    arguments = (seen.token_ids, seen.is_token, seen.picture_slot, plain.tower.pictures(seen))
    before = plain.tower.backbone.hidden_states(*arguments)
    PeftModel.from_pretrained(plain.tower.backbone.model, str(tmp_path / "adapter"))  # puts its layers in place
    after = plain.tower.backbone.hidden_states(*arguments)
    torch.testing.assert_close(after, loaded.tower.backbone.hidden_states(*arguments))
    assert not torch.allclose(after, before)


def test_a_connector_that_is_trained_beside_adapters_comes_back(tmp_path: Path, items: ItemTable):
    lora = {"enabled": True, "rank": 2, "targets": ["q_proj"], "connector": True}
    made = tiny_model(tiny_config(model={"user_tower": "interleaved", "lora": lora}), items)
    connector = [p for n, p in made.tower.named_parameters() if ".connector." in n]
    assert connector
    with torch.no_grad():
        for parameter in connector:
            parameter.add_(0.3)
    facts = save_model(str(tmp_path), made, {})
    loaded = load_model(str(tmp_path))
    assert fingerprint(loaded) == facts["fingerprint"]
    np.testing.assert_array_equal(item_vectors(loaded, items), item_vectors(made, items))
    heads = safetensors.torch.load_file(tmp_path / "heads.safetensors")
    lacking = {name: tensor for name, tensor in heads.items() if ".connector." not in name}
    safetensors.torch.save_file(lacking, tmp_path / "heads.safetensors")
    with pytest.raises(ArtifactError, match=r"heads.safetensors does not fit config.yaml"):
        load_model(str(tmp_path))


def test_an_adapter_that_matches_nothing(items: ItemTable):
    with pytest.raises(ConfigError, match=r"model.lora.targets names 'elbow'"):
        tiny_model(tiny_config(model={"lora": {"enabled": True, "targets": ["q_proj", "elbow"]}}), items)


# The index.


def publish(uri: Path, ids: str = "abcd", dtype: str = "float32", model: str = "0123456789") -> np.ndarray:
    vectors = np.random.default_rng(len(ids)).normal(size=(len(ids), 3)).astype(np.float32)
    with index_version(str(uri), model, 3, dtype, {"data": "d"}) as writer:
        for start in range(0, len(ids), 2):
            part = list(ids[start : start + 2])
            writer.add(part, vectors[start : start + 2], [f"hash of {item}" for item in part])
    return vectors


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-2), ("int8", 1e-2)])
def test_an_index_is_read_as_it_was_written(tmp_path: Path, dtype: str, tolerance: float):
    vectors = publish(tmp_path, dtype=dtype)
    index = load_index(str(tmp_path), "0123456789")
    assert index.item_ids == list("abcd")
    assert index.vectors.dtype == np.float32
    np.testing.assert_allclose(index.vectors, vectors, atol=tolerance, rtol=0)
    wanted = {"version": index.version, "model_fingerprint": "0123456789", "width": 3, "dtype": dtype, "rows": 4}
    assert wanted.items() <= index.manifest.items()
    assert index.manifest["data"] == "d"
    assert index.version.endswith("-01234567")
    table = storage.read_table(str(tmp_path / "versions" / index.version))
    scale = ["scale"] if dtype == "int8" else []
    assert table.column_names == ["item_id", "embedding", *scale, "content_hash", "has_image"]
    assert (
        str(table.schema.field("embedding").type)
        == {
            "float32": "fixed_size_list<element: float>[3]",
            "float16": "fixed_size_list<element: halffloat>[3]",
            "int8": "fixed_size_list<element: int8>[3]",
        }[dtype]
    )
    assert table.column("content_hash").to_pylist() == [f"hash of {item}" for item in "abcd"]


def test_large_indexes_lie_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pixrec.artifact.index._ROWS_PER_PART", 3)
    vectors = publish(tmp_path, ids="abcdefghijklmno")
    index = load_index(str(tmp_path))
    assert index.item_ids == list("abcdefghijklmno")
    np.testing.assert_array_equal(index.vectors, vectors)
    parts = sorted(path.name for path in (tmp_path / "versions" / index.version).glob("*.parquet"))
    assert parts == [f"part-{number:05d}.parquet" for number in range(4)]


def test_vectors_of_a_large_index_are_mapped_in_the_order_of_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIXREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pixrec.artifact.index.MAPPED_FROM", 1)
    vectors = publish(tmp_path / "index", ids="abcd")
    items, other = (ItemTable(pa.table({"item_id": list(ids)})) for ids in ("dbca", "abcx"))
    index = load_index(str(tmp_path / "index"), items=items)
    np.testing.assert_array_equal(index.vectors, vectors[[3, 1, 2, 0]])
    assert index.item_ids == list("dbca")
    assert isinstance(index.vectors.base, np.memmap)
    again = load_index(str(tmp_path / "index"), items=items)
    np.testing.assert_array_equal(again.vectors, index.vectors)
    of_others = load_index(str(tmp_path / "index"), items=other)  # as it lies: what is missing is for the caller to say
    assert of_others.item_ids == list("abcd")
    np.testing.assert_array_equal(of_others.vectors, vectors)


def test_the_newest_version_is_current_and_older_ones_stay(tmp_path: Path):
    publish(tmp_path)
    first = load_index(str(tmp_path))
    publish(tmp_path, ids="abcdef")
    second = load_index(str(tmp_path))
    assert second.version > first.version
    assert len(second.item_ids) == 6
    assert storage.list_folders(str(tmp_path / "versions")) == [first.version, second.version]
    (tmp_path / "CURRENT").write_text(first.version + "\n")
    assert load_index(str(tmp_path)).item_ids == list("abcd")


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a", "a"], np.zeros((2, 3)), "came twice"),
        (["b", "x"], np.zeros((2, 3)), "came twice"),
        (["a", "b"], np.full((2, 3), np.nan), "not finite"),
    ],
)
def test_vectors_that_are_refused(tmp_path: Path, ids: list[str], vectors: np.ndarray, message: str):
    def run() -> None:
        with index_version(str(tmp_path), "m" * 8, 3, "float16", {}) as writer:
            writer.add(["x"], np.ones((1, 3)), ["hash"])
            writer.add(ids, vectors, ["hash"] * len(ids))

    with pytest.raises(ValueError, match=message):
        run()
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_version_is_whole_or_invisible(tmp_path: Path):
    def crash() -> None:
        with index_version(str(tmp_path / "index"), "m" * 8, 3, "float32", {}) as writer:
            writer.add(["a"], np.ones((1, 3)), ["hash"])
            writer.flush()
            assert not (tmp_path / "index" / "CURRENT").exists()
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        crash()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(ArtifactError, match="no CURRENT"):
        load_index(str(tmp_path / "index"))
    check_index_writable(str(tmp_path / "index"))  # the next try may go ahead
    publish(tmp_path / "index")
    before = load_index(str(tmp_path / "index")).version
    with pytest.raises(RuntimeError, match="went away"):
        crash_after(tmp_path / "index")
    assert load_index(str(tmp_path / "index")).version == before


def crash_after(uri: Path) -> None:
    with index_version(str(uri), "m" * 8, 3, "float32", {}):
        raise RuntimeError("the machine went away")


def test_indexes_that_cannot_be_used(tmp_path: Path):
    uri = str(tmp_path / "index")
    with pytest.raises(ArtifactError, match=r"holds no published index .* make one with pixrec embed"):
        load_index(uri)
    publish(Path(uri))
    with pytest.raises(ArtifactError, match="was made by model 01234567, not 98765432; run pixrec embed"):
        load_index(uri, "9876543210")
    version = load_index(uri).version
    manifest = tmp_path / "index" / "versions" / version / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**whole, "rows": 5}))
    with pytest.raises(ArtifactError, match="holds 4 rows, its manifest says 5"):
        load_index(uri)
    for content in ("[]", "{}"):
        manifest.write_text(content)
        with pytest.raises(ArtifactError, match=r"manifest\.json is damaged: it says nothing of version"):
            load_index(uri)
    manifest.unlink()
    with pytest.raises(ArtifactError, match="CURRENT names a version that is not there"):
        index_manifest(uri)


def test_vectors_that_were_damaged_are_not_searched(tmp_path: Path):
    publish(tmp_path)
    (file,) = storage.list_files(str(tmp_path), ".parquet")
    table = storage.read_table(file)
    broken = [[float("nan")] * table.schema.field("embedding").type.list_size] * len(table)
    column = pa.array(broken, table.schema.field("embedding").type)
    storage.write_table(file, table.set_column(1, "embedding", column))
    with pytest.raises(ArtifactError, match="holds a vector that is not finite; run pixrec embed again"):
        load_index(str(tmp_path))
    storage.write_table(file, table.drop_columns(["embedding"]))
    with pytest.raises(InputError, match=r"part-00000\.parquet: no column 'embedding'"):
        load_index(str(tmp_path))


def test_an_index_is_not_put_among_other_things(tmp_path: Path):
    check_index_writable(str(tmp_path))
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not empty and holds no index"):
        check_index_writable(str(tmp_path))
