"""Prometheus metrics of the node: its open models, and how long its work takes.

docs/how-to/dicom-node.md says what each metric means.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

STAGES = ("read", "deform", "synthesize", "write", "send")
STAGE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # s
# s, and fine around 10 s: each study takes at least the quiet period, which is 10 s by default.
STUDY_BUCKETS = (
    *(1, 2.5, 5, 10, 15, 20, 30, 45),
    *(60, 120, 300, 600, 1800, 3600, 14400),
)


class Metrics:
    """The metrics besides the events' counter. Safe to use from several threads.

    Args:
        registry: The `prometheus_client.CollectorRegistry` that receives them.
    """

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
        """Note an open model.

        Args:
            name: Its name in this node.
            engine: What computes it.
            manifest_sha256: Of its manifest.
            model_sha256: Of the file that the engine runs; empty when it runs none.
        """
        facts = {"engine": engine, "manifest_sha256": manifest_sha256, "model_sha256": model_sha256}
        self._models.labels(name).info(facts)

    def result(self, seconds: Mapping[str, float]) -> None:
        """Note the working time of one result.

        Args:
            seconds: By stage, as in `CaseResult.seconds`.
        """
        for stage, duration in seconds.items():
            self.stage(stage, duration)

    def stage(self, stage: str, seconds: float) -> None:
        """Note the working time of one stage.

        Args:
            stage: One of `STAGES`.
            seconds: How long it took.
        """
        self._stages.labels(stage).observe(seconds)

    def claimed(self, study: str, arrived: float) -> None:
        """Note that the work on a study begins.

        Args:
            study: Its name in the spool.
            arrived: When its first object arrived, in s since 1970.
        """
        with self._lock:
            self._arrived[study] = arrived

    def settled(self, study: str) -> None:
        """Note that every destination has a study.

        A study that was synthesized before this process began is not counted.

        Args:
            study: Its name in the spool.
        """
        with self._lock:
            arrived = self._arrived.pop(study, None)
        if arrived is not None:
            self._studies.observe(max(0.0, time.time() - arrived))
