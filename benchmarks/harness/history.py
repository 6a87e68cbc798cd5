"""What was measured when, on which machine: one record a line in results/history.jsonl, and what
fell since.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.core.errors import UsageError, writing

from .paired import ROOT, Measured, Ratio, ratio
from .record import machine
from .roofline import PEAK

HISTORY = ROOT / "benchmarks" / "results" / "history.jsonl"
# of a ratio: less is what one run differs from the next on shared cores, whatever its rounds say
LEAST_FALL = 0.10
SURE = (
    0.05  # the chance of calling a fall where there is none, shared by all ratios that are compared
)

Record = dict[str, Any]


def make_record(
    suite: str,
    options: Mapping[str, Any],
    unit: str,
    measured: Mapping[str, Measured],
    shares: Mapping[str, tuple[str, float]] | None = None,
) -> Record:
    """A suite's result as JSON values.

    The first contender is ours; every other one but roofs gets a ratio, ours / it.

    `shares`: contender → the limit it is nearest to, and its share of it.
    """
    present = {name: m for name, m in measured.items() if m.absent is None}
    ours, *others = (name for name in present if not name.startswith(PEAK))
    ratios = {name: ratio(present[ours].rates, present[name].rates, len(others)) for name in others}
    return {
        "suite": suite,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "options": dict(options),
        "unit": unit,
        "machine": machine(ROOT),
        "load": noise(),
        "contenders": {name: _row(m, (shares or {}).get(name)) for name, m in present.items()},
        "absent": {name: m.absent for name, m in measured.items() if m.absent is not None},
        "ratios": {
            name: {"value": r.value, "least": r.least, "most": r.most} for name, r in ratios.items()
        },
    }


# Keys of a contender's row; others are its own facts.
STANDARD = (
    "rates",
    "median",
    "p90_seconds",
    "p99_seconds",
    "peak_rss",
    "roof",
    "share_of_roof",
    "error",
)


def _row(measured: Measured, share: tuple[str, float] | None) -> dict[str, Any]:
    seconds = sorted(1 / rate for rate in measured.rates)
    return {
        "rates": [float(f"{rate:.5g}") for rate in measured.rates],
        "median": statistics.median(measured.rates),
        "p90_seconds": seconds[math.ceil(0.90 * len(seconds)) - 1],
        "p99_seconds": seconds[math.ceil(0.99 * len(seconds)) - 1],
        "peak_rss": measured.peak_rss,
        **({} if measured.error is None else {"error": measured.error}),
        **({} if share is None else {"roof": share[0], "share_of_roof": share[1]}),
        **measured.facts,
    }


def noise() -> dict[str, float]:
    """The machine's load average, and the share of CPU time that a hypervisor stole since it
    booted.
    """
    try:
        ticks = [
            int(n)
            for n in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        ]
        return {"load": round(os.getloadavg()[0], 2), "steal": round(ticks[7] / sum(ticks), 4)}
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return {}


def ratio_of(record: Record, name: str) -> Ratio:
    return Ratio(**record["ratios"][name])


def append(records: Iterable[Record], path: Path = HISTORY) -> None:
    """Add a line each. Raises `OutputError`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def load(path: Path = HISTORY) -> list[Record]:
    """Every record, oldest first. Raises `UsageError` for a line that is none."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as exc:
            raise UsageError(
                f"line {number} of {path.name} is no record: {exc}",
                expected="one JSON object a line",
                remedy="remove the line",
                file=path,
            ) from exc
    return records


def fingerprint(record: Record) -> str:
    """The machine as far as it decides speed: processor, cores, memory."""
    m = record["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB"


def before(record: Record, records: Iterable[Record], revision: str) -> Record | None:
    """The last record of `records` to hold `record` against: same suite, options and machine, of
    `revision` or of any ("last").
    """
    same = [
        r
        for r in records
        if (r["suite"], r["options"], fingerprint(r))
        == (record["suite"], record["options"], fingerprint(record))
        and (revision == "last" or str(r["machine"]["commit"]).startswith(revision[:7]))
    ]
    return same[-1] if same else None


@dataclass(frozen=True)
class Regression:
    """A ratio, ours / `against`, that is lower than it was, by more than both runs' noise."""

    suite: str
    against: str
    was: float
    now: float

    def __str__(self) -> str:
        return (
            f"{self.suite}: ours / {self.against} fell from {self.was:.2f} to {self.now:.2f}"
            f" ({100 * (self.now / self.was - 1):.0f} %)"
        )


def regressions(old: Record, new: Record) -> list[Regression]:
    """Which ratios fell by more than LEAST_FALL and more than the noise: a one-sided Mann-Whitney
    test over the rounds' ratios at SURE, shared by all that are compared (Holm).
    """
    from scipy.stats import mannwhitneyu

    tried = []
    for name in old["ratios"].keys() & new["ratios"].keys():
        then, now = _round_ratios(old, name), _round_ratios(new, name)
        chance = float(mannwhitneyu(now, then, alternative="less", method="exact").pvalue)
        tried.append(
            (
                chance,
                Regression(new["suite"], name, statistics.median(then), statistics.median(now)),
            )
        )
    found = []
    for rank, (chance, fall) in enumerate(sorted(tried, key=lambda pair: pair[0])):
        if chance > SURE / (len(tried) - rank):
            break
        if fall.now < (1 - LEAST_FALL) * fall.was:
            found.append(fall)
    return found


def _round_ratios(record: Record, name: str) -> list[float]:
    ours = next(iter(record["contenders"].values()))["rates"]
    return [a / b for a, b in zip(ours, record["contenders"][name]["rates"], strict=True)]
