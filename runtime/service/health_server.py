"""GET /health, /ready and /metrics, for whoever watches the node."""

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
SECONDS = 10.0  # for a request and its answer


class HealthServer:
    """The HTTP port. `healthy`, `ready`: what is wrong, or nothing; 503 says it.

    Raises `UsageError` when the port is taken.
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

        rooms = Gauge(
            "mask2ct_node_studies", "Studies by where they are", ["room"], registry=events.registry
        )
        for room in STATES:
            rooms.labels(room).set_function(partial(_count, spool, room))
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
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(BoundedServer, HTTPServer):
    """Takes few at once, and gives each little time in all, for the request and the answer."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        with self.pending.hold(request):
            super().finish_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """No traceback for who hangs up."""


def _count(spool: Spool, room: str) -> int:
    return len(spool.names(room))


def _handler(events: Events, checks: dict[str, Callable[[], str]]) -> type[BaseHTTPRequestHandler]:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS
        server_version, sys_version = "mask2ct", ""  # what else runs here is nobody's business

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._reply(200, CONTENT_TYPE_LATEST, generate_latest(events.registry))
            elif self.path in checks:
                wrong = checks[self.path]()
                self._reply(
                    503 if wrong else 200,
                    "text/plain; charset=utf-8",
                    f"{wrong or 'ok'}\n".encode(),
                )
            else:
                self._reply(404, "text/plain; charset=utf-8", b"/health, /ready, /metrics\n")

        def _reply(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: who watches asks every few seconds."""

    return Handler
