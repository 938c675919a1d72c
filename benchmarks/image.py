"""Builds the Dockerfile's `cpu` image without Docker, and starts a Ray node in it.

    python -m benchmarks.image [--option OPTION ...]

Needs root and Debian's buildah and debootstrap. The Dockerfile's own base lies in a registry; Debian bookworm, which
has the same Python, stands in for it. OPTION goes to `buildah bud`, as `--option=--build-arg=TORCH_INDEX=URL` or
`--option=--volume=/etc/pip.conf:/etc/pip.conf:ro`. Prints one JSON object: seconds, megabytes, and what was seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASE, IMAGE = "localhost/pixrec-base", "localhost/pixrec-cpu"
HEALTHY_SECONDS = 180.0
ASKED = {"version": ("pixrec", "--version"), "user": ("id", "-u")}


def can_build() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("buildah", "debootstrap")))


def buildah(*words: str, **options: Any) -> str:
    """What a command says. Raises CalledProcessError."""
    return subprocess.run(["buildah", *words], check=True, stdout=subprocess.PIPE, text=True, **options).stdout.strip()


@contextlib.contextmanager
def container(image: str) -> Iterator[str]:
    """A working container, for the length of the block."""
    name = buildah("from", "--pull-never", image)
    try:
        yield name
    finally:
        buildah("rm", name)


def make_base() -> None:
    """Debian with a Python, once."""
    if buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        return
    with container("scratch") as name:
        root = buildah("mount", name)
        packages = "--include=python3,python3-venv,ca-certificates,procps"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", root], check=True, stdout=2)
        buildah("umount", name)
        buildah("commit", name, BASE)


def build(options: Sequence[str]) -> dict[str, float]:
    """Build the image; seconds of it, and megabytes of it and of its last layer, which a new version changes."""
    make_base()
    began = time.monotonic()
    stage = ["--build-arg", f"BASE={BASE}", "--target", "cpu", "--tag", IMAGE]
    buildah("bud", "--isolation", "chroot", "--layers", "--pull-never", *stage, *options, str(ROOT))
    seconds = time.monotonic() - began
    size = json.loads(buildah("images", "--json", IMAGE))[0]["size"]
    with container(IMAGE) as name:
        application = Path(buildah("mount", name)) / "app"
        own = sum(file.stat().st_size for file in application.rglob("*") if file.is_file())
    return {"build_seconds": round(seconds), "image": size, "application_mb": round(own / 1e6, 1)}


def health_check() -> str:
    """The command of the Dockerfile's HEALTHCHECK."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found = re.search(r"^HEALTHCHECK .* CMD (.*)$", text, re.MULTILINE)
    assert found is not None
    return found[1]


def start() -> dict[str, Any]:
    """Start a Ray node in the image, as the manifests do, until its health check is content; what was seen."""
    with container(IMAGE) as name:

        def inside(*words: str, **more: str) -> list[str]:
            environment = [text for key, value in more.items() for text in ("--env", f"{key}={value}")]
            return ["run", "--isolation", "chroot", *environment, name, "--", *words]

        seen: dict[str, Any] = {
            "version": buildah(*inside("pixrec", "--version")),
            "user": buildah(*inside("id", "-u")),
        }
        ray = ["ray", "start", "--head", "--block", "--num-cpus=1", f"--object-store-memory={100 * 1024**2}"]
        command = ["buildah", *inside(*ray, "--port=26379", RAY_AUTH_TOKEN=secrets.token_hex(32))]
        node = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            seen["healthy"] = _healthy(inside("sh", "-c", health_check()), node)
        finally:
            os.killpg(node.pid, signal.SIGTERM)
            node.wait(60)
    return seen


def _healthy(check: list[str], node: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + HEALTHY_SECONDS
    while node.poll() is None and time.monotonic() < deadline:
        time.sleep(1)
        if subprocess.run(["buildah", *check], stdout=subprocess.DEVNULL, check=False).returncode == 0:
            return True
    return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--option", action="append", default=[])
    print(json.dumps({**build(parser.parse_args().option), **start()}))
