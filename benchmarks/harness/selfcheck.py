"""Check that the comparison finds what it must.

    python benchmarks/harness/selfcheck.py [--model MODEL] [--times 10]

It slows the synthesizer by half as much again, and not at all, TIMES times each, and counts how
often `benchmarks/run.py --compare` reports a regression. Exit 1 when it finds fewer than nine in
ten of the slow ones, or more than one in ten of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.harness.history import Record, make_record, noise, regressions
from benchmarks.harness.models import prepared
from benchmarks.harness.paired import Contender, measure
from benchmarks.harness.record import machine
from benchmarks.run import ROUNDS
from runtime.core.console import EXIT_CODES, Progress, run

SLOWDOWN = 0.5


def main(argv: Sequence[str]) -> int:
    """Compare and count; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "selfcheck.py",
        description="Does --compare find a planted slowdown, and nothing else?",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "--model", type=Path, help="a model folder (default: `edge`, made once under runs/bench)"
    )
    parser.add_argument(
        "--times", type=int, default=10, help="comparisons of each kind (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    model = options.model or prepared("edge").model
    counts = {"planted": 0, "nothing": 0}
    progress = Progress("comparisons", 2 * options.times, quiet=options.quiet)
    for n in range(options.times):
        base = _record(model, 0.0)
        for what, slowdown in (("planted", SLOWDOWN), ("nothing", 0.0)):
            counts[what] += bool(regressions(base, _record(model, slowdown)))
        progress.update(2 * (n + 1))
    progress.close()
    print(
        f"a slowdown of {SLOWDOWN:.0%} was called {counts['planted']} times of {options.times}, no"
        f" change {counts['nothing']} times of {options.times}"
    )
    print(
        json.dumps(
            {
                "suite": "selfcheck",
                "times": options.times,
                "called": counts,
                "load": noise(),
                "machine": machine(ROOT),
            }
        )
    )
    return int(counts["planted"] < 0.9 * options.times or counts["nothing"] > 0.1 * options.times)


def _record(model: Path, planted: float) -> Record:
    options = {"model": str(model), "slices": 32, "backend": "auto"}
    contenders = [
        Contender(
            "mask2ct synthesizer",
            "benchmarks.suites.engine:synthesizer",
            {**options, "planted": planted},
        ),
        Contender("its engine", "benchmarks.suites.engine:ours", options),
    ]
    return make_record("selfcheck", {}, "slices/s", measure(contenders, ROUNDS, quiet=True))


if __name__ == "__main__":
    sys.exit(run(main))
