"""A real Prometheus (Debian's `prometheus`) that scrapes a server, and what the queries of the dashboard give in it."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

DASHBOARD = Path(__file__).parents[1] / "serve" / "dashboard.json"
START_SECONDS = 60.0


def dashboard_queries(rate_interval: str) -> dict[str, str]:
    """The queries by panel and legend, with Grafana's interval for rates filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$__rate_interval", rate_interval)
        for panel in panels
        for target in panel["targets"]
    }


class Prometheus:
    """One that runs, by its address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def values(self, query: str) -> dict[str, float]:
        """What an instant query gives: numbers by the labels of their series, without those that are NaN."""
        asked = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"http://{self.address}/api/v1/query?{asked}", timeout=60) as answer:
            found = json.loads(answer.read())["data"]["result"]
        return {json.dumps(one["metric"]): float(one["value"][1]) for one in found if one["value"][1] != "NaN"}

    def picture(self, queries: list[str], minutes: int, file: str) -> None:
        """Draw them below each other by Prometheus's own page, in Debian's headless Chromium."""
        asked = {f"g{n}.{name}": value for n, query in enumerate(queries)
                 for name, value in (("expr", query), ("tab", 0), ("range_input", f"{minutes}m"))}  # fmt: skip
        page = f"http://{self.address}/classic/graph?{urllib.parse.urlencode(asked)}"
        options = [f"--window-size=1200,{100 + 520 * len(queries)}", "--virtual-time-budget=15000", "--hide-scrollbars"]
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *options, f"--screenshot={file}", page]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)


def installed() -> bool:
    return shutil.which("prometheus") is not None


@contextlib.contextmanager
def scraping(target: str, interval: str = "2s", ray: Path | None = None) -> Iterator[Prometheus]:
    """Scrape `host:port` every `interval` inside the block, and the nodes of a Ray cluster: `ray` is the file in which
    its head says where they are, prom_metrics_service_discovery.json."""
    times = {"scrape_interval": interval, "scrape_timeout": interval}
    jobs = [{"job_name": "pixrec", **times, "static_configs": [{"targets": [target]}]}]
    if ray is not None:
        jobs.append({"job_name": "ray", **times, "file_sd_configs": [{"files": [str(ray)], "refresh_interval": "5s"}]})
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        (Path(folder) / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))  # JSON is YAML
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command = ["prometheus", *options, f"--web.listen-address={address}"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                yield _ready(Prometheus(address), process)
            finally:
                process.terminate()


def _ready(prometheus: Prometheus, process: subprocess.Popen[bytes]) -> Prometheus:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{prometheus.address}/-/ready", timeout=5):
            return prometheus
        assert process.poll() is None, "prometheus has ended"
        assert time.monotonic() < deadline, "prometheus does not start"
        time.sleep(0.1)
