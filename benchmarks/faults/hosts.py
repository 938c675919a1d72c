"""A Ray cluster of several hosts on one machine, and what becomes of a whole pipeline while a host or its link fails.

    python -m benchmarks.faults.hosts [FAULT ...] [--workers 2] [--items 200]

FAULT is none, kill-prepare, kill-train, kill-embed (a worker node that does not run the job's own process, SIGKILL with
all its processes), kill-driver (the one that does), cut-train (its link for 30 s), kill-head, s3-503 (the endpoint
answers 503 for 60 s while training) or s3-slow (a second more for each answer, for 120 s); all by default. Each is one
`pixrec submit -- pipeline` of a small synthetic shop, whose results are compared with those of a single machine.

A host is a network namespace with an address of its own on a bridge, with its own processes, /tmp and /dev/shm: hosts
share no folder that anything is written to, but the S3 endpoint, which is moto's server. Needs root. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixrec import storage
from pixrec.artifact import load_index
from pixrec.config import SyntheticConfig
from pixrec.data.sequences import load_dataset
from pixrec.data.synthetic import build_world, write_catalog

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
BUCKET = "s3://hosts"
S3_PORT = 5000
PATIENCE_SECONDS = 1800
"""For anything, on a machine that others use as well."""
SAME_WORKERS, OTHER_WORKERS = 1e-6, 0.02
"""How far components of unit vectors may lie apart after 24 steps: as many ranks round alike, fewer do not."""
CUT_SECONDS, REFUSE_SECONDS, SLOW_SECONDS = 30, 60, 120
CONFIG = """
model: {user_tower: compact}
train:
  num_workers: 1
  max_workers: 2
  cpus_per_worker: 2
  max_steps: 24
  validate_every_steps: 4
  compact: {epochs: 1, validate_every_epochs: 1}
embed: {batch_size: 16, max_part_items: 16, num_actors: 2, cpus_per_actor: 1}
evaluate: {scorers: [popularity], bootstrap_samples: 100}
job: {cpus: 1, memory_gib: 0.5, attempts: 4}
"""


class NotAllowed(RuntimeError):
    """This machine makes no network namespaces for us."""


class Host:
    """A network namespace, and in it one Ray node with all its processes."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ray: Sequence[str], environment: dict[str, str]) -> None:
        """`ray start` with these options; ends with `kill`."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        mounts = f"mount --bind {self.folder}/tmp /tmp && mount -t tmpfs -o size=2g tmpfs /dev/shm"
        # Not `ray start --block`, which ends the node with whatever part of it ends, such as the server of Ray Client,
        # which gives up on a machine so busy that a node takes half a minute to start.
        # A node that has not started within half a minute gives up too: another try, when all that it left has ended
        # (-1 is all processes of the host).
        clear = "kill -9 -1; rm -rf /tmp/ray"
        shell = f'{mounts} || exit 1; for attempt in 1 2 3 4 5; do "$@" && exec sleep infinity; {clear}; done; exit 1'
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", shell, "host"]
        start = [str(BIN / "ray"), "start", f"--node-ip-address={self.address}", *ray]
        with open(self.folder / "ray.log", "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *own, *start],
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def kill(self) -> None:
        """As when the power goes: every process of the host, at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)  # the namespace's first process goes with it, and so do all
            self.process.wait()
            self.process = None


