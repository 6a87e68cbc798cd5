"""What the node tells of itself: a line on standard error for each event, and the same events
counted for Prometheus.

No line holds an attribute of a patient or a UID of a source: studies and masks are called by
digests.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import Any

from ..core.errors import importing
from ..core.logfmt import log_line, one_line
from .metrics import Metrics

plain = one_line


class Events:
    """`events("stored", study=…)`: one line, one count.

    Safe to use from several threads. Raises `MissingComponent`.
    """

    def __init__(self) -> None:
        with importing(
            "prometheus_client",
            "prometheus_client, which counts what the node does",
            'pip install "mask2ct[node]"',
        ):
            from prometheus_client import CollectorRegistry, Counter, ProcessCollector
        self.registry: Any = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._count = Counter(
            "mask2ct_node_events",
            "What the node did, by kind and peer",
            ["event", "peer"],
            registry=self.registry,
        )
        self.metrics = Metrics(self.registry)
        self._lock = threading.Lock()

    def __call__(self, event: str, *, peer: str = "", **facts: object) -> None:
        """`peer`: a destination, or an AE title that is allowed: it becomes a label, so there
        are few of them.
        """
        self._count.labels(event, peer).inc()
        self.say(event, **({"peer": peer} if peer else {}), **facts)

    def say(self, event: str, **facts: object) -> None:
        """The line alone. Where it cannot be written, for a full disk, the work goes on without."""
        line = log_line(event, facts)
        with self._lock, suppress(OSError):
            print(line, file=sys.stderr, flush=True)
