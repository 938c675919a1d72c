"""Builds the Serve application and runs it: in the foreground for `pixrec serve`, on a cluster for `serve deploy`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from ray import serve
from ray.serve.schema import DeploymentStatus

from pixrec import errors, storage
from pixrec.cluster.session import connect
from pixrec.config import Config, change_config, load_config
from pixrec.errors import ArtifactError, ConfigError, InputError
from pixrec.live.places import PASSWORD_VARIABLE, store_place
from pixrec.serving.deployments import bind
from pixrec.serving.published import Published
from pixrec.serving.traces import tracing

APP_NAME = "pixrec"
API_KEY_VARIABLE = "PIXREC_API_KEY"
KEY_VARIABLES = {"api_key": API_KEY_VARIABLE, "admin_key": "PIXREC_ADMIN_KEY", "store_password": PASSWORD_VARIABLE}

_STATUS_SECONDS = 5.0

# What each artifact holds when it is complete, and the verb that makes it.
_MARKERS = {"model": ("model.json", "train"), "index": ("CURRENT", "embed"), "data": ("dataset.json", "prepare")}


def build_app(model: str, index: str, data: str | None, config: Config) -> serve.Application:
    """The application over a model, an index and a prepared data set (None: the one the index remembers).

    Nothing is loaded here; the replicas load, so the URIs must be readable from where they run.
    """
    model, index = storage.absolute(model), storage.absolute(index)  # a replica's working directory is another one
    data = None if data is None else storage.absolute(data)
    settings = with_keys(config).serve
    settings = dataclasses.replace(settings, store=store_place(settings.store, index))
    ranking = (settings.blend, settings.popularity_half_life_days, settings.new_item_share)
    return bind(Published(model, index, data, *ranking), settings)


def builder(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: `args` holds `model`, `index`, `data` and, as a tree of sections, `config`.

    Serve logs the args and keeps them, so the keys come from PIXREC_API_KEY and PIXREC_ADMIN_KEY instead. Raises
    ConfigError.
    """
    unknown = set(args) - {"model", "index", "data", "config"}
    missing = {"model", "index"} - set(args)
    if unknown or missing:
        raise ConfigError(
            f"the application's args need model and index, and may hold data and config; "
            f"unknown: {', '.join(sorted(unknown)) or 'none'}; missing: {', '.join(sorted(missing)) or 'none'}"
        )
    config = args.get("config") or {}
    if not isinstance(config, Mapping):
        raise ConfigError(f"the application's args.config is {config!r}: must be a mapping of sections")
    tree = load_config(yaml.safe_dump(dict(config)))
    return build_app(args["model"], args["index"], args.get("data"), tree)


def run(model: str, index: str, data: str | None, config: Config, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, then stop cleanly. Prints the URL to stderr once requests are answered.

    Raises ArtifactError, InputError or ConfigError before anything is started when a part is absent, the port is taken
    or traces are wanted that nothing can send.
    """
    check_artifacts(model, index, data)
    check_port(host, port)
    traces = tracing(config.serve.traced_share)
    with connect(), contextlib.ExitStack() as cleanup, _stopped_by_signals():
        cleanup.callback(serve.shutdown)
        http = {"host": host, "port": port}
        serve.start(http_options=http, proxy_location="HeadOnly", tracing_config=traces)
        _deploy(build_app(model, index, data, config))
        print(f"PixRec answers at {_url(host, port)} (stop with Ctrl-C)", file=sys.stderr, flush=True)
        threading.Event().wait()


def _deploy(app: serve.Application) -> None:
    """Returns once requests are answered. Raises ArtifactError when a replica says why it cannot load."""
    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        failure = _last_words()
        if failure.startswith(f"{errors.__name__}."):
            raise ArtifactError(failure.partition(": ")[2]) from None
        raise RuntimeError(f"the application did not start: {failure or error}") from error


def _last_words() -> str:
    """The last line of the first failed replica's traceback; Serve publishes it a moment after the failure."""
    deadline = time.monotonic() + _STATUS_SECONDS
    while time.monotonic() < deadline:
        deployments = serve.status().applications[APP_NAME].deployments.values()
        messages = [d.message.strip() for d in deployments if d.status == DeploymentStatus.DEPLOY_FAILED and d.message]
        if messages:
            return messages[0].splitlines()[-1]
        time.sleep(0.2)
    return ""


def with_keys(config: Config) -> Config:
    """The config with the API key and the admin key from the environment, where it names none itself."""
    for field, variable in KEY_VARIABLES.items():
        key = os.environ.get(variable)
        if key and not getattr(config.serve, field):
            config = change_config(config, {f"serve.{field}": key})
    return config


def check_artifacts(model: str, index: str, data: str | None) -> None:
    """Raise ArtifactError unless each part is there and complete."""
    for kind, uri in (("model", model), ("index", index), ("data", data)):
        marker, verb = _MARKERS[kind]
        if uri is not None and not storage.exists(storage.join(uri, marker)):
            raise ArtifactError(f"--{kind} {uri} holds no {marker}: make it with pixrec {verb}")


def check_port(host: str, port: int) -> None:
    """Raise InputError unless `host:port` can be bound."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}: must be in 1..65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"{host}:{port} cannot be used ({reason}); choose another --port or --host") from None


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the block; a second one, while things shut down, acts as it did before."""

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