class Hosts:
    """A head that takes no work, workers of some CPUs each, and an S3 endpoint; a context manager."""

    def __init__(self, workers: int = 2, cpus: int = 3, start_seconds: float = PATIENCE_SECONDS) -> None:
        self.start_seconds = start_seconds
        self.id = secrets.token_hex(2)
        self.subnet = f"10.88.{secrets.randbelow(200) + 1}"
        self.bridge, self.gateway = f"px{self.id}", f"{self.subnet}.1"
        self.folder = Path(tempfile.mkdtemp(prefix="pixrec-hosts-"))
        names = ["head", *(f"worker{number}" for number in range(1, workers + 1))]
        self.hosts = [
            Host(f"px{self.id}-{name}", f"{self.subnet}.{10 + number}", self.folder / name)
            for number, name in enumerate(names)
        ]
        self.cpus = cpus
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",  # the machine's name, by which gloo finds its address, is that of all hosts
            "AWS_ENDPOINT_URL": f"http://{self.gateway}:{S3_PORT}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_V2_ENABLED": "1",
            # a lost host is noticed after 5 s rather than 15 to 30
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }
        for name in ("RAY_ADDRESS", "AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_SESSION_TOKEN"):
            self.environment.pop(name, None)

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def workers(self) -> list[Host]:
        return self.hosts[1:]

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://{self.head.address}:8265"

    def __enter__(self) -> Hosts:
        self._stack = contextlib.ExitStack()
        try:
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._make_network()
            for host in self.hosts:
                host.folder.mkdir()
                self._stack.callback(host.kill)
            self._start_head()
            for host in self.workers:
                self.start_worker(host)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make_network(self) -> None:
        if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
            raise NotAllowed("network namespaces need root, iproute2 and util-linux")
        self._ip(f"link add {self.bridge} type bridge")
        self._stack.callback(self._ip, f"link del {self.bridge}", check=False)
        self._ip(f"addr add {self.gateway}/24 dev {self.bridge}")
        self._ip(f"link set {self.bridge} up")
        for host in self.hosts:
            self._ip(f"netns add {host.name}")
            self._stack.callback(self._ip, f"netns del {host.name}", check=False)
            self._ip(f"link add {self.link(host)} type veth peer name eth0 netns {host.name}")
            self._ip(f"link set {self.link(host)} master {self.bridge} up")
            self._ip(f"-n {host.name} addr add {host.address}/24 dev eth0")
            for device in ("eth0", "lo"):
                self._ip(f"-n {host.name} link set {device} up")

    def _ip(self, words: str, check: bool = True) -> None:
        done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise NotAllowed(f"ip {words}: {done.stderr.strip()}")

    def link(self, host: Host) -> str:
        """The host's end on the bridge."""
        return f"v{self.id}-{self.hosts.index(host)}"

    def _start_head(self) -> None:
        options = ["--head", "--port=6379", f"--dashboard-host={self.head.address}", "--num-cpus=0"]
        self.head.start([*options, f"--object-store-memory={200 * 1024**2}"], self.environment)
        wait(lambda: self._alive() and self.nodes(), self.start_seconds, f"the head; see {self.folder}")

    def start_worker(self, host: Host) -> None:
        store = f"--object-store-memory={200 * 1024**2}"
        host.start([f"--address={self.head.address}:6379", f"--num-cpus={self.cpus}", store], self.environment)

    @contextlib.contextmanager
    def cut(self, host: Host) -> Iterator[None]:
        """Inside the block the host's link is down."""
        self._ip(f"link set {self.link(host)} down")
        try:
            yield
        finally:
            self._ip(f"link set {self.link(host)} up")

    def ready(self) -> None:
        """Return when all hosts are nodes of the cluster. Raises TimeoutError after `start_seconds`."""
        everybody = len(self.hosts)
        wait(
            lambda: self._alive() and len(self.nodes()) == everybody,
            self.start_seconds,
            f"the hosts; see {self.folder}",
        )

    def _alive(self) -> bool:
        """Raises RuntimeError where `ray start` of a host has ended by itself."""
        for host in self.hosts:
            if host.process is not None and host.process.poll() is not None:
                log = (host.folder / "ray.log").read_text()[-2000:]
                raise RuntimeError(f"the Ray node of {host.name} has ended: {log}")
        return True

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as the dashboard tells."""
        try:
            answer = self._get("/api/v0/nodes?detail=1")
        except OSError:
            return []
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def job(self, name: str) -> dict[str, Any]:
        """What the job server says of a job."""
        try:
            return dict(self._get(f"/api/jobs/{name}"))
        except OSError:
            return {}

    def driver_host(self, name: str) -> Host | None:
        """Where the job's own process runs."""
        node = self.job(name).get("driver_node_id")
        address = next((n["node_ip"] for n in self.nodes() if n["node_id"] == node), None)
        return next((host for host in self.hosts if host.address == address), None)

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.address + path)
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def pixrec(self, *arguments: str) -> subprocess.Popen[str]:
        """The command outside of all hosts, as on a developer's machine."""
        process = subprocess.Popen(
            [str(BIN / "pixrec"), *arguments],
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.address, "PIXREC_CACHE": f"{self.folder}/cache"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(process.kill)
        return process


class Endpoint:
    """moto's server on the bridge, behind which everything lies; may be told to refuse or to be slow."""

    def __init__(self, address: str) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
        self.refusing, self.slow_seconds = False, 0.0
        moto = DomainDispatcherApplication(create_backend_app)

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
            if self.refusing:
                start("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
            time.sleep(self.slow_seconds)
            return moto(environ, start)

        self._server = make_server(address, S3_PORT, answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


def wait(done: Callable[[], Any], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.2)


def pipeline(place: str) -> list[str]:
    """The command that makes everything below a place."""
    tables = [f"--{table}={BUCKET}/catalog/{table}.parquet" for table in ("items", "interactions")]
    return ["pipeline", *tables, f"--out={place}", f"--config={BUCKET}/config.yaml"]


class Run:
    """One `pixrec submit`; its log, line by line, as it comes."""

    def __init__(self, hosts: Hosts, name: str, command: Sequence[str]) -> None:
        config = f"--config={hosts.folder}/config.yaml"
        self.name, self.began = name, time.monotonic()
        self._process = hosts.pixrec("submit", "--name", name, config, "--", *command)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self.log.append(line.rstrip())

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.log)

    def until(self, pattern: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Return when the log has a line with this pattern."""

        def found() -> bool:
            if self._process.poll() is not None and not self.said(pattern):
                raise RuntimeError(f"{self.name} ended without {pattern!r}:\n" + "\n".join(self.log[-40:]))
            return self.said(pattern)

        wait(found, seconds, f"{pattern!r} of {self.name}")

    def summary(self, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        """What the run says at its end. Raises RuntimeError where it ends otherwise than done."""
        try:
            self._process.wait(seconds)
        finally:
            self._process.kill()
        self._reader.join(5)
        assert self._process.stdout is not None
        if self._process.returncode:
            raise RuntimeError(f"{self.name} exited with {self._process.returncode}:\n" + "\n".join(self.log[-40:]))
        with self._process.stdout as lines:
            return dict(json.loads(lines.read().splitlines()[-1]))


@contextlib.contextmanager
def reached(hosts: Hosts) -> Iterator[None]:
    """Inside the block this process knows the endpoint too."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in hosts.environment.items() if name.startswith("AWS_")})
    os.environ["PIXREC_CACHE"] = f"{hosts.folder}/cache"
    fs, _ = storage.locate(BUCKET)
    fs.clear_instance_cache()  # of another endpoint
    try:
        yield
    finally:
        fs.clear_instance_cache()
        os.environ.clear()
        os.environ.update(before)


def fill(hosts: Hosts, items: int, users: int, config: str = CONFIG) -> None:
    """The catalog and the settings onto the endpoint."""
    fs, _ = storage.locate(BUCKET)
    fs.mkdir(BUCKET.removeprefix("s3://"))
    with tempfile.TemporaryDirectory() as folder:
        write_catalog(build_world(SyntheticConfig(num_items=items, num_users=users)), folder)
        storage.copy_folder(folder, f"{BUCKET}/catalog")
    storage.write_bytes(f"{BUCKET}/config.yaml", config.encode())
    (hosts.folder / "config.yaml").write_text(config)


def single_machine(hosts: Hosts, place: str) -> dict[str, Any]:
    """The same pipeline on one machine, with as many workers, since sums over ranks are rounded by their number."""
    workers = f"train.num_workers={len(hosts.workers)}"
    small = [
        f"--set={name}"
        for name in (workers, "train.max_workers=null", "train.cpus_per_worker=0.3", "embed.cpus_per_actor=0.2")
    ]
    process = hosts.pixrec(*pipeline(place), *small)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    if process.returncode:
        raise RuntimeError(err)
    return dict(json.loads(out.splitlines()[-1]))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far the results of two runs are apart; also asserts that each item has one vector."""
    data, other = load_dataset(found["data"]), load_dataset(expected["data"])
    vectors = []
    for summary in (found, expected):
        index = load_index(summary["index"], version=summary["version"])
        assert len(set(index.item_ids)) == len(index.item_ids) == len(data.items), "every item once"
        vectors.append(index.vectors[np.argsort(list(index.item_ids))])
    metrics = [summary["results"]["pixrec"] for summary in (found, expected)]
    return {
        "data_equal": data.info["fingerprint"] == other.info["fingerprint"],
        "largest_vector_difference": float(np.abs(vectors[0] - vectors[1]).max()),
        "largest_metric_difference": max(
            abs(metrics[0][name] - metrics[1][name]) for name in metrics[0] if name != "ci95"
        ),
    }


FAULTS = (
    "none",
    "kill-prepare",
    "kill-train",
    "kill-embed",
    "kill-driver",
    "cut-train",
    "kill-head",
    "s3-503",
    "s3-slow",
)
MOMENTS = {"prepare": r"== prepare", "train": r"train both step 8:", "embed": r"== embed"}


def disturb(fault: str, hosts: Hosts, endpoint: Endpoint, run: Run) -> None:
    """Wait for the moment, and let it happen. A killed worker stays away until the next run."""
    what, _, when = fault.partition("-")
    if fault == "none":
        return
    run.until(MOMENTS.get(when, MOMENTS["train"]))
    driver = hosts.driver_host(run.name)
    other = next(host for host in hosts.workers if host is not driver)
    if fault == "cut-train":
        with hosts.cut(other):
            time.sleep(CUT_SECONDS)
        return
    if what == "s3":
        endpoint.refusing, endpoint.slow_seconds = fault == "s3-503", 1.0 if fault == "s3-slow" else 0.0
        time.sleep(REFUSE_SECONDS if fault == "s3-503" else SLOW_SECONDS)
        endpoint.refusing, endpoint.slow_seconds = False, 0.0
        return
    victim = hosts.head if when == "head" else driver if when == "driver" else other
    assert victim is not None
    victim.kill()
    print(f"{fault}: killed {victim.name} at {time.monotonic() - run.began:.0f} s", flush=True)
    if when == "head":
        for host in hosts.workers:
            host.kill()
        hosts._start_head()
        for host in hosts.workers:
            hosts.start_worker(host)
        hosts.ready()


def main(faults: list[str], workers: int, items: int) -> int:
    worst = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts go too
    with Hosts(workers) as hosts, Endpoint(hosts.gateway) as endpoint, reached(hosts):
        fill(hosts, items, 2 * items)
        expected = single_machine(hosts, f"{BUCKET}/single")
        for fault in faults:
            for host in hosts.workers:
                if host.process is None:
                    hosts.start_worker(host)
            hosts.ready()
            began = time.monotonic()
            try:
                apart = compare(undergo(fault, hosts, endpoint), expected)
            except (RuntimeError, TimeoutError) as error:
                apart = {"failed": str(error)}
            print(json.dumps({"fault": fault, "seconds": round(time.monotonic() - began), **apart}), flush=True)
            allowed = SAME_WORKERS if fault == "none" else OTHER_WORKERS
            worst |= not apart.get("data_equal") or apart["largest_vector_difference"] > allowed
    return int(worst)


def undergo(fault: str, hosts: Hosts, endpoint: Endpoint) -> dict[str, Any]:
    """What a pipeline says at its end that was disturbed so; one whose head went is submitted again."""
    run = Run(hosts, f"{fault}-{hosts.id}", pipeline(f"{BUCKET}/{fault}"))
    disturb(fault, hosts, endpoint, run)
    try:
        return run.summary()
    except RuntimeError:
        if fault != "kill-head":
            raise
        return Run(hosts, f"{fault}-again", pipeline(f"{BUCKET}/{fault}")).summary()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--items", type=int, default=200)
    given = parser.parse_args()
    sys.exit(main(given.faults or list(FAULTS), given.workers, given.items))
