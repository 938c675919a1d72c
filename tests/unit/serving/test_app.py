"""What is checked before Serve starts, and how the application is configured. Starts nothing."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from pixrec.config import Config, load_config
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.live.places import store_place
from pixrec.serving import app


@pytest.fixture
def artifacts(tmp_path: Path) -> dict[str, str]:
    for kind, marker in (("model", "model.json"), ("index", "CURRENT"), ("data", "dataset.json")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / marker).touch()
    return {kind: str(tmp_path / kind) for kind in ("model", "index", "data")}


@pytest.mark.parametrize(
    ("kind", "marker", "verb"),
    [("model", "model.json", "train"), ("index", "CURRENT", "embed"), ("data", "dataset.json", "prepare")],
)
def test_an_absent_part_stops_run_before_anything_starts(
    artifacts: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: str, marker: str, verb: str
) -> None:
    monkeypatch.setattr(app, "connect", lambda: pytest.fail("Ray was started"))
    app.check_artifacts(**artifacts)
    (Path(artifacts[kind]) / marker).unlink()
    with pytest.raises(ArtifactError, match=f"--{kind} .*{marker}.*pixrec {verb}"):
        app.run(**artifacts, config=Config(), host="127.0.0.1", port=8000)


def test_a_taken_port_stops_run_before_anything_starts(
    artifacts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "connect", lambda: pytest.fail("Ray was started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be used .* --port"):
            app.run(**artifacts, config=Config(), host="127.0.0.1", port=port)
    app.check_port("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 0), ("127.0.0.1", 65536), ("192.0.2.1", 8000)])
def test_an_unusable_address_is_the_users_error(host: str, port: int) -> None:
    with pytest.raises(InputError, match="--port"):
        app.check_port(host, port)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({}, "missing: index, model"),
        ({"model": "m", "index": "i", "modle": "x"}, "unknown: modle"),
        ({"model": "m", "index": "i", "config": "serve.yaml"}, "args.config"),
        ({"model": "m", "index": "i", "config": {"serve": {"max_kk": 3}}}, "max_k"),
    ],
)
def test_the_builder_names_what_is_wrong_with_its_args(args: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        app.builder(args)


def test_the_builder_takes_the_config_and_absolute_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(app.API_KEY_VARIABLE, raising=False)
    built = app.builder({"model": "m", "index": "s3://bucket/i", "config": {"serve": {"num_replicas": 4}}})
    recommender, config, *_ = built._bound_deployment.init_args
    assert config == load_config("serve: {num_replicas: 4, store: none}").serve
    source = recommender._bound_deployment.init_args[0]
    assert (source.model, source.index, source.data) == (str(tmp_path / "m"), "s3://bucket/i", None)


def test_where_events_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").mkdir()
    assert store_place("index", str(tmp_path / "index")) == str(tmp_path / "index" / "live.sqlite")
    assert store_place("index", "s3://bucket/index") == "none"
    assert store_place("index", str(tmp_path / "nowhere")) == "none"
    assert store_place("none", str(tmp_path / "index")) == "none"
    assert store_place("my.sqlite", "s3://bucket/index") == str(tmp_path / "my.sqlite")


def test_the_api_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(app.API_KEY_VARIABLE, "from the environment")
    assert app.with_keys(Config()).serve.api_key == "from the environment"
    assert app.with_keys(load_config("serve: {api_key: own}")).serve.api_key == "own"
    monkeypatch.delenv(app.API_KEY_VARIABLE)
    assert app.with_keys(Config()) == Config()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_block_and_are_given_back(number: int) -> None:
    before = signal.getsignal(number)
    with app._stopped_by_signals():
        os.kill(os.getpid(), number)
        signal.pause()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::1", "http://[::1]:80")],
)
def test_the_url_is_one_to_click(host: str, url: str) -> None:
    assert app._url(host, 80) == url
