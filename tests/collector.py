"""An OpenTelemetry collector on the loopback that keeps the spans it is sent."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Collector:
    """`names[trace id]`: the names of the spans that have come so far, in the order of their coming."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.names: dict[str, list[str]] = {}
        self.came = threading.Condition()

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        sent = ExportTraceServiceRequest.FromString(body)
        with self.came:
            for span in (s for resource in sent.resource_spans for scope in resource.scope_spans for s in scope.spans):
                self.names.setdefault(span.trace_id.hex(), []).append(span.name)
            self.came.notify_all()

    def wait_for(self, trace: str, parts: Sequence[str], seconds: float = 60) -> str:
        """The names of a trace's spans in a row, once all parts are among them, or after so long."""
        with self.came:
            self.came.wait_for(lambda: all(part in self.said(trace) for part in parts), seconds)
            return self.said(trace)

    def said(self, trace: str) -> str:
        return " ".join(self.names.get(trace, []))


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.take(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
