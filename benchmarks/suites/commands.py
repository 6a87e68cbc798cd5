"""Suite `commands`: how long `python train/run.py` takes to answer before it trains, in starts/s.

`--help` answers without PyTorch; `--dry-run` of the phantom's config has data, networks and timed
steps. Beside both: a Python that imports PyTorch and nothing else. Each has a target in seconds.
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
    """The contenders.

    Returns:
        A group for each command.
    """
    baseline = Contender(
        "Python and torch",
        "benchmarks.suites.commands:start",
        {"line": ["-c", "import torch"]},
        cost={"start": 1},
    )
    named_groups = {}
    for name, most in TARGETS.items():
        options = {"line": ["train/run.py", *LINES[name]], "most": most}
        named_groups[f"commands {name}"] = [
            Contender(
                f"train/run.py {name}",
                "benchmarks.suites.commands:start",
                options,
                cost={"start": 1},
            ),
            baseline,
        ]
    return named_groups


def start(line: Sequence[str], most: float | None = None) -> Ready:
    """Run `python LINE` from the repository's root in each round.

    Args:
        line: The arguments.
        most: The seconds that it may take.

    Returns:
        The contender; its unit is starts.
    """
    seconds: list[float] = []
    facts: dict[str, object] = {} if most is None else {"at_most": {"seconds": most}}

    def run() -> float:
        before = time.perf_counter()
        subprocess.run([sys.executable, *line], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - before)
        facts["seconds"] = round(statistics.median(seconds), 3)
        # the program's peak stands in place of this process'
        facts["peak_rss"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
        return 1.0

    return Ready(run, facts=facts)
