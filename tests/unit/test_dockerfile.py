"""The Dockerfile by the rules that hadolint has, as far as they can be told from its text, and what it copies.

Where a builder is at hand it is also built and started, which takes minutes and so is asked for: PIXREC_BUILD_IMAGE in
the environment holds the further options of the build, or nothing (`benchmarks.image`).
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.image import build, can_build, start
from pixrec import __version__

ROOT = Path(__file__).parents[2]
Step = tuple[str, str]


def steps() -> list[Step]:
    """Instructions and their arguments; continued lines are joined, comments and blank lines left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages() -> dict[str, tuple[str, list[Step]]]:
    """Name -> what it is made from, and its steps."""
    found: dict[str, tuple[str, list[Step]]] = {}
    for word, rest in steps():
        if word == "FROM":
            parent, _, name = re.split(r"\s+", rest)
            found[name] = (parent, [])
        elif found:
            found[next(reversed(found))][1].append((word, rest))
    return found


def lineage(name: str) -> list[Step]:
    """The steps of a stage and of those it is made from, the first ones first."""
    known = stages()
    if name not in known:
        return []
    parent, own = known[name]
    return [*lineage(parent), *own]


TARGETS = ("cpu", "gpu")


def test_both_targets_are_there_and_no_stage_is_made_of_what_comes_later() -> None:
    seen: set[str] = set()
    for name, (parent, own) in stages().items():
        assert parent in seen | {"${BASE}"}, f"{name} is made from {parent}"
        for word, rest in own:
            if word == "COPY" and (source := re.match(r"--from=(\S+)", rest)):
                assert source[1] in seen
        seen.add(name)
    assert {*TARGETS} <= seen


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_somebody_and_says_how_it_is(target: str) -> None:
    words = lineage(target)
    users = [rest for word, rest in words if word == "USER"]
    assert users, "root"
    assert users[-1].isdigit(), "Kubernetes cannot tell whether a name is root (DL3002)"
    assert int(users[-1]) > 0
    assert f"--uid {users[-1]}" in " ".join(rest for word, rest in words if word == "RUN")
    assert [word for word, _ in words].count("HEALTHCHECK") == 1
    assert any(word == "CMD" and rest.startswith("[") for word, rest in words), "an exec form (DL3025)"


@pytest.mark.parametrize("target", TARGETS)
def test_a_new_version_of_pixrec_is_one_small_layer(target: str) -> None:
    own = [rest for word, rest in stages()[target][1] if word in ("COPY", "RUN")]
    assert own == [f"--from=dependencies-{target} /opt/pixrec /opt/pixrec", "--from=application /app /app"]
    dependencies = " ".join(rest for word, rest in lineage(f"dependencies-{target}") if word == "COPY")
    assert "pixrec " not in dependencies, "a change of the code would install everything anew"


def test_every_package_is_pinned_and_no_cache_stays() -> None:
    text = " && ".join(rest for word, rest in steps() if word == "RUN")
    for command in re.split(r"&&|;", text):
        words = shlex.split(command)
        if "apt-get" in words and "install" in words:
            assert {"--yes", "--no-install-recommends"} <= set(words), "DL3014, DL3015"
            assert "rm -rf /var/lib/apt/lists/*" in text, "DL3009"
        if any(word.endswith("pip") for word in words) and "install" in words:
            pinned = {"--constraint", "--no-deps"} & set(words) or "constraints.txt" in command
            assert pinned, f"DL3013: {command}"
    assert any(word == "ENV" and "PIP_NO_CACHE_DIR=1" in rest for word, rest in steps()), "DL3042"
    assert not [rest for word, rest in steps() if word in ("ADD", "MAINTAINER")], "DL3020, DL4000"
    assert not [rest for word, rest in steps() if word == "WORKDIR" and not rest.startswith("/")], "DL3000"
    assert not re.search(r"\bsudo\b|\bcd ", text), "DL3004, DL3003"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing is sent that is not named"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = [
        source
        for word, rest in steps()
        if word == "COPY" and not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    ]
    assert set(copied) == kept
    assert [source for source in copied if not (ROOT / source).exists()] == []
    secret = ["id_rsa", ".env", ".git/config", "shared/data/x.parquet", ".venv/bin/python"]
    assert not [path for path in secret if any(fnmatch.fnmatch(path, f"{name}*") for name in kept)]


def test_no_secret_is_an_argument_or_in_the_environment() -> None:
    named = " ".join(rest for word, rest in steps() if word in ("ARG", "ENV")).lower()
    assert not re.search(r"password|secret|aws_|api_key|_token=", named)


@pytest.mark.skipif("PIXREC_BUILD_IMAGE" not in os.environ, reason="PIXREC_BUILD_IMAGE is not set")
@pytest.mark.skipif(not can_build(), reason="buildah and debootstrap, or root, are lacking")
def test_it_builds_and_a_node_starts_in_it() -> None:
    built = build(shlex.split(os.environ["PIXREC_BUILD_IMAGE"]))
    assert built["application_mb"] < 10, "a new version is one small layer"
    assert start() == {"version": f"pixrec {__version__}", "user": "1000", "healthy": True}
