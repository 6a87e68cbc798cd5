"""Measure whether the speed targets for a CPU are met.

    python benchmarks/harness/targets.py [--record]

Our engine loses at most 3 % against the backend that it runs on, called bare with the same batch,
callers and threads. `edge` in INT8 by OpenVINO synthesizes at least 20 times as many slices a
second as `reference` in eager PyTorch at its best batch. A target is met where the ratio is above
it, and surely where the whole interval is. Exit 1 when one is not met.
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

from benchmarks.harness.history import Record, append, make_record, ratio_of
from benchmarks.harness.models import prepared
from benchmarks.harness.paired import Contender, measure
from benchmarks.harness.roofline import peaks_for, shares
from benchmarks.report import in_columns, measured_on, rows
from benchmarks.suites.engine import macs
from runtime.core.atomic_files import write_json
from runtime.core.console import EXIT_CODES, run

ROUNDS = 15  # many, because the first target leaves little room
SLICES = 64  # of the light network in a round
BATCHES = (1, 4, 8, 16)


@dataclass(frozen=True)
class Target:
    """A lower limit of ratios.

    Attributes:
        says: The target in words.
        least: The least ratio, ours / each other contender.
        contenders: What is measured together; ours is the first.
    """

    says: str
    least: float
    contenders: Sequence[Contender]


def targets(edge: Path) -> dict[str, Target]:
    """All targets.

    Args:
        edge: The light model's folder, with an INT8 graph.

    Returns:
        The targets by the name of their record.
    """
    reference = prepared("reference")
    options = {"model": str(edge), "slices": SLICES}
    cost, heavy = macs(edge), macs(reference.model)
    named_targets = {}
    for precision, suffix in (("fp32", ""), ("int8", "-int8")):
        for library, backend, make in (
            ("OpenVINO", "openvino", "by_openvino"),
            ("ONNX Runtime", "onnx", "by_onnxruntime"),
        ):
            contender = Contender(
                "mask2ct engine",
                "benchmarks.suites.engine:ours",
                {**options, "backend": backend + suffix},
                0,
                {precision: cost},
            )
            bare = Contender(
                library,
                f"benchmarks.harness.libraries:{make}",
                {**options, "precision": precision, "batch": 1},
                0,
                {precision: cost},
            )
            name = f"bar: engine against bare {library} {precision.upper()}"
            named_targets[name] = Target("our engine loses at most 3 %", 0.97, [contender, bare])
    contender = Contender(
        "edge, INT8, OpenVINO",
        "benchmarks.suites.engine:ours",
        {**options, "backend": "openvino-int8"},
        cost={"int8": cost},
    )
    eager_options = {
        "model": str(reference.model),
        "trained": str(reference.trained),
        "way": "eager",
        "slices": max(BATCHES),
    }
    eager = [
        Contender(
            f"reference, PyTorch eager, batch {n}",
            "benchmarks.harness.libraries:by_pytorch",
            {**eager_options, "batch": n},
            cost={"fp32": heavy},
        )
        for n in BATCHES
    ]
    named_targets["bar: edge INT8 against reference eager"] = Target(
        "at least 20 times as fast at its best batch", 20, [contender, *eager]
    )
    return named_targets


def verdict(target: Target, record: Record) -> tuple[bool, str]:
    """Whether a record meets a target. The contender with the lowest ratio decides.

    Args:
        target: The target.
        record: The record.

    Returns:
        Whether the target is met, and a line that says how.
    """
    name = min(record["ratios"], key=lambda n: float(record["ratios"][n]["value"]))
    worst = ratio_of(record, name)
    met = worst.value >= target.least
    how = "surely held" if worst.least >= target.least else "held" if met else "not held"
    return (
        met,
        (
            f"{record['suite']}: {target.says}: {how}, {worst.value:.3g} ({worst.least:.3g} …"
            f" {worst.most:.3g}) against {name}"
        ),
    )


def main(argv: Sequence[str]) -> int:
    """Measure all targets; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "targets.py", description="Measure the speed targets for a CPU.", epilog=EXIT_CODES
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="the light model, with an INT8 graph (default: `edge`, made once under runs/bench)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records here")
    parser.add_argument(
        "--record", action="store_true", help="append them to benchmarks/results/history.jsonl"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    records, verdicts = [], []
    for name, target in targets(options.model or prepared("edge").model).items():
        measured = measure(
            [*target.contenders, *peaks_for(target.contenders)], ROUNDS, quiet=options.quiet
        )
        record = make_record(
            name,
            {"quick": False, "rounds": ROUNDS},
            "slices/s",
            measured,
            shares(target.contenders, measured),
        )
        records.append(record)
        verdicts.append(verdict(target, record))
        print("\n".join(["", name, *in_columns(rows(record)), measured_on(record)]), flush=True)
    print("", *(text for _, text in verdicts), sep="\n")
    if options.json:
        write_json(options.json, records)
    if options.record:
        append(records)
    print(json.dumps(records))
    return 0 if all(met for met, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(run(main))
