"""Every fault by name, on nodes that say what broken ones would say; and a healthy cluster, asked for real."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pixrec import cli
from pixrec.cluster import doctor, probe
from pixrec.cluster.doctor import GIB, Node, judge
from pixrec.config import Config, change_config
from pixrec.console import Console
from pixrec.errors import InputError

VERSIONS = {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0"}


def node(name: str = "10.0.0.2", said: Mapping[str, Any] | None = None, **facts: Any) -> Node:
    """A healthy one, but for what is given."""
    usual = {
        "versions": VERSIONS,
        "pictures": {},
        "places": {},
        "cache": {"place": "/tmp/c", "free": GIB, "share_used": 0.5},
    }
    sizes = {"cpus": 4.0, "gpus": 1.0, "memory_bytes": 16 * GIB, "object_store_bytes": 4 * GIB}
    return Node(name, said={**usual, **(said or {})}, **{**sizes, **facts})


def faults(
    *nodes: Node, settings: Mapping[str, Any] | None = None, limits: dict[str, float] | None = None
) -> list[str]:
    return judge(list(nodes), change_config(Config(), settings or {}), VERSIONS, limits)


def test_healthy_nodes_have_no_fault() -> None:
    assert (
        faults(node("10.0.0.1", cpus=0.0, gpus=0.0, object_store_bytes=0.0, is_head=True), node(), node("10.0.0.3"))
        == []
    )


@pytest.mark.parametrize(
    ("broken", "settings", "line"),
    [
        pytest.param(
            node("10.0.0.3", {"versions": {**VERSIONS, "torch": "2.12.0"}}),
            {},
            "torch is 2.12.0 on node 10.0.0.3 and 2.13.0 for the driver; run the same image, or the same "
            "constraints.txt, on all of them",
            id="versions",
        ),
        pytest.param(
            node("10.0.0.3", {"places": {"s3://shop": "Access Denied"}}),
            {},
            "s3://shop cannot be used from node 10.0.0.3: Access Denied",
            id="no S3 from a worker",
        ),
        pytest.param(
            node("10.0.0.3", ahead_seconds=-62.5),
            {},
            "the clock of node 10.0.0.3 is 62.5 s behind the driver's; let chrony or ntpd set it",
            id="clock",
        ),
        pytest.param(
            node("10.0.0.3"),
            {"train.num_workers": 4, "train.use_gpu": True},
            "train wants 4 GPUs (train.num_workers 4, 1 each), and the cluster has 2; add nodes or lower "
            "train.num_workers",
            id="GPUs",
        ),
        pytest.param(
            node("10.0.0.3", object_store_bytes=0.05 * GIB),
            {},
            "the object store of node 10.0.0.3 is 0.05 GiB, and embedding wants 0.09 (1 actors there); enlarge "
            "/dev/shm and --object-store-memory, or lower embed.max_part_items",
            id="object store",
        ),
        pytest.param(
            node("10.0.0.3", {"pictures": {"WEBP": "KeyError: 'WEBP'"}}),
            {},
            "WEBP pictures cannot be read on node 10.0.0.3 (KeyError: 'WEBP'); install a Pillow that can",
            id="pictures",
        ),
        pytest.param(
            node("10.0.0.3", {"places": {"/out": "it is another folder there than for the driver"}}),
            {},
            "/out cannot be used from node 10.0.0.3: it is another folder there than for the driver",
            id="output",
        ),
        pytest.param(
            node("10.0.0.3", fault="does not answer within 90 s"),
            {},
            "node 10.0.0.3 does not answer within 90 s",
            id="mute",
        ),
        pytest.param(
            node("10.0.0.3", {"cache": {"place": "/tmp/c", "free": GIB, "share_used": 0.97}}),
            {},
            "the disk of /tmp/c on node 10.0.0.3 is 97% full (1.0 GiB free); free some, or set PIXREC_CACHE and Ray's "
            "--temp-dir to another",
            id="disk",
        ),
        pytest.param(
            node("10.0.0.3"),
            {"train.num_workers": 8, "train.cpus_per_worker": 1},
            "train.num_workers 8 with train.cpus_per_worker 1 take all 8 CPUs, and nothing is left to read pictures "
            "with; lower train.cpus_per_worker",
            id="all CPUs for training",
        ),
        pytest.param(
            node("10.0.0.3"),
            {"embed.num_actors": 8, "embed.cpus_per_actor": 1},
            "embed.num_actors 8 with embed.cpus_per_actor 1 take all 8 CPUs, and nothing is left to read pictures "
            "with; lower embed.cpus_per_actor",
            id="all CPUs for embedding",
        ),
    ],
)
def test_each_fault_is_one_line_that_names_it(broken: Node, settings: Mapping[str, Any], line: str) -> None:
    assert faults(node(), broken, settings=settings) == [line]


def test_what_is_wrong_everywhere_is_said_once() -> None:
    everywhere = [node(f"10.0.0.{i}", {"places": {"s3://shop": "no credentials"}}) for i in range(8)]
    assert faults(*everywhere) == ["s3://shop cannot be used from every node: no credentials"]
    (line,) = faults(node("10.0.1.1"), *everywhere)
    assert "nodes 10.0.0.0, 10.0.0.1, 10.0.0.2, 10.0.0.3, 10.0.0.4 and 3 more" in line


def test_what_an_autoscaler_may_add_is_there() -> None:
    settings = {"train.num_workers": 4, "train.use_gpu": True}
    assert faults(node(), settings=settings, limits={"CPU": 64.0, "GPU": 4.0}) == []
    (line,) = faults(node(), settings=settings, limits={"CPU": 64.0, "GPU": 3.0})
    assert "the cluster has 3 at most, with what its autoscaler may add" in line


def test_a_place_as_a_node_sees_it(tmp_path: Path) -> None:
    assert probe.place_fault(str(tmp_path), "read") is None
    assert probe.place_fault(str(tmp_path / "no"), "read") == "it is not there"
    assert probe.place_fault(str(tmp_path / "new" / "out"), "write") is None
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"
    assert probe.place_fault("/proc/out", "write") is not None
    (tmp_path / "token").touch()
    assert probe.place_fault(str(tmp_path), "write", str(tmp_path / "token")) is None
    assert probe.place_fault(str(tmp_path), "write", str(tmp_path / "other")) is not None


def test_a_format_that_pillow_lacks_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.picture_fault("WEBP") is None
    from PIL import Image

    Image.init()
    monkeypatch.delitem(Image.SAVE, "WEBP")
    assert probe.picture_fault("WEBP") == "KeyError: 'WEBP'"


def test_a_cluster_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConnectionError("no GCS at 10.0.0.1:6379")

    monkeypatch.setattr(doctor, "connect", refuse)
    with Console(quiet=True) as console, pytest.raises(InputError, match="cannot be joined: no GCS at"):
        doctor.doctor(Config(), {}, console)


def test_a_healthy_cluster(
    ray_session: None, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ["--read", f"{bucket}/", "--write", f"{bucket}/out", "--write", str(tmp_path / "out")]
    monkeypatch.setattr(doctor, "FULL_SHARE", 1.0)
    assert cli.main(["doctor", *places, "--set=train.num_workers=1"]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert summary["faults"] == []
    (found,) = summary["nodes"]
    assert found["is_head"]
    assert found["cpus"] > 0
    assert found["versions"]["ray"] == summary["nodes"][0]["versions"]["ray"]
    assert "would use: train: 1 x (0.5 CPU, 0 GPU)" in captured.err

    assert cli.main(["doctor", "--read", f"{bucket}/nothing-here", "--set=train.num_workers=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        f"pixrec doctor: {bucket}/nothing-here cannot be used from node {found['name']}: it is not there"
    )
    assert len(json.loads(captured.out.splitlines()[-1])["faults"]) == 1
