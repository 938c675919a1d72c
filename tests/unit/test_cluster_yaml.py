"""The files that name clusters: valid by Ray's own schemas, and naming only what exists."""

from __future__ import annotations

import importlib
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pixrec.config import load_config

ROOT = Path(__file__).parents[2]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return load("cluster.yaml")


def test_cluster_yaml_is_valid_by_rays_schema(cluster: dict[str, Any]) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_the_launcher_accepts_cluster_yaml(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_cluster_has_a_head_and_both_kinds_of_workers(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds
    assert set(kinds) == {"head", "decode", "train"}
    assert kinds["train"]["node_config"]["InstanceType"].startswith(("g", "p"))  # AWS names GPU machines so
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) <= cluster["max_workers"]
    assert any("constraints.txt" in command for command in cluster["setup_commands"])


@pytest.mark.parametrize("name", ["cluster.yaml", "k8s/rayjob.yaml", "k8s/rayservice.yaml", "serve/config.yaml"])
def test_no_secret_is_written_down(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not [word for word in ("AKIA", "aws_secret", "password:", "api_key:", "token:") if word in text]


def test_the_ray_version_is_the_pinned_one() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    version = pinned.removeprefix("ray==")
    assert load("k8s/rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == version
    assert load("k8s/rayservice.yaml")["spec"]["rayClusterConfig"]["rayVersion"] == version


def test_kuberay_manifests_name_what_exists() -> None:
    job, service = load("k8s/rayjob.yaml"), load("k8s/rayservice.yaml")
    assert [(m["apiVersion"], m["kind"]) for m in (job, service)] == [
        ("ray.io/v1", "RayJob"),
        ("ray.io/v1", "RayService"),
    ]
    command, verb, *options = shlex.split(job["spec"]["entrypoint"])
    assert (command, verb) == ("pixrec", "train")
    assert (ROOT / "jobs" / f"{verb}.py").exists()
    load_config("", [value for option, value in itertools.pairwise(options) if option == "--set"])
    for cluster in (job["spec"]["rayClusterSpec"], service["spec"]["rayClusterConfig"]):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_serve_configs_are_serves_and_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.syspath_prepend(ROOT)
    written = [load("serve/config.yaml"), yaml.safe_load(load("k8s/rayservice.yaml")["spec"]["serveConfigV2"])]
    for tree in written:
        ServeDeploySchema.model_validate(tree)
        for application in tree["applications"]:
            module, _, name = application["import_path"].partition(":")
            build = getattr(importlib.import_module(module), name)
            assert build(application["args"]) is not None
