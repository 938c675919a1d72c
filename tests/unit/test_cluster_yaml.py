"""The files that name clusters: valid by Ray's, KubeRay's and Serve's own schemas, and naming only what exists.

KubeRay's schemas are no part of this repository. Where they lie, in `shared/crds` beside it or where PIXREC_CRDS says,
every manifest is checked by them, else those tests are skipped.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pixrec.cli import _parser
from pixrec.config import load_config

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted(
    file.relative_to(ROOT).as_posix() for file in (ROOT / "k8s").rglob("*.yaml") if file.name != "kustomization.yaml"
)
KUSTOMIZATIONS = sorted(file.parent for file in (ROOT / "k8s").rglob("kustomization.yaml"))
JOBS = [name for name in MANIFESTS if name.startswith("k8s/jobs/")]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every cluster that a manifest describes."""
    yield "k8s/base/raycluster.yaml", load("k8s/base/raycluster.yaml")["spec"]
    yield "k8s/service/rayservice.yaml", load("k8s/service/rayservice.yaml")["spec"]["rayClusterConfig"]


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
    assert kinds["head"]["resources"] == {"CPU": 0}, "no work on the head"
    workers = [kinds["decode"], kinds["train"]]
    assert [kind["min_workers"] for kind in workers] == [0, 0]
    assert [kind["node_config"]["InstanceMarketOptions"]["MarketType"] for kind in workers] == ["spot", "spot"]
    assert kinds["train"]["node_config"]["InstanceType"].startswith(("g", "p"))  # AWS names GPU machines so
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) <= cluster["max_workers"]
    assert all(kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds.values())


