"""Check in one command everything that only a GPU can show.

    python benchmarks/gpu_acceptance.py [--model MODEL] [--json FILE]

It runs with whatever is installed of TensorRT (full, lean, for RTX), ONNX Runtime, cuda-bindings
and torch; it does not need SimpleITK. Without --model it makes a small network with random weights,
for which it needs torch and onnx. Each check runs in a process of its own, so that one that crashes
fails alone. It prints pass, fail, not present or not run (its time is over) for each, then one JSON
line. Exit code: 0 nothing failed · 1 something did · 3 nothing could be checked (no GPU).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.gpu.case import Absent, Case, need_gpu
from benchmarks.gpu.engines import RUNTIME
from benchmarks.gpu.model import write_random_model
from benchmarks.gpu.parts import CHECKS
from benchmarks.harness.record import machine
from runtime.core.atomic_files import write_json
from runtime.core.console import run
from runtime.core.errors import Mask2CTError

PASS, FAIL, ABSENT, LATE = "pass", "fail", "not present", "not run"
SECONDS = 480  # for all checks together
ENGINES = {
    "tensorrt": "our TensorRT engine",
    "tensorrt-rtx": "our engine of TensorRT for RTX",
    "onnx-cuda": "our ONNX Runtime engine",
    "torch": "our slots around torch",
}


def main(argv: Sequence[str]) -> int:
    """Run the checks and print their outcomes; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "gpu_acceptance.py", description=(__doc__ or "").split("\n\n")[2]
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a model folder with fp32 and fp16 graphs (and an engine, for our own engines)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="CHECK", help="run these checks only: " + " ".join(titles())
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"the most time for all checks together (default {SECONDS})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # one check, in this process
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.check:
        print(
            json.dumps(
                one(options.check, Case(options.work / "model", options.work, options.quick))
            )
        )
        return 0
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-") as work:
        if options.model:  # an engine may be added to it
            shutil.copytree(options.model, Path(work) / "model")
        rows = {
            name: outcome(name, options, Path(work), until)
            for name in titles()
            if not options.only or name in options.only
        }
    width = max(len(title) for title in titles().values())
    for name, row in rows.items():
        print(f"{titles()[name]:<{width}}  {row['outcome']:<11}  {row['seen']}")
    outcomes = [row["outcome"] for row in rows.values()]
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in (PASS, FAIL, ABSENT, LATE)))
    record = {
        "suite": "gpu_acceptance",
        "model": str(options.model or "random weights"),
        "machine": machine(ROOT),
        "result": rows,
    }
    if options.json:
        write_json(options.json, record)
    print(json.dumps(record))
    return 1 if FAIL in outcomes else 0 if PASS in outcomes else 3


def titles() -> dict[str, str]:
    """The checks in the order in which they run: TensorRT's parts one by one, then our engines.

    Returns:
        What each check shows, by its name.
    """
    engine_checks = {
        f"{backend}-{name}": f"{engine}: {title}"
        for backend, engine in ENGINES.items()
        for name, (title, _) in RUNTIME.items()
    }
    return {
        "model": "the model to check with",
        **{name: title for name, (title, _) in CHECKS.items()},
        **engine_checks,
    }


def outcome(name: str, options: argparse.Namespace, work: Path, until: float) -> dict[str, Any]:
    """Run one check in a process of its own; one that ends without an answer has failed.

    Args:
        name: The check.
        options: The command line's options.
        work: A folder that all checks share.
        until: When the time of all checks is over, on the monotonic clock.

    Returns:
        "outcome" and "seen", what the check saw.
    """
    command = [sys.executable, __file__, "--check", name, "--work", str(work)]
    seconds = until - time.monotonic()
    if seconds <= 0:
        return {"outcome": LATE, "seen": f"the {options.seconds:g} s of all checks are over"}
    print(f"{titles()[name]} …", file=sys.stderr, flush=True)
    try:
        child = subprocess.run(
            [*command, *(["--quick"] if options.quick else [])],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": FAIL, "seen": f"no answer within {seconds:.0f} s"}
    lines = child.stdout.strip().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, ValueError):
        last_line = (child.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        how = (
            f"ended by signal {-child.returncode}"
            if child.returncode < 0
            else f"exit code {child.returncode}"
        )
        return {"outcome": FAIL, "seen": f"{how}: {last_line[:300]}"}


def one(name: str, case: Case) -> dict[str, Any]:
    """Run one check in this process.

    Args:
        name: The check.
        case: The model and the folder to work in.

    Returns:
        "outcome" and "seen", what the check saw.
    """
    try:
        if name == "model":
            return {"outcome": PASS, "seen": prepare(case)}
        if name in CHECKS:
            return {"outcome": PASS, "seen": CHECKS[name][1](case)}
        backend, _, what = name.rpartition("-")
        return {"outcome": PASS, "seen": RUNTIME[what][1](case, backend)}
    except Absent as exc:
        return {"outcome": ABSENT, "seen": str(exc)}
    except Mask2CTError as exc:
        return {"outcome": FAIL, "seen": exc.fact}
    except Exception as exc:  # whatever it is, it is the check's answer
        return {"outcome": FAIL, "seen": f"{type(exc).__name__}: {exc}"[:500]}


def prepare(case: Case) -> str:
    """Make the model if the user named none.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about the model.
    """
    need_gpu()
    if (case.model / "manifest.json").is_file():
        return f"{case.manifest.name}: {', '.join(case.manifest.files)}"
    write_random_model(case.model)
    return f"random weights, canvas {case.manifest.grid.canvas}"


if __name__ == "__main__":
    sys.exit(run(main))
