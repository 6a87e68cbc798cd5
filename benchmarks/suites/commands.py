"""Suite `commands`: how long `python train/run.py` takes to answer before anything is trained.

Units: starts.

`--help` is answered without PyTorch, `--dry-run` of the phantom's config with data, networks and
timed steps; beside both, a Python that imports PyTorch and nothing else. Each has a bar in seconds.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from ..harness.paired import ROOT, Contender, Ready

TARGETS = {"--help": 3.0, "--dry-run": 20.0}  # s
LINES = {
    "--help": ["--help"],
    "--dry-run": ["--config", "train/configs/phantom.json", "--dry-run", "--quiet"],
}


def groups() -> dict[str, list[Contender]]:
    beside = Contender(
        "Python and torch",
        "benchmarks.suites.commands:start",
        {"line": ["-c", "import torch"]},
        cost={"start": 1},
    )
    found = {}
    for name, most in TARGETS.items():
        given = {"line": ["train/run.py", *LINES[name]], "most": most}
        found[f"commands {name}"] = [
            Contender(
                f"train/run.py {name}", "benchmarks.suites.commands:start", given, cost={"start": 1}
            ),
            beside,
        ]
    return found


def start(line: Sequence[str], most: float | None = None) -> Ready:
    """`python LINE` from the repository's root; `most`: the seconds it may take."""
    seconds: list[float] = []
    facts: dict[str, object] = {} if most is None else {"at_most": {"seconds": most}}

    def run() -> float:
        before = time.perf_counter()
        subprocess.run([sys.executable, *line], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - before)
        facts["seconds"] = round(statistics.median(seconds), 3)
        facts["peak_rss"] = (
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
        )  # the program's own, in the place of ours
        return 1.0

    return Ready(run, facts=facts)
