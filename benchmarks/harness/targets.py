"""What must hold on a CPU, measured:  python benchmarks/harness/targets.py [--record]

Our engine loses at most 3 % against the backend it runs on, called bare with the same batch,
callers and threads. `edge` in INT8 by OpenVINO synthesizes at least 20 times as many slices a
second as `reference` in eager PyTorch at whichever batch suits it best. A bar is held where the
ratio is above it, and surely where its whole interval is. Exit 1 when one is not held.
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
from benchmarks.harness.roofline import beside, shares
from benchmarks.report import in_columns, measured_on, rows
from benchmarks.suites.engine import macs
from runtime.core.atomic_files import write_json
from runtime.core.console import EXIT_CODES, run

ROUNDS = 15  # the first bar is narrow
SLICES = 64  # of the light network, a round
BATCHES = (1, 4, 8, 16)


@dataclass(frozen=True)
class Target:
    """`least`: of every ratio, ours / it, in the group that the contenders are measured in."""

    says: str
    least: float
    contenders: Sequence[Contender]


def targets(edge: Path) -> dict[str, Target]:
    """`edge`: the light model's folder, with an INT8 graph."""
    reference = prepared("reference")
    given = {"model": str(edge), "slices": SLICES}
    cost, heavy = macs(edge), macs(reference.model)
    found = {}
    for precision, suffix in (("fp32", ""), ("int8", "-int8")):
        for library, backend, make in (
            ("OpenVINO", "openvino", "by_openvino"),
            ("ONNX Runtime", "onnx", "by_onnxruntime"),
        ):
            ours = Contender(
                "mask2ct engine",
                "benchmarks.suites.engine:ours",
                {**given, "backend": backend + suffix},
                0,
                {precision: cost},
            )
            bare = Contender(
                library,
                f"benchmarks.harness.libraries:{make}",
                {**given, "precision": precision, "batch": 1},
                0,
                {precision: cost},
            )
            name = f"bar: engine against bare {library} {precision.upper()}"
            found[name] = Target("our engine loses at most 3 %", 0.97, [ours, bare])
    ours = Contender(
        "edge, INT8, OpenVINO",
        "benchmarks.suites.engine:ours",
        {**given, "backend": "openvino-int8"},
        cost={"int8": cost},
    )
    options = {
        "model": str(reference.model),
        "trained": str(reference.trained),
        "way": "eager",
        "slices": max(BATCHES),
    }
    eager = [
        Contender(
            f"reference, PyTorch eager, batch {n}",
            "benchmarks.harness.libraries:by_pytorch",
            {**options, "batch": n},
            cost={"fp32": heavy},
        )
        for n in BATCHES
    ]
    found["bar: edge INT8 against reference eager"] = Target(
        "at least 20 times as fast at its best batch", 20, [ours, *eager]
    )
    return found


def verdict(bar: Target, record: Record) -> tuple[bool, str]:
    """Whether the record holds the bar, and in words how. The hardest contender decides."""
    name = min(record["ratios"], key=lambda n: float(record["ratios"][n]["value"]))
    worst = ratio_of(record, name)
    held = worst.value >= bar.least
    how = "surely held" if worst.least >= bar.least else "held" if held else "not held"
    return (
        held,
        (
            f"{record['suite']}: {bar.says}: {how}, {worst.value:.3g} ({worst.least:.3g} …"
            f" {worst.most:.3g}) against {name}"
        ),
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "bars.py", description="What must hold on a CPU, measured.", epilog=EXIT_CODES
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
    for name, bar in targets(options.model or prepared("edge").model).items():
        measured = measure([*bar.contenders, *beside(bar.contenders)], ROUNDS, quiet=options.quiet)
        record = make_record(
            name,
            {"quick": False, "rounds": ROUNDS},
            "slices/s",
            measured,
            shares(bar.contenders, measured),
        )
        records.append(record)
        verdicts.append(verdict(bar, record))
        print("\n".join(["", name, *in_columns(rows(record)), measured_on(record)]), flush=True)
    print("", *(text for _, text in verdicts), sep="\n")
    if options.json:
        write_json(options.json, records)
    if options.record:
        append(records)
    print(json.dumps(records))
    return 0 if all(held for held, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(run(main))
