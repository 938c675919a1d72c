"""What a cluster has, what a run would use of it, and what is wrong, before anything starts.

`examine` asks every node; `judge`, which knows no Ray, compares what they say with the settings.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import ray._private.state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pixrec import storage
from pixrec.cluster import probe
from pixrec.cluster.embed import ModelFacts
from pixrec.cluster.probe import Access
from pixrec.cluster.session import connect
from pixrec.config import Config
from pixrec.console import Console
from pixrec.data.images import largest_side
from pixrec.errors import ConfigError, InputError, PixRecError
from pixrec.model.backbone import picture_size_of

ANSWER_SECONDS = 90.0
"""How long a node may take for its answer; the first one starts a process that imports torch."""
CLOCK_SECONDS = 5.0
"""How far clocks may differ. S3 refuses requests 15 minutes off; versions sort by the clock of the node that makes
them."""
FULL_SHARE = 0.95
"""From here on Ray does not spill objects to a disk."""
BLOCKS = 8
"""Blocks of decoded pictures for each embedding actor that the object store must hold: those that wait for it, those
being decoded and those being embedded, within the half of the store that Ray Data uses."""
GIB = 1024**3


@dataclass(frozen=True)
class Node:
    """What Ray knows of a node, and what the node says of itself."""

    name: str
    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: float = 0.0
    object_store_bytes: float = 0.0
    is_head: bool = False
    fault: str | None = None
    """why it did not answer"""
    ahead_seconds: float = 0.0
    """its clock minus the driver's, less what the way there and back leaves unsure"""
    said: Mapping[str, Any] = field(default_factory=dict)
    """as `probe.look`"""


@dataclass(frozen=True)
class Use:
    """A kind of process that a run starts: so many, each with so many CPUs and GPUs."""

    what: str
    settings: str
    """the settings that say so"""
    count: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.what}: {self.count} x ({self.cpus:g} CPU, {self.gpus:g} GPU)"


def doctor(config: Config, places: Mapping[str, Access], console: Console) -> dict[str, Any]:
    """Look at the cluster at hand and say what was found; `faults` has a line for each thing that is wrong.

    `places` are looked at from every node. Raises InputError where the cluster cannot be joined.
    """
    try:
        with connect():
            nodes, limits = examine(places), growth()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"the cluster cannot be joined: {' '.join(str(error).split())[:300]}") from None
    faults, uses = judge(nodes, config, probe.versions(), limits), list(uses_of(config))
    for node in nodes:
        console.say(
            f"{node.name}{' (head)' if node.is_head else ''}: {node.cpus:g} CPUs, {node.gpus:g} GPUs, "
            f"{node.memory_bytes / GIB:.1f} GiB, object store {node.object_store_bytes / GIB:.1f} GiB"
        )
    for use in uses:
        console.say(f"would use: {use}")
    for note in (notes := list(_notes(nodes))):
        console.say(f"note: {note}")
    return {
        "nodes": [
            {name: getattr(node, name) for name in ("name", "is_head", "cpus", "gpus", "memory_bytes")}
            | {"object_store_bytes": node.object_store_bytes, "versions": node.said.get("versions")}
            for node in nodes
        ],
        "may_grow_to": limits,
        "uses": [vars(use) for use in uses],
        "notes": notes,
        "faults": faults,
    }


def examine(places: Mapping[str, Access]) -> list[Node]:
    """Ask every node of the cluster, the head first."""
    alive = sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: "node:__internal_head__" not in node["Resources"],
    )
    with _tokens(places) as tokens:
        asked = [(node, _on(node, probe.look).remote(dict(places), tokens)) for node in alive]
        return [_answered(node, answer) for node, answer in asked]


@contextlib.contextmanager
def _tokens(places: Mapping[str, Access]) -> Iterator[dict[str, str]]:
    """A file in every local place to write to; a node that does not see it has another folder of that name."""
    tokens = {}
    for place, access in places.items():
        if access == "write" and not storage.is_remote(place):
            token = storage.join(probe.ground(place), f".pixrec-probe-{uuid.uuid4().hex[:8]}")
            with contextlib.suppress(PixRecError):  # the nodes will say so too
                storage.write_bytes(token, b"")
                tokens[place] = token
    try:
        yield tokens
    finally:
        for token in tokens.values():
            storage.remove(token)


