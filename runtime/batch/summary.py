"""Summary of a run: the progress line, the last line and `--report`.

The progress line and the last line name the thread that limits the speed.
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

# by stage, the thread that works on it
THREADS = {
    "read": "reading",
    "deform": "reading",
    "synthesize": "inference",
    "write": "writing",
}


class Summary:
    """The results of one run so far.

    Args:
        models: what makes the CTs, by name.
        seed: of all randomness.
        total: number of CTs to come.
        quiet: print no progress.
    """

    def __init__(self, models: Mapping[str, Maker], seed: int, total: int, *, quiet: bool):
        self._models, self._seed, self._started = dict(models), seed, time.perf_counter()
        self._results: list[CaseResult] = []
        # the model of each result; empty where none fitted
        self._model_names: list[str] = []
        self._progress = Progress("CTs", total, quiet=quiet)
        self._seconds = 0.0

    def slice_done(self, slices: int) -> None:
        """Show how far the next result is.

        Args:
            slices: number of its slices that are synthesized.
        """
        self._show(f"{slices} slices of the next")

    def add(self, result: CaseResult, model: str = "") -> None:
        """Count a result, and show the progress.

        Args:
            result: one that is final.
            model: the name of the model that synthesized it, where there are several.
        """
        self._results.append(result)
        self._model_names.append(model)
        self._show(result.case)

    def close(self) -> None:
        """Stop the clock, and end the progress line."""
        self._seconds = self._elapsed
        self._progress.close()

    @property
    def failed(self) -> int:
        """The number of results with an error."""
        return sum(r.error is not None for r in self._results)

    @property
    def busy(self) -> dict[str, float]:
        """Seconds of work of each thread. Threads overlap; the run waits for the busiest one."""
        busy = dict.fromkeys(THREADS.values(), 0.0)
        for result in self._results:
            for stage, seconds in result.seconds.items():
                busy[THREADS[stage]] += seconds
        return busy

    def __str__(self) -> str:
        """Return the last line of a run.

        For example `3 done, 1 failed, 900 slices in 12.0 s (75.0 slices/s), limited by inference
        (97 % busy)`.
        """
        succeeded = sum(r.error is None for r in self._results)
        skipped = sum(r.skipped for r in self._results)
        before = f" ({skipped} of them before)" if skipped else ""
        speed = (
            f"{self._slices} slices in {duration(self._elapsed)}"
            f" ({self._slices / self._elapsed:.1f} slices/s)"
        )
        return f"{succeeded} done{before}, {self.failed} failed, {speed}{self._limit()}"

    def to_json(self) -> dict[str, Any]:
        """Return the report that `--report` writes.

        Returns:
            Plain data with file names instead of paths. Several models stand under `models`, and
            each case names its own.
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
                for r, model in zip(self._results, self._model_names, strict=True)
            ],
        }

    @property
    def _elapsed(self) -> float:
        return self._seconds or time.perf_counter() - self._started

    @property
    def _slices(self) -> int:
        return sum(r.slices for r in self._results if not r.skipped)

    def _limit(self) -> str:
        """Name the busiest thread, and the share of the time in which it works."""
        thread, seconds = max(self.busy.items(), key=lambda item: item[1])
        workers = max(getattr(synth, "count", 1) for synth in self._models.values())
        share = seconds / self._elapsed / workers
        return f", limited by {thread} ({100 * share:.0f} % busy)" if seconds else ""

    def _show(self, note: str) -> None:
        speed = f"{self._slices / self._elapsed:.1f} slices/s" if self._slices else ""
        self._progress.update(
            len(self._results), f"{speed}{self._limit()}  {note}" if speed else note
        )


def _facts(synth: Maker) -> dict[str, Any]:
    """Return what the report states of a model."""
    return {
        "model": synth.manifest.name,
        "model_files": {name: file.sha256 for name, file in synth.manifest.files.items()},
        "backend": synth.backend,
    }
