from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.data
from collector import Collector, collecting
from fakes import job_of
from raw_shop import write_raw
from ray.train import Checkpoint

from pixrec import storage
from pixrec.artifact import Model
from pixrec.cluster import prepare, train
from pixrec.config import Config
from pixrec.data.sequences import Dataset
from pixrec.training.phases import Begun, begin

HERE = Path(__file__).parent
BUCKET = "s3://warehouse"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors, but for those that Ray raises about itself."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."))
            item.add_marker(pytest.mark.filterwarnings(r"ignore::FutureWarning:ray\."))


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty bucket on a server on the loopback, known to this process and its children by the usual variables."""
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        patch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("PIXREC_CACHE", str(tmp_path_factory.mktemp("cache")))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fs, _ = storage.locate(BUCKET)
    fs.clear_instance_cache()  # another test's server
    fs, _ = storage.locate(BUCKET)
    fs.mkdir(BUCKET.removeprefix("s3://"))
    yield BUCKET
    fs.clear_instance_cache()
    server.stop()
    patch.undo()


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where the traces of all servers go."""
    with collecting() as found:
        yield found


@pytest.fixture(scope="session")
def ray_session(bucket: str, collector: Collector) -> Iterator[None]:
    """The one Ray instance of the test run; its workers know the bucket's server and what tests import."""
    from pixrec.cluster.session import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE.parent), prepend=os.pathsep)
        # A process less in every Train run (each takes seconds), and no waiting for Train to hear what is reported.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        patch.setattr("ray._private.node.Node.start_log_monitor", lambda node: None)  # nobody is shown what workers log
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with connect(progress=False):
            yield


@pytest.fixture
def train_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Model, list[Checkpoint]]]:
    """What a worker of the compact or the joint phase does, in this process as the only one; with its checkpoints."""
    kept: list[Checkpoint] = []
    begun: list[Begun] = []

    def report(metrics: dict[str, Any], checkpoint: Checkpoint, **_: Any) -> None:
        kept.append(Checkpoint(shutil.move(checkpoint.path, tmp_path / f"checkpoint-{len(kept)}")))

    def noted(*args: Any, **options: Any) -> Begun:
        begun.append(begin(*args, **options))
        return begun[-1]

    def run(phase: str, start: str, dataset: Dataset, config: Config, checkpoint: Checkpoint | None = None):
        before = len(kept)
        monkeypatch.setattr("ray.train.get_checkpoint", lambda: checkpoint)
        train._worker({**job_of(phase, start, dataset.uri, config), "mailbox": mailbox, "work": str(tmp_path)})
        return begun[-1].model, kept[before:]

    mailbox = SimpleNamespace(put=SimpleNamespace(remote=lambda rows: None))
    monkeypatch.setattr(train, "begin", noted)
    monkeypatch.setattr("ray.train.report", report)
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda mode: [])
    monkeypatch.setattr("ray.train.torch.get_device", lambda: "cpu")
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr("ray.get", lambda arrived: None)
    return run


class InOneProcess:
    """What the verbs ask of a Ray Data set, done in this process at the pace of whoever reads."""

    def __init__(self, blocks: Iterable[pa.Table]) -> None:
        self._blocks = blocks

    def map_batches(
        self, stage: Any, *, batch_size: int, fn_constructor_args: tuple[Any, ...] = (), **_: Any
    ) -> InOneProcess:
        work = stage(*fn_constructor_args) if isinstance(stage, type) else stage
        made = (work(batch) for batch in self._batches(batch_size))
        return InOneProcess(chain.from_iterable([one] if isinstance(one, pa.Table) else one for one in made))

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        return iter(self._blocks)

    def _batches(self, size: int) -> Iterator[pa.Table]:
        waiting = None
        for block in self._blocks:
            waiting = block if waiting is None else pa.concat_tables([waiting, block])
            while len(waiting) >= size:
                yield waiting.slice(0, size)
                waiting = waiting.slice(size)
        if waiting is not None and len(waiting):
            yield waiting


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], None]:
    """Lets a module of `pixrec.cluster` do in this process what it asks of Ray Data and of tasks, one after the other.

    A process of its own takes seconds to import torch and transformers, and what it does is the same.
    """

    def remote(**_: Any) -> Callable[[Callable[..., Any]], Any]:
        def task(work: Callable[..., Any]) -> Any:
            made = SimpleNamespace(remote=work)
            made.options = lambda **_: made
            return made

        return task

    data = SimpleNamespace(
        from_items=lambda rows, **_: InOneProcess([pa.Table.from_pylist(rows)]),
        range=lambda count: InOneProcess([pa.table({"id": range(count)})]),
        DataContext=ray.data.DataContext,
        ActorPoolStrategy=ray.data.ActorPoolStrategy,
    )
    node = SimpleNamespace(get_node_id=lambda: "0" * 56)
    stand_in = SimpleNamespace(data=data, remote=remote, get=lambda done: done, get_runtime_context=lambda: node)

    def apply(module: ModuleType) -> None:
        monkeypatch.setattr(module, "ray", stand_in)
        monkeypatch.setattr("pixrec.cluster.session.connect", contextlib.nullcontext)

    return apply


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder with tables for `prepare` and their pictures."""
    return write_raw(tmp_path / "raw")


@pytest.fixture
def slices_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` does its slices one after the other in this process: what they do is the same."""
    monkeypatch.setattr(prepare, "_on_ray", lambda work, rows, config: [work(row) for row in rows])
    monkeypatch.setattr("pixrec.cluster.session.connect", contextlib.nullcontext)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wants Ray fails."""

    def refuse(*args: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(prepare, "_on_ray", refuse)
    monkeypatch.setattr("pixrec.cluster.session.connect", refuse)
