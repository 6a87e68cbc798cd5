"""Records of measurements, one a line in results/history.jsonl, and the ratios that fell since.

A record says what was measured when, and on which machine.
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

from runtime.core.append_log import AppendLog
from runtime.core.errors import UsageError, writing

from .paired import ROOT, Measured, Ratio, ratio
from .record import machine
from .roofline import PEAK

HISTORY = ROOT / "benchmarks" / "results" / "history.jsonl"
# The least regression of a ratio that counts. On shared cores one run differs from the next by
# less, whatever its rounds say.
LEAST_REGRESSION = 0.10
# The chance of a false regression, shared by all ratios that are compared.
ALPHA = 0.05

Record = dict[str, Any]


def make_record(
    suite: str,
    options: Mapping[str, Any],
    unit: str,
    measured: Mapping[str, Measured],
    shares: Mapping[str, tuple[str, float]] | None = None,
) -> Record:
    """A suite's result as JSON values.

    The first contender is ours. Every other one but the roofline peaks gets a ratio, ours / it.

    Args:
        suite: The suite's name.
        options: What another record must share to be compared with this one.
        unit: The unit of the rates.
        measured: The contenders' results by name.
        shares: By contender: the limit that it is nearest to, and its share of it.

    Returns:
        The record.
    """
    present = {name: m for name, m in measured.items() if m.absent is None}
    first, *baselines = (name for name in present if not name.startswith(PEAK))
    ratios = {
        name: ratio(present[first].rates, present[name].rates, len(baselines)) for name in baselines
    }
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


# Keys of a contender's row. All other keys are facts that the contender states.
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
    """How busy the machine is.

    Returns:
        The load average ("load"), and the share of CPU time that a hypervisor stole since the
        machine booted ("steal"); empty where the system does not tell.
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
    """A ratio of a record.

    Args:
        record: The record.
        name: The contender that ours is compared with.
    """
    return Ratio(**record["ratios"][name])


def append(records: Iterable[Record], path: Path = HISTORY) -> None:
    """Append a line for each record.

    Args:
        records: The records.
        path: The file.

    Raises:
        OutputError: The file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    AppendLog(path, checksums=False).add(*records)


def load(path: Path = HISTORY) -> list[Record]:
    """Read every record.

    Args:
        path: The file.

    Returns:
        Records, oldest first.

    Raises:
        UsageError: A line is not a record.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as exc:
            raise UsageError(
                f"line {number} of {path.name} is not a record: {exc}",
                expected="one JSON object a line",
                remedy="remove the line",
                file=path,
            ) from exc
    return records


def fingerprint(record: Record) -> str:
    """The machine as far as it decides speed.

    Args:
        record: The record.

    Returns:
        Processor, cores, memory.
    """
    m = record["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB"


def before(record: Record, records: Iterable[Record], revision: str) -> Record | None:
    """Find the record to compare another one with.

    Args:
        record: The new record.
        records: All records, oldest first.
        revision: The commit of the old record, or "last" for any.

    Returns:
        The last record of the same suite, options and machine; None if there is none.
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
    """A ratio that is lower than it was, by more than the noise of both runs.

    Attributes:
        suite: The suite.
        against: The contender that ours is compared with.
        was: The old ratio.
        now: The new ratio.
    """

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
    """Find the ratios that fell by more than LEAST_REGRESSION and by more than the noise.

    A one-sided Mann-Whitney test over the rounds' ratios at ALPHA; all ratios share the level
    (Holm).

    Args:
        old: The earlier record.
        new: The later record.

    Returns:
        The regressions, the least likely by chance first.
    """
    from scipy.stats import mannwhitneyu

    compared = []
    for name in old["ratios"].keys() & new["ratios"].keys():
        then, now = _round_ratios(old, name), _round_ratios(new, name)
        chance = float(mannwhitneyu(now, then, alternative="less", method="exact").pvalue)
        compared.append(
            (
                chance,
                Regression(new["suite"], name, statistics.median(then), statistics.median(now)),
            )
        )
    fallen = []
    for rank, (chance, regression) in enumerate(sorted(compared, key=lambda pair: pair[0])):
        if chance > ALPHA / (len(compared) - rank):
            break
        if regression.now < (1 - LEAST_REGRESSION) * regression.was:
            fallen.append(regression)
    return fallen


def _round_ratios(record: Record, name: str) -> list[float]:
    """The ratio of each round, ours / `name`."""
    rates = next(iter(record["contenders"].values()))["rates"]
    return [a / b for a, b in zip(rates, record["contenders"][name]["rates"], strict=True)]
