"""Serve /health, /ready and /metrics over HTTP, for a monitor of the node."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from ..core.errors import UsageError
from .connections import BoundedServer, PendingConnections
from .events import Events
from .study_spool import STATES, Spool

AT_ONCE = 16  # requests; one more ends the oldest
SECONDS = 10.0  # s for a request and its answer


class HealthServer:
    """The HTTP server of a node, in a thread of its own.

    Args:
        address: Host and port; port 0 is any free port.
        events: Holds the metrics.
        spool: Holds the studies, which are counted by state.
        healthy: Returns why the node is not healthy; empty when it is.
        ready: Returns why the node takes no objects; empty when it does.
        pending: Bounds the requests; None means `AT_ONCE` of `SECONDS` each.

    Raises:
        UsageError: When the port cannot be used.
    """

    def __init__(
        self,
        address: tuple[str, int],
        events: Events,
        spool: Spool,
        healthy: Callable[[], str],
        ready: Callable[[], str],
        pending: PendingConnections | None = None,
    ):
        from prometheus_client import Gauge

        # The label keeps its first name, which dashboards use.
        studies = Gauge(
            "mask2ct_node_studies", "Studies by state", ["room"], registry=events.registry
        )
        for state in STATES:
            studies.labels(state).set_function(partial(_count, spool, state))
        try:
            self._server = _Server(
                address,
                _handler(events, {"/health": healthy, "/ready": ready}),
                pending=pending or PendingConnections(AT_ONCE, SECONDS),
            )
        except OSError as exc:
            raise UsageError(
                f"--http-port {address[1]} cannot be had: {exc.strerror}",
                expected="a free port",
                remedy="choose another",
            ) from exc
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), daemon=True, name="http"
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """End listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(BoundedServer, HTTPServer):
    """Bounds the requests at once, and the time of each."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a request within its time."""
        with self.pending.hold(request):
            super().finish_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Print no traceback: a peer that hangs up is no news."""


def _count(spool: Spool, state: str) -> int:
    return len(spool.names(state))


def _handler(events: Events, checks: dict[str, Callable[[], str]]) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers requests; `checks` are by path."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    plain_text = "text/plain; charset=utf-8"

    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS
        # The versions of the software here are nobody's business.
        server_version, sys_version = "mask2ct", ""

        def do_GET(self) -> None:
            """Answer a request."""
            if self.path == "/metrics":
                self._reply(200, CONTENT_TYPE_LATEST, generate_latest(events.registry))
            elif self.path in checks:
                fault = checks[self.path]()
                self._reply(503 if fault else 200, plain_text, f"{fault or 'ok'}\n".encode())
            else:
                self._reply(404, plain_text, b"/health, /ready, /metrics\n")

        def _reply(self, code: int, content_type: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: a monitor asks every few seconds."""

    return Handler