def test_both_images_are_targets_of_the_dockerfile(cluster: dict[str, Any]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    named = {cluster["docker"]["image"], cluster["available_node_types"]["train"]["docker"]["worker_image"]}
    assert named == set(re.findall(r"--target \w+ --tag (\S+)", text))


@pytest.mark.parametrize("name", ["cluster.yaml", "sky.yaml", "serve/config.yaml", "Dockerfile", *MANIFESTS])
def test_no_secret_is_written_down(name: str) -> None:
    text = (ROOT / name).read_text()
    secrets = (r"AKIA", r"aws_secret", r"password:", r"api_key:", r"token:(?! ~/\.ray/auth_token$)")
    assert not [word for word in secrets if re.search(word, text, re.MULTILINE)]


def test_the_ray_version_is_the_pinned_one() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert {spec["rayVersion"] for _, spec in clusters()} == {pinned.removeprefix("ray==")}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_valid_by_the_operators_schema(name: str) -> None:
    places = [os.environ.get("PIXREC_CRDS"), ROOT / "shared" / "crds", ROOT.parent / "shared" / "crds"]
    folder = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    manifest = load(name)
    if not manifest["apiVersion"].startswith("ray.io/"):
        assert (manifest["apiVersion"], manifest["kind"]) == ("v1", "ServiceAccount")
        return
    if folder is None:
        pytest.skip("KubeRay's CRD schemas are not here (shared/crds, or PIXREC_CRDS)")
    errors = validator(folder, manifest["kind"]).iter_errors(manifest)
    assert [f"{error.json_path}: {error.message[:200]}" for error in errors] == []


@cache
def validator(folder: Path, kind: str) -> jsonschema.Draft202012Validator:
    """Of the `v1` of a kind; a megabyte of YAML takes seconds to read."""
    definition = yaml.load((folder / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    assert definition["spec"]["names"]["kind"] == kind
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(schema))


def strict(schema: Any) -> Any:
    """The schema with no unknown key allowed, as the API server's field validation has it."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and "type" in schema:
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or not schema["properties"].keys() - {
            "metadata"
        }
        return schema if open_ended else {**schema, "additionalProperties": False}
    return schema


def test_the_check_by_schema_finds_a_misspelled_key() -> None:
    schema = strict(
        {"type": "object", "properties": {"spec": {"type": "object", "properties": {"a": {"type": "string"}}}}}
    )
    jsonschema.validate({"spec": {"a": "x"}}, schema)
    with pytest.raises(jsonschema.ValidationError, match="'b' was unexpected"):
        jsonschema.validate({"spec": {"b": "x"}}, schema)


def test_every_batch_verb_has_a_job_and_a_command_that_parses() -> None:
    assert {Path(name).stem for name in JOBS} == {"prepare", "train", "embed", "evaluate", "pipeline", "nightly"}
    places = {
        literal.partition("=")[0]
        for literal in load("k8s/base/kustomization.yaml")["configMapGenerator"][0]["literals"]
    }
    for name in JOBS:
        spec = load(name)["spec"]
        spec = spec.get("jobTemplate", spec)
        program, *arguments = shlex.split(spec["entrypoint"])
        parsed = _parser().parse_args(arguments)
        assert program == "pixrec"
        assert parsed.verb == {"nightly": "pipeline"}.get(Path(name).stem, Path(name).stem)
        assert set(re.findall(r"\$(\w+)", spec["entrypoint"])) <= places
        assert spec["entrypointNumCpus"] >= 1, "off the head"
        assert spec["clusterSelector"] == {"ray.io/cluster": load("k8s/base/raycluster.yaml")["metadata"]["name"]}
        load_config(overrides=parsed.set)


def test_the_skypilot_task_runs_a_command_that_parses() -> None:
    task = load("sky.yaml")
    (command,) = [line for line in task["run"].splitlines() if line.startswith("pixrec ")]
    assert _parser().parse_args(shlex.split(command)[1:]).verb == "pipeline"
    assert set(re.findall(r"\$(\w+)", command)) == set(task["envs"])
    assert (
        task["resources"]["image_id"]
        == f"docker:{load('cluster.yaml')['available_node_types']['train']['docker']['worker_image']}"
    )


@pytest.mark.parametrize(("name", "spec"), list(clusters()))
def test_a_cluster_takes_no_work_on_its_head_and_has_limits_and_a_token(name: str, spec: dict[str, Any]) -> None:
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["restartPolicy"] == "Never"
        assert pod["serviceAccountName"] == "pixrec"


def render(folder: Path) -> list[dict[str, Any]]:
    """What `kustomize build` makes of the few features used here: resources, images, config maps, JSON patches."""
    given = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {
        "apiVersion",
        "kind",
        "namespace",
        "resources",
        "images",
        "configMapGenerator",
        "generatorOptions",
        "patches",
    }
    assert set(given) <= known, "teach this test what is new"
    made: list[dict[str, Any]] = []
    for resource in given["resources"]:
        place = folder / resource
        made += render(place.resolve()) if place.is_dir() else [yaml.safe_load(place.read_text())]
    for generated in given.get("configMapGenerator", []):
        data = dict(literal.split("=", 1) for literal in generated["literals"])
        old = [m for m in made if (m["kind"], m["metadata"]["name"]) == ("ConfigMap", generated["name"])]
        assert bool(old) == (generated.get("behavior") == "merge")
        if old:
            assert set(data) <= set(old[0]["data"]), "a place that nobody reads"
            old[0]["data"] |= data
        else:
            made.append(
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generated["name"]}, "data": data}
            )
    for image in given.get("images", []):
        assert any(container["image"] == image["name"] for container in containers(made)), image
        for container in containers(made):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    for patch in given.get("patches", []):
        target = patch["target"]
        (resource,) = [m for m in made if (m["kind"], m["metadata"]["name"]) == (target["kind"], target["name"])]
        for step in yaml.safe_load(patch["patch"]):
            *above, last = step["path"].strip("/").split("/")
            inside = resource
            for key in above:
                inside = inside[key]
            assert (last in inside) == (step["op"] == "replace")
            inside[last] = step["value"]
    return copy.deepcopy(made)


def containers(tree: Any) -> Iterator[dict[str, Any]]:
    """Every container of some manifests."""
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from containers(child)
    if isinstance(tree, dict):
        yield from tree.get("containers", [])


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: folder.name)
def test_a_kustomization_renders(folder: Path) -> None:
    assert render(folder)


def test_the_example_names_all_that_is_yours() -> None:
    made = render(ROOT / "k8s" / "overlays" / "example")
    assert {(m["kind"], m["metadata"]["name"]) for m in made} == {
        (kind, "pixrec") for kind in ("ServiceAccount", "RayCluster", "RayService", "ConfigMap")
    }
    assert {c["image"] for c in containers(made)} == {"my-registry/pixrec:0.1.0", "my-registry/pixrec:0.1.0-cpu"}
    assert "my-bucket" not in json.dumps(made), "a bucket that the example leaves as it was"


def test_serve_configs_are_serves_and_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.syspath_prepend(ROOT)
    written = [load("serve/config.yaml"), yaml.safe_load(load("k8s/service/rayservice.yaml")["spec"]["serveConfigV2"])]
    (served,) = [m for m in render(ROOT / "k8s" / "overlays" / "example") if m["kind"] == "RayService"]
    for tree in [*written, yaml.safe_load(served["spec"]["serveConfigV2"])]:
        ServeDeploySchema.model_validate(tree)
        for application in tree["applications"]:
            module, _, name = application["import_path"].partition(":")
            build = getattr(importlib.import_module(module), name)
            assert build(application["args"]) is not None
