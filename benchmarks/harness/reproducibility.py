"""Check that two runs of the benchmarks agree.

    python benchmarks/harness/reproducibility.py A.json B.json

`benchmarks/run.py … --json FILE` writes such files. Two ratios agree when their intervals overlap.
The program also counts the ratios whose interval in the first run holds the second run's value.
Exit 1 when fewer than nine in ten agree.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.harness.history import Record, ratio_of
from benchmarks.harness.paired import Ratio
from runtime.core.console import EXIT_CODES, run
from runtime.core.errors import UsageError, reading

ENOUGH = 0.9


@dataclass(frozen=True)
class Pair:
    """One ratio as two runs measured it.

    Attributes:
        name: Suite and contender.
        first: The first run's ratio.
        second: The second run's ratio.
    """

    name: str
    first: Ratio
    second: Ratio

    @property
    def agrees(self) -> bool:
        """Whether the intervals overlap."""
        return self.first.least <= self.second.most and self.second.least <= self.first.most

    @property
    def in_interval(self) -> bool:
        """Whether the first run's interval holds the second's value."""
        return self.first.least <= self.second.value <= self.first.most

    def __str__(self) -> str:
        return f"{self.name}: {self.first} against {self.second}"


def pairs(first: Sequence[Record], second: Sequence[Record]) -> list[Pair]:
    """Every ratio that both runs have.

    Args:
        first: The first run's records.
        second: The second run's records.

    Returns:
        The ratios in the first run's order.
    """
    later = {record["suite"]: record for record in second}
    return [
        Pair(
            f"{record['suite']}: ours / {name}",
            ratio_of(record, name),
            ratio_of(later[record["suite"]], name),
        )
        for record in first
        for name in record["ratios"]
        if name in later.get(record["suite"], {"ratios": {}})["ratios"]
    ]


def main(argv: Sequence[str]) -> int:
    """Compare two runs; returns the exit code.

    Args:
        argv: The command line without the program's name.

    Raises:
        UsageError: A file holds no records, or the runs have no ratio in common.
    """
    parser = argparse.ArgumentParser(
        "reproducibility.py", description="Do two runs of the benchmarks agree?", epilog=EXIT_CODES
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    compared = pairs(*(_load(path) for path in options.runs))
    if not compared:
        raise UsageError(
            "the two runs have no ratio in common",
            expected="the same suites in both",
            remedy="run the same command twice",
        )
    for pair in compared:
        if not pair.agrees:
            print(f"apart: {pair}")
    agreed, in_interval = sum(p.agrees for p in compared), sum(p.in_interval for p in compared)
    print(
        f"{agreed} of {len(compared)} ratios agree ({agreed / len(compared):.0%});"
        f" of {in_interval} the first run's interval holds the second's value"
    )
    print(json.dumps({"ratios": len(compared), "agree": agreed, "held": in_interval}))
    return int(agreed < ENOUGH * len(compared))


def _load(path: Path) -> list[Record]:
    with reading(path, "what benchmarks/run.py --json wrote", UsageError):
        records = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(records, list) or not all(
            isinstance(r, dict) and "ratios" in r for r in records
        ):
            raise ValueError("it holds no records")
        return records


if __name__ == "__main__":
    sys.exit(run(main))
