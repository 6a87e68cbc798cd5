"""Report the node's events: a log record for each, and a Prometheus counter.

No record has an attribute of a patient or a UID of a source: studies and masks have pseudonyms,
which are digests.
"""

from __future__ import annotations

from typing import Any

from ..core.errors import importing
from ..core.log import logger
from ..core.logfmt import one_line
from .metrics import Metrics

plain = one_line
_logger = logger(__name__)


class Events:
    """Logs and counts events: `events("stored", study=…)`. Safe to use from several threads.

    Attributes:
        registry: The `prometheus_client.CollectorRegistry` of this node.
        metrics: The other metrics of the node.

    Raises:
        MissingComponent: When prometheus_client is not installed.
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

    def __call__(self, event: str, *, peer: str = "", **facts: object) -> None:
        """Log and count an event.

        Args:
            event: Its kind, a label of the counter.
            peer: A destination or an allowed AE title, a label of the counter. Nothing else: there
                must be few values.
            facts: What the record says besides.
        """
        self._count.labels(event, peer).inc()
        self.say(event, **({"peer": peer} if peer else {}), **facts)

    def say(self, event: str, **facts: object) -> None:
        """Log an event without counting it.

        Args:
            event: Its kind.
            facts: What the record says besides; it has them as its attribute `facts`.
        """
        _logger.info("%s", event, extra={"facts": facts})
