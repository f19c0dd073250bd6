"""The client's span and the server's are of one trace: Triton exports to a collector what it was called under."""

from __future__ import annotations

import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support import bare_server
from trirank import RankClient, RankRequest
from trirank.observability import opentelemetry_hooks


class Collector(BaseHTTPRequestHandler):
    """Gives its server what is posted to it."""

    def do_POST(self):
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_spans_of_client_and_server_join(world, tmp_path):
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    collector.bodies = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    release = shutil.copytree(world.release, tmp_path / "release")
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    settings = (
        "mode=opentelemetry",
        "rate=1",
        "level=TIMESTAMPS",
        f"opentelemetry,url={url}",
        "opentelemetry,bsp_schedule_delay=200",
    )
    try:
        with bare_server(release / "models", tmp_path, *(f"--trace-config={each}" for each in settings)) as address:
            hooks = opentelemetry_hooks(provider.get_tracer("test"))
            with RankClient(address, deadline_s=20, event_hooks=hooks) as client:
                joined = False
                for _ in range(3):  # Triton's exporter drops a batch that a busy machine takes too long to receive
                    exporter.clear()
                    client.rank(RankRequest(item_ids=[1, 2, 3]))
                    (span,) = exporter.get_finished_spans()
                    # Triton posts JSON, ids in hexadecimal.
                    ids = [f"{span.context.trace_id:032x}".encode(), f"{span.context.span_id:016x}".encode()]
                    deadline = time.monotonic() + 20
                    while not joined and time.monotonic() < deadline:
                        time.sleep(0.2)
                        joined = any(all(each in body for each in ids) for body in collector.bodies)
                    if joined:
                        break
            assert joined, f"{len(collector.bodies)} exports, none of any of these traces"
    finally:
        collector.shutdown()
        collector.server_close()
