"""Listing versions, going back, deleting old ones; the verb and its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pixrec import cli
from pixrec.artifact import (
    index_version,
    keep_newest,
    list_versions,
    load_index,
    pin_version,
    pinned_version,
    rollback,
)
from pixrec.errors import ArtifactError, InputError


def publish(uri: Path, count: int) -> list[str]:
    """`count` versions, the n-th of n + 1 items; returns their names, oldest first."""
    for n in range(count):
        ids = [f"i{row}" for row in range(n + 1)]
        with index_version(str(uri), "m" * 32, 2, "float32", {"data": "d"}) as writer:
            writer.add(ids, np.ones((len(ids), 2)), ids)
    return sorted(path.name for path in (uri / "versions").iterdir())


def test_versions_are_listed_oldest_first_and_only_whole_ones(tmp_path: Path):
    names = publish(tmp_path, 3)
    (tmp_path / "versions" / names[1] / "manifest.json").unlink()
    (tmp_path / "versions" / ".hidden").mkdir()
    found = list_versions(str(tmp_path))
    assert [(v["version"], v["rows"], v["current"]) for v in found] == [(names[0], 1, False), (names[2], 3, True)]


def test_rollback_changes_what_is_read_and_nothing_else(tmp_path: Path):
    names = publish(tmp_path, 3)
    assert rollback(str(tmp_path), names[0]) == names[2]
    assert len(load_index(str(tmp_path)).item_ids) == 1
    assert [v["version"] for v in list_versions(str(tmp_path))] == names
    for unknown in ("x", "", names[0][:-1], "../versions"):
        with pytest.raises(InputError, match=f"no version of .*{names[0]}.*{names[2]}"):
            rollback(str(tmp_path), unknown)


def test_old_versions_go_but_never_the_one_in_use(tmp_path: Path):
    names = publish(tmp_path, 5)
    rollback(str(tmp_path), names[1])
    assert keep_newest(str(tmp_path), 2) == [names[0], names[2]]
    assert [v["version"] for v in list_versions(str(tmp_path))] == [names[1], *names[3:]]
    assert len(load_index(str(tmp_path)).item_ids) == 2
    assert keep_newest(str(tmp_path), 9) == []
    with pytest.raises(InputError, match="at least 1"):
        keep_newest(str(tmp_path), 0)


def test_there_must_be_an_index(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"holds no index .* pixrec embed"):
        list_versions(str(tmp_path / "nowhere"))


@pytest.fixture
def index(tmp_path: Path) -> tuple[Path, list[str]]:
    return tmp_path, publish(tmp_path, 3)


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    capfd.readouterr()
    code = cli.main(["embed", *map(str, arguments)])
    captured = capfd.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_the_verb(index: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]):
    uri, names = index
    code, out, _ = run(capfd, "--out", uri, "--list")
    listed = json.loads(out[-1])
    assert (code, listed["current"]) == (0, names[2])
    assert [version["version"] for version in listed["versions"]] == names

    code, out, _ = run(capfd, "--out", uri, "--rollback", names[0])
    assert (code, json.loads(out[-1])) == (0, {"out": str(uri), "before": names[2], "current": names[0]})
    code, out, _ = run(capfd, "--out", uri, "--keep", 1)
    assert (code, json.loads(out[-1])) == (0, {"out": str(uri), "deleted": [names[1]]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollback", "yesterday"], "--rollback yesterday: no version of .*; there are 2"),
        (["--keep", "0"], "--keep 0: at least 1"),
        (["--keep", "0", "--model", "m", "--data", "d"], "--keep 0: at least 1"),
        ([], "needs --model and --data"),
        (["--model", "m"], "needs --model and --data"),
        (["--model", "m", "--keep", "1"], "needs --model and --data"),
        (["--list", "--rollback", "x"], "not allowed with"),
        (["--list", "--keep", "1"], "--list goes with --out alone"),
        (["--rollback", "x", "--model", "m", "--data", "d"], "--rollback with --out and --keep"),
        (["--keep", "few"], "invalid int value"),
    ],
)
def test_refusals(index: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str], arguments: list[str], message: str):
    uri, names = index
    try:
        code, out, err = run(capfd, "--out", uri, *arguments)
    except SystemExit as refusal:  # argparse's own
        code, out, err = refusal.code, [], capfd.readouterr().err
    assert (code, out, len(err.splitlines())) == (2, [], 1)
    assert re.search(message, err)
    assert [version["version"] for version in list_versions(str(uri))] == names


def test_a_pinned_version_stays_and_must_exist(tmp_path: Path):
    names, uri = publish(tmp_path, 3), str(tmp_path)
    assert pinned_version(uri) is None
    pin_version(uri, names[0])
    assert pinned_version(uri) == names[0]
    assert keep_newest(uri, 1) == [names[1]]
    with pytest.raises(ArtifactError, match="version ghost is not there"):
        pin_version(uri, "ghost")
    pin_version(uri, None)
    assert pinned_version(uri) is None
    assert len(load_index(uri, version=names[0]).item_ids) == 1
    assert len(load_index(uri).item_ids) == 3
