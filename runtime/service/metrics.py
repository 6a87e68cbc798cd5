"""Which models are open and how long the work takes, for Prometheus.

What each metric means: docs/how-to/dicom-node.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

STAGES = ("read", "deform", "synthesize", "write", "send")
STAGE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # s
STUDY_BUCKETS = (
    1,
    2.5,
    5,
    10,
    15,
    20,
    30,
    45,
    60,
    120,
    300,
    600,
    1800,
    3600,
    14400,
)  # s; the quiet period is 10 s of them


class Metrics:
    """Registers with a `prometheus_client.CollectorRegistry`. Safe to use from several threads."""

    def __init__(self, registry: Any):
        from prometheus_client import Histogram, Info

        self._models = Info("mask2ct_model", "A model that is open", ["model"], registry=registry)
        self._stages = Histogram(
            "mask2ct_node_stage_seconds",
            "Working time of a stage: of one result, or to send one study to one destination",
            ["stage"],
            registry=registry,
            buckets=STAGE_BUCKETS,
        )
        self._studies = Histogram(
            "mask2ct_node_study_seconds",
            "From the arrival of a study's first object until every destination has its results",
            registry=registry,
            buckets=STUDY_BUCKETS,
        )
        for stage in STAGES:
            self._stages.labels(stage)
        self._arrived: dict[str, float] = {}
        self._lock = threading.Lock()

    def model(self, name: str, *, engine: str, manifest_sha256: str, model_sha256: str) -> None:
        """A model is open. `model_sha256`: of the file that the engine runs; empty where it runs
        none.
        """
        facts = {"engine": engine, "manifest_sha256": manifest_sha256, "model_sha256": model_sha256}
        self._models.labels(name).info(facts)

    def result(self, seconds: Mapping[str, float]) -> None:
        """The stages of one result, as `CaseResult.seconds` has them."""
        for stage, spent in seconds.items():
            self.stage(stage, spent)

    def stage(self, stage: str, seconds: float) -> None:
        """Count `seconds` of work."""
        self._stages.labels(stage).observe(seconds)

    def claimed(self, study: str, arrived: float) -> None:
        """Work on a study begins. `arrived`: when its first object came, s since 1970."""
        with self._lock:
            self._arrived[study] = arrived

    def settled(self, study: str) -> None:
        """All of it is where it belongs.

        A study that was generated before this process began is not counted.
        """
        with self._lock:
            arrived = self._arrived.pop(study, None)
        if arrived is not None:
            self._studies.observe(max(0.0, time.time() - arrived))
