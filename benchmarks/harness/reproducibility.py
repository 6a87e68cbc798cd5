"""Do two runs say the same?  python benchmarks/harness/reproducibility.py A.json B.json

Each file is what `benchmarks/run.py … --json FILE` wrote. Two ratios agree when the interval of one
holds the other's value, or the two intervals overlap: both are counted, the second is what is asked
for. Exit 1 when fewer than nine in ten agree.
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
    """One ratio as two runs measured it."""

    name: str
    one: Ratio
    other: Ratio

    @property
    def agrees(self) -> bool:
        """The intervals overlap."""
        return self.one.least <= self.other.most and self.other.least <= self.one.most

    @property
    def held(self) -> bool:
        """The first run's interval holds the second's value."""
        return self.one.least <= self.other.value <= self.one.most

    def __str__(self) -> str:
        return f"{self.name}: {self.one} against {self.other}"


def pairs(one: Sequence[Record], other: Sequence[Record]) -> list[Pair]:
    """Every ratio that both runs have."""
    later = {record["suite"]: record for record in other}
    return [
        Pair(
            f"{record['suite']}: ours / {name}",
            ratio_of(record, name),
            ratio_of(later[record["suite"]], name),
        )
        for record in one
        for name in record["ratios"]
        if name in later.get(record["suite"], {"ratios": {}})["ratios"]
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "agree.py", description="Do two runs of the benchmarks say the same?", epilog=EXIT_CODES
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    found = pairs(*(_load(path) for path in options.runs))
    if not found:
        raise UsageError(
            "the two runs have no ratio in common",
            expected="the same suites in both",
            remedy="run the same command twice",
        )
    for pair in found:
        if not pair.agrees:
            print(f"apart: {pair}")
    agreed, held = sum(p.agrees for p in found), sum(p.held for p in found)
    print(
        f"{agreed} of {len(found)} ratios agree ({agreed / len(found):.0%}); of {held} the first"
        " run's interval holds the second's value"
    )
    print(json.dumps({"ratios": len(found), "agree": agreed, "held": held}))
    return int(agreed < ENOUGH * len(found))


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
