"""A Ray cluster of several hosts on one machine: network namespaces that share an S3 endpoint and no folder.

A host is a network namespace with an address of its own on a bridge, with its own processes, /tmp and /dev/shm: hosts
share no folder that anything is written to, but the S3 endpoint, which is moto's server. Needs root. Linux only.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixrec import storage
from pixrec.config import SyntheticConfig
from pixrec.data.synthetic import build_world, write_catalog

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
BUCKET = "s3://hosts"
S3_PORT = 5000
STORE_BYTES = 200 * 1024**2
"""Ray's object store on each host."""
PATIENCE_SECONDS = 1800
"""For anything, on a machine that others use as well."""


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
        # The log monitor sends each host's logs to drivers, which show none.
        options = ["--include-log-monitor=false", f"--node-ip-address={self.address}"]
        start = [str(BIN / "ray"), "start", *options, *ray]
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

    def __init__(
        self,
        workers: int = 2,
        cpus: int = 3,
        start_seconds: float = PATIENCE_SECONDS,
        head_options: Sequence[str] = (),
        more: Mapping[str, str] | None = None,
    ) -> None:
        """head_options, more: further options and environment of the head's `ray start`."""
        self.head_options, self.head_environment = head_options, more or {}
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
            "LOG_NAME_UPDATE_INTERVAL_S": "60",
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
            "RAY_prestart_worker_first_driver": "0",  # processes in advance, one a CPU
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
            self.start_head()
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
            self._ip(f"-n {host.name} route add default via {self.gateway}")  # leads nowhere, but tells the own address

    def _ip(self, words: str, check: bool = True) -> None:
        done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise NotAllowed(f"ip {words}: {done.stderr.strip()}")

    def link(self, host: Host) -> str:
        """The host's end on the bridge."""
        return f"v{self.id}-{self.hosts.index(host)}"

    def start_head(self) -> None:
        options = ["--head", "--port=6379", f"--dashboard-host={self.head.address}", "--num-cpus=0"]
        store = f"--object-store-memory={STORE_BYTES}"
        self.head.start([*options, store, *self.head_options], {**self.environment, **self.head_environment})
        wait(lambda: self._alive() and self.nodes(), self.start_seconds, f"the head; see {self.folder}")

    def start_worker(self, host: Host) -> None:
        store = f"--object-store-memory={STORE_BYTES}"
        host.start([f"--address={self.head.address}:6379", f"--num-cpus={self.cpus}", store], self.environment)

    def start_lost(self) -> None:
        """Start the workers anew that were killed, or that the cluster has given up since it could not reach them."""
        alive = {node["node_ip"] for node in self.nodes()}
        for host in self.workers:
            if host.process is None or host.address not in alive:
                host.kill()
                self.start_worker(host)
        self.ready()

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
            answer = self.ask("/api/v0/nodes?detail=1")
        except OSError:
            return []
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def metrics(self) -> Path:
        """The file in which the head says where the metrics of all nodes are to be scraped."""
        session = (self.head.folder / "tmp/ray").glob  # session_latest leads to the host's own /tmp
        wait(lambda: [*session("session_2*/prom_metrics*.json")], self.start_seconds, "where the metrics are")
        return next(session("session_2*/prom_metrics*.json"))

    def job(self, name: str) -> dict[str, Any]:
        """What the job server says of a job."""
        try:
            return dict(self.ask(f"/api/jobs/{name}"))
        except OSError:
            return {}

    def driver_host(self, name: str) -> Host | None:
        """Where the job's own process runs."""
        node = self.job(name).get("driver_node_id")
        address = next((n["node_ip"] for n in self.nodes() if n["node_id"] == node), None)
        return next((host for host in self.hosts if host.address == address), None)

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """What the head's dashboard answers. Raises OSError."""
        sent = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, sent, headers, method=method)
        with urllib.request.urlopen(request, timeout=5 if body is None else 60) as answer:
            return json.loads(answer.read() or b"null")

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


def fill(hosts: Hosts, items: int, users: int, config: str) -> None:
    """A synthetic catalog and the settings onto the endpoint, for a process that has `reached` it."""
    fs, bucket = storage.locate(BUCKET)
    fs.makedirs(bucket, exist_ok=True)  # the endpoint forgets nothing while this process lives
    with tempfile.TemporaryDirectory() as folder:
        write_catalog(build_world(SyntheticConfig(num_items=items, num_users=users)), folder)
        storage.copy_folder(folder, f"{BUCKET}/catalog")
    storage.write_bytes(f"{BUCKET}/config.yaml", config.encode())
    (hosts.folder / "config.yaml").write_text(config)
