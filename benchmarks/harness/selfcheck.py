"""Does the comparison find what it must?  python benchmarks/harness/selfcheck.py [--model MODEL]
[--times 10]

Plants a slowdown of half as much again in the synthesizer, and nothing at all, TIMES times each,
and counts how often `benchmarks/run.py --compare` would have called a fall. Exit 1 when fewer than
nine in ten of the slow ones are found, or more than one in ten of the others.
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
    parser = argparse.ArgumentParser(
        "selfcheck.py",
        description="Does --compare find a planted slowdown, and nothing else?",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "--model", type=Path, help="a model folder (default: `edge`, made once under runs/bench)"
    )
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    model = options.model or prepared("edge").model
    found = {"planted": 0, "nothing": 0}
    progress = Progress("comparisons", 2 * options.times, quiet=options.quiet)
    for n in range(options.times):
        base = _record(model, 0.0)
        for what, slowdown in (("planted", SLOWDOWN), ("nothing", 0.0)):
            found[what] += bool(regressions(base, _record(model, slowdown)))
        progress.update(2 * (n + 1))
    progress.close()
    print(
        f"a slowdown of {SLOWDOWN:.0%} was called {found['planted']} times of {options.times}, no"
        f" change {found['nothing']} times of {options.times}"
    )
    print(
        json.dumps(
            {
                "suite": "selfcheck",
                "times": options.times,
                "called": found,
                "load": noise(),
                "machine": machine(ROOT),
            }
        )
    )
    return int(found["planted"] < 0.9 * options.times or found["nothing"] > 0.1 * options.times)


def _record(model: Path, planted: float) -> Record:
    given = {"model": str(model), "slices": 32, "backend": "auto"}
    contenders = [
        Contender(
            "mask2ct synthesizer",
            "benchmarks.suites.engine:synthesizer",
            {**given, "planted": planted},
        ),
        Contender("its engine", "benchmarks.suites.engine:ours", given),
    ]
    return make_record("selfcheck", {}, "slices/s", measure(contenders, ROUNDS, quiet=True))


if __name__ == "__main__":
    sys.exit(run(main))