def _on(node: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """A task on this node alone, which takes none of its resources."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)


def _answered(node: Mapping[str, Any], answer: ray.ObjectRef) -> Node:
    has = node["Resources"]
    facts: dict[str, Any] = {
        "name": node["NodeManagerAddress"],
        "cpus": has.get("CPU", 0.0),
        "gpus": has.get("GPU", 0.0),
        "memory_bytes": has.get("memory", 0.0),
        "object_store_bytes": has.get("object_store_memory", 0.0),
        "is_head": "node:__internal_head__" in has,
    }
    try:
        said = ray.get(answer, timeout=ANSWER_SECONDS)
        began = time.time()
        there = ray.get(_on(node, probe.clock).remote(), timeout=ANSWER_SECONDS)
        unsure = (time.time() - began) / 2
    except ray.exceptions.GetTimeoutError:
        return Node(
            **facts, fault=f"does not answer within {ANSWER_SECONDS:g} s; are its worker ports open to the others?"
        )
    except ray.exceptions.RayError as error:
        why = " ".join(str(getattr(error, "cause", None) or error).split())[-200:]
        return Node(**facts, fault=f"cannot run PixRec ({why}); install the same image on all nodes")
    ahead = there - began - unsure
    return Node(**facts, said=said, ahead_seconds=math.copysign(max(0.0, abs(ahead) - unsure), ahead))


def growth() -> dict[str, float] | None:
    """The CPUs and GPUs that an autoscaler may bring the cluster to; None where Ray knows of none."""
    found = ray._private.state.state.get_max_resources_from_cluster_config()
    return None if found is None else {name: float(found.get(name, 0)) for name in ("CPU", "GPU")}


def uses_of(config: Config) -> Iterator[Use]:
    """The processes of each verb."""
    train, embed, evaluate, serve = config.train, config.embed, config.evaluate, config.serve
    yield Use("prepare", "prepare.num_cpus_per_task", 1, config.prepare.num_cpus_per_task, 0)
    yield Use("train", "train.num_workers", train.num_workers, train.cpus_per_worker, float(train.use_gpu))
    yield Use("embed", "embed.num_actors", embed.num_actors, embed.cpus_per_actor, embed.gpus_per_actor)
    if evaluate.num_actors:
        yield Use(
            "evaluate", "evaluate.num_actors", evaluate.num_actors, evaluate.cpus_per_actor, evaluate.gpus_per_actor
        )
    yield Use("serve", "serve.num_replicas", serve.num_replicas, serve.cpus_per_replica, serve.gpus_per_replica)


def judge(
    nodes: list[Node], config: Config, here: Mapping[str, str], limits: Mapping[str, float] | None = None
) -> list[str]:
    """A line for each thing that is wrong. `here` are the driver's versions, `limits` as `growth`."""
    asked = [node for node in nodes if node.fault is None]
    faults = [f"node {node.name} {node.fault}" for node in nodes if node.fault is not None]
    faults += _versions_apart(asked, here)
    faults += _clocks_apart(asked)
    faults += _told(asked, "pictures", "{thing} pictures cannot be read on {nodes} ({why}); install a Pillow that can")
    faults += _told(asked, "places", "{thing} cannot be used from {nodes}: {why}")
    faults += _caches_at_fault(asked)
    faults += _small_stores(asked, config)
    faults += _lacks(nodes, config, limits)
    return faults


def _clocks_apart(nodes: list[Node]) -> Iterator[str]:
    for node in nodes:
        if abs(node.ahead_seconds) > CLOCK_SECONDS:
            where = "ahead of" if node.ahead_seconds > 0 else "behind"
            yield (
                f"the clock of node {node.name} is {abs(node.ahead_seconds):.1f} s {where} the driver's; let chrony or "
                "ntpd set it"
            )


def _versions_apart(nodes: list[Node], here: Mapping[str, str]) -> Iterator[str]:
    for package, mine in here.items():
        others = defaultdict[str, list[str]](list)
        for node in nodes:
            if (theirs := node.said["versions"].get(package, "absent")) != mine:
                others[theirs].append(node.name)
        for theirs, names in others.items():
            yield (
                f"{package} is {theirs} on {_names(names, nodes)} and {mine} for the driver; run the same image, or "
                "the same constraints.txt, on all of them"
            )


def _told(nodes: list[Node], what: str, line: str) -> Iterator[str]:
    """Lines about what nodes say of things, {thing: why}: one for each thing and reason."""
    found = defaultdict[tuple[str, str], list[str]](list)
    for node in nodes:
        for thing, why in node.said[what].items():
            found[thing, why].append(node.name)
    for (thing, why), names in found.items():
        yield line.format(thing=thing, why=why, nodes=_names(names, nodes))


def _caches_at_fault(nodes: list[Node]) -> Iterator[str]:
    for node in nodes:
        cache = node.said["cache"]
        if "fault" in cache:
            yield f"the cache of node {node.name} cannot be written ({cache['fault']}); set PIXREC_CACHE to another"
        elif cache["share_used"] > FULL_SHARE:
            yield (
                f"the disk of {cache['place']} on node {node.name} is {cache['share_used']:.0%} full "
                f"({cache['free'] / GIB:.1f} GiB free); free some, or set PIXREC_CACHE and Ray's --temp-dir to another"
            )


def _small_stores(nodes: list[Node], config: Config) -> Iterator[str]:
    workers = [node for node in nodes if node.cpus]
    if not workers:
        return
    actors = math.ceil(config.embed.num_actors / len(workers))
    needed = BLOCKS * actors * _block_bytes(config)
    for node in workers:
        if node.object_store_bytes < needed:
            yield (
                f"the object store of node {node.name} is {node.object_store_bytes / GIB:.2f} GiB, and embedding wants "
                f"{needed / GIB:.2f} ({actors} actors there); enlarge /dev/shm and --object-store-memory, or lower "
                "embed.max_part_items"
            )


def _block_bytes(config: Config) -> int:
    """A block of decoded pictures on its way to an embedding actor."""
    try:
        size = picture_size_of(config.model)
    except (ConfigError, OSError):  # the backbone is not to be had here: as large as blocks get
        return 128 * 1024**2
    facts = ModelFacts("", "", 0, size, config.model)
    return facts.part_items(config.embed) * 3 * largest_side(size) ** 2


def _lacks(nodes: list[Node], config: Config, limits: Mapping[str, float] | None) -> Iterator[str]:
    has = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    if limits is not None:
        has = {kind: max(has[kind], limits.get(kind, 0.0)) for kind in has}
    grown = "" if limits is None else " at most, with what its autoscaler may add"
    for use in uses_of(config):
        for kind, each in (("CPU", use.cpus), ("GPU", use.gpus)):
            if use.count * each > has[kind]:
                yield (
                    f"{use.what} wants {use.count * each:g} {kind}s ({use.settings} {use.count}, {each:g} each), and "
                    f"the cluster has {has[kind]:g}{grown}; add nodes or lower {use.settings}"
                )
    readers = {"train": config.train.feed != "local", "embed": True}
    for use in uses_of(config):
        if readers.get(use.what) and use.count and use.count * use.cpus == has["CPU"]:
            setting = use.settings.replace("num_", "cpus_per_").removesuffix("s")
            yield (
                f"{use.settings} {use.count} with {setting} {use.cpus:g} take all {has['CPU']:g} CPUs, and nothing is "
                f"left to read pictures with; lower {setting}"
            )


def _notes(nodes: list[Node]) -> Iterator[str]:
    """What is no fault and worth knowing."""
    head = next((node for node in nodes if node.is_head), None)
    if head is not None and len(nodes) > 1 and head.cpus:
        yield (
            f"the head {head.name} takes work, {head.cpus:g} CPUs of it: memory that work takes may end the whole "
            "cluster; start it with --num-cpus=0"
        )


def _names(names: Iterable[str], nodes: list[Node]) -> str:
    names = list(names)
    if len(names) == len(nodes):
        return "every node" if len(nodes) > 1 else f"node {names[0]}"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"node{'s' * (len(names) > 1)} {', '.join(names[:5])}{more}"
