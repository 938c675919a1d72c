"""What Ray Serve is told about traces, and that the spans it hands over arrive."""

from __future__ import annotations

import pytest
from collector import collecting
from opentelemetry.sdk.trace import TracerProvider
from ray._common.utils import import_attr

from pixrec.errors import ConfigError
from pixrec.serving import traces


def test_serve_finds_the_exporter_and_a_share_of_nothing_is_none():
    told = traces.tracing(0.25)
    assert told.enabled
    assert told.sampling_ratio == 0.25
    assert import_attr(told.exporter_import_path) is traces.spans
    assert not traces.tracing(0.0).enabled


def test_an_exporter_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traces, "_EXPORTER", "opentelemetry.exporter.nowhere.http")
    with pytest.raises(ConfigError, match=r"pixrec\[traces\]"):
        traces.tracing(0.5)
    assert not traces.tracing(0.0).enabled


def test_spans_reach_the_collector_that_the_environment_names(monkeypatch: pytest.MonkeyPatch):
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        provider = TracerProvider()
        for processor in traces.spans():
            provider.add_span_processor(processor)
        with provider.get_tracer("test").start_as_current_span("recommend") as span:
            trace = f"{span.get_span_context().trace_id:032x}"
        provider.shutdown()
        assert collector.names == {trace: ["recommend"]}
