"""What a run says of itself: the progress line with the stage that limits it, the last line,
`--report`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.console import Progress, duration
from ..core.version import VERSION
from .runner import CaseResult

if TYPE_CHECKING:
    from ..synthesizer import VolumeSynthesizer
    from .ray_runner import RaySynthesizer
    from .warp_source import WarpSource

    Maker = VolumeSynthesizer | RaySynthesizer | WarpSource

THREADS = {
    "read": "reading",
    "deform": "reading",
    "synthesize": "inference",
    "write": "writing",
}  # stage → which thread's time it is


class Summary:
    """The results of one run so far."""

    def __init__(self, models: Mapping[str, Maker], seed: int, total: int, *, quiet: bool):
        self._models, self._seed, self._started = dict(models), seed, time.perf_counter()
        self._results: list[CaseResult] = []
        self._by: list[str] = []  # of each result, the model; empty where none fitted
        self._progress = Progress("CTs", total, quiet=quiet)
        self._seconds = 0.0

    def slice_done(self, slices: int) -> None:
        """That many slices of the next result are synthesized."""
        self._show(f"{slices} slices of the next")

    def add(self, result: CaseResult, model: str = "") -> None:
        """`model`: the name of the one that synthesized it, where there are several."""
        self._results.append(result)
        self._by.append(model)
        self._show(result.case)

    def close(self) -> None:
        self._seconds = self._elapsed
        self._progress.close()

    @property
    def failed(self) -> int:
        return sum(r.error is not None for r in self._results)

    @property
    def busy(self) -> dict[str, float]:
        """Seconds of work by thread: they overlap, and the largest is what the run waits for."""
        busy = dict.fromkeys(THREADS.values(), 0.0)
        for result in self._results:
            for stage, seconds in result.seconds.items():
                busy[THREADS[stage]] += seconds
        return busy

    def __str__(self) -> str:
        """`3 done, 1 failed, 900 slices in 12.0 s (75.0 slices/s), limited by inference (97 %
        busy)`.
        """
        skipped, done = (
            sum(r.skipped for r in self._results),
            sum(r.error is None for r in self._results),
        )
        kept = f" ({skipped} of them before)" if skipped else ""
        speed = (
            f"{self._slices} slices in {duration(self._elapsed)}"
            f" ({self._slices / self._elapsed:.1f} slices/s)"
        )
        return f"{done} done{kept}, {self.failed} failed, {speed}{self._limit()}"

    def to_json(self) -> dict[str, Any]:
        """Machine-readable: file names, no paths.

        Of several models, each under `models` and by its name in the cases.
        """
        facts = {name: _facts(synth) for name, synth in self._models.items()}
        return {
            "version": VERSION,
            **({"models": facts} if len(facts) > 1 else next(iter(facts.values()))),
            "seed": self._seed,
            "seconds": round(self._elapsed, 3),
            "busy": {thread: round(seconds, 3) for thread, seconds in self.busy.items()},
            "cases": [
                {
                    "case": r.case,
                    **({"model": model} if len(facts) > 1 else {}),
                    "variant": r.variant,
                    "seed": self._seed,
                    "files": [file.name for file in r.files],
                    "input_sha256": dict(r.input),
                    "output_sha256": dict(r.sha256),
                    "slices": r.slices,
                    "skipped": r.skipped,
                    "seconds": {stage: round(s, 4) for stage, s in r.seconds.items()},
                    "warnings": list(r.warnings),
                    "error": None if r.error is None else str(r.error),
                }
                for r, model in zip(self._results, self._by, strict=True)
            ],
        }

    @property
    def _elapsed(self) -> float:
        return self._seconds or time.perf_counter() - self._started

    @property
    def _slices(self) -> int:
        return sum(r.slices for r in self._results if not r.skipped)

    def _limit(self) -> str:
        thread, seconds = max(self.busy.items(), key=lambda item: item[1])
        share = (
            seconds
            / self._elapsed
            / max(getattr(synth, "count", 1) for synth in self._models.values())
        )  # workers
        return f", limited by {thread} ({100 * share:.0f} % busy)" if seconds else ""

    def _show(self, note: str) -> None:
        speed = f"{self._slices / self._elapsed:.1f} slices/s" if self._slices else ""
        self._progress.update(
            len(self._results), f"{speed}{self._limit()}  {note}" if speed else note
        )


def _facts(synth: Maker) -> dict[str, Any]:
    return {
        "model": synth.manifest.name,
        "model_files": {name: file.sha256 for name, file in synth.manifest.files.items()},
        "backend": synth.backend,
    }
