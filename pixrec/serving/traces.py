"""Traces of requests: the spans that Ray Serve makes on their way through the replicas, for a collector.

Ray Serve calls `spans` in the proxy and in every replica; `serve.traced_share` says for how many requests.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ray.serve.schema import TracingConfig

from pixrec.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def tracing(share: float) -> TracingConfig:
    """For `serve.start`. Raises ConfigError where the exporter is not installed."""
    if share and not _installed():
        raise ConfigError("serve.traced_share needs an OpenTelemetry exporter: pip install 'pixrec[traces]'")
    return TracingConfig(enabled=share > 0, exporter_import_path=f"{__name__}:{spans.__name__}", sampling_ratio=share)


def spans() -> list[SpanProcessor]:
    """Sends them by OTLP over HTTP to where the usual variables say (OTEL_EXPORTER_OTLP_ENDPOINT and its kind)."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def _installed() -> bool:
    try:
        return importlib.util.find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:  # a package above it
        return False
