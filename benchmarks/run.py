"""Measure this machine's throughput against what people run otherwise and against its limit.

    python benchmarks/run.py SUITE...

Suites: engine, stream, memory, coldstart, io, train, commands; each module says what it measures.
Contenders run in processes of their own and take turns within every round
(benchmarks/harness/paired.py). The program prints a table for people, then one JSON line with
every record.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.harness.history import (
    STANDARD,
    Record,
    append,
    before,
    load,
    make_record,
    regressions,
)
from benchmarks.harness.models import Prepared, prepared
from benchmarks.harness.paired import Contender, measure
from benchmarks.harness.roofline import peaks_for, shares
from benchmarks.report import in_columns, measured_on, rows, target_verdicts
from benchmarks.suites import coldstart, commands, engine, io, memory, stream
from runtime.core.atomic_files import write_json
from runtime.core.console import EXIT_CODES, duration, run
from runtime.core.errors import UsageError
from runtime.core.manifest import Manifest

QUICK_ROUNDS, ROUNDS = 9, 11


@dataclass(frozen=True)
class Suite:
    """A suite of measurements.

    Attributes:
        unit: The unit of its rates.
        groups: From the options to the contenders that are measured together, by the group's name;
            ours is the first of each group.
    """

    unit: str
    groups: Callable[[argparse.Namespace], Mapping[str, Sequence[Contender]]]


SUITES = {
    "engine": Suite("slices/s", lambda o: engine.groups(_prepared_model(o), o.backend, o.quick)),
    "stream": Suite(
        "slices/s",
        lambda o: stream.groups(_prepared_model(o) or prepared("edge"), o.backend, o.quick),
    ),
    "memory": Suite(
        "slices/s",
        lambda o: memory.groups(_prepared_model(o) or prepared("edge"), o.backend, o.quick),
    ),
    "coldstart": Suite(
        "starts/s", lambda o: coldstart.groups(_prepared_model(o) or prepared("edge"), o.backend)
    ),
    "io": Suite("bytes/s", lambda o: io.groups("64x128x128" if o.quick else "300x512x512")),
    "train": Suite("steps/s", lambda o: _train_groups(o)),
    "commands": Suite("starts/s", lambda o: commands.groups()),
}


def main(argv: Sequence[str]) -> int:
    """Measure the suites, print, record and compare them; returns the exit code.

    Args:
        argv: The command line without the program's name.

    Raises:
        UsageError: There is no record to compare with.
    """
    parser = argparse.ArgumentParser(
        "run.py", description="Throughput on this machine.", epilog=EXIT_CODES
    )
    parser.add_argument(
        "suites", nargs="+", choices=list(SUITES), metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a model folder (default: networks that it makes once under runs/bench)",
    )
    parser.add_argument(
        "--run",
        type=Path,
        help="the run folder it came from, for PyTorch (default: `train` beside the model)",
    )
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "train" / "configs" / "phantom.json",
        help="the config that `train` trains (default: the phantom)",
    )
    parser.add_argument(
        "--dataset-path",
        metavar="DIR",
        help="the patients to train on (default: the config's phantom, made first)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        nargs="+",
        help="override the config, in the form of train/run.py",
    )
    parser.add_argument(
        "--quick", action="store_true", help="less work in a round, fewer rounds and contenders"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records here")
    parser.add_argument(
        "--record", action="store_true", help="append them to benchmarks/results/history.jsonl"
    )
    parser.add_argument(
        "--compare",
        metavar="REV|last",
        help="exit 1 when a ratio fell since that commit's record, by more than its noise",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)

    records = [record for name in options.suites for record in _measure(name, options)]
    if options.json:
        write_json(options.json, records)
    fallen = _compare(records, options.compare) if options.compare else 0
    if options.record:
        append(records)
    print(json.dumps(records))
    return 1 if fallen else 0


def _measure(name: str, options: argparse.Namespace) -> list[Record]:
    suite, records = SUITES[name], []
    for group, contenders in suite.groups(options).items():
        began = time.perf_counter()
        measured = measure(
            [*contenders, *peaks_for(contenders)],
            QUICK_ROUNDS if options.quick else ROUNDS,
            quiet=options.quiet,
        )
        records.append(
            make_record(
                group, _options(name, options), suite.unit, measured, shares(contenders, measured)
            )
        )
        _print(records[-1])
        print(f"measured in {duration(time.perf_counter() - began)}", flush=True)
    return records


def _options(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options that a record must share with another to be compared with it.

    They hold no path, because records travel between machines.
    """
    if name == "train":
        return {
            "quick": options.quick,
            "config": options.config.stem,
            "set": [x for xs in options.set for x in xs],
        }
    if name in ("io", "commands"):
        return {"quick": options.quick}
    return {
        "quick": options.quick,
        "backend": options.backend,
        "model": Manifest.load(options.model).name if options.model else "own",
    }


def _print(record: Record) -> None:
    print("\n".join(["", record["suite"], *in_columns(rows(record))]))
    for contender, row in record["contenders"].items():
        if facts := {
            key: value
            for key, value in row.items()
            if key not in (*STANDARD, "backend", "call_ms", "vram", "at_most")
        }:
            print(f"{contender}: {json.dumps(facts)[1:-1]}")
    for line in target_verdicts(record):
        print(line)
    for contender, why in record["absent"].items():
        print(f"absent: {contender} ({why})")
    print(measured_on(record))


def _compare(records: Sequence[Record], revision: str) -> int:
    """Print on standard error the ratios that fell; returns how many did.

    Raises `UsageError` where there is no record to compare with.
    """
    history, count = load(), 0
    for record in records:
        old = before(record, history, revision)
        if old is None:
            raise UsageError(
                f"there is no record of {record['suite']} for {revision} with these options on this"
                " machine",
                expected="a record in benchmarks/results/history.jsonl",
                remedy="record one with --record",
            )
        for regression in regressions(old, record):
            count += 1
            print(f"{regression} since commit {old['machine']['commit']}", file=sys.stderr)
    return count


def _train_groups(options: argparse.Namespace) -> Mapping[str, Sequence[Contender]]:
    from benchmarks.suites import train  # takes seconds: it imports torch
    from train import config
    from train.data.inference import infer_from_data

    resolved = config.resolve(
        config.load(options.config),
        [x for xs in options.set for x in xs],
        dataset_path=options.dataset_path,
    )
    return train.groups(infer_from_data(resolved)[0], options.quick)


def _prepared_model(options: argparse.Namespace) -> Prepared | None:
    """The model that the user named, with its run folder where that is known."""
    if options.model is None:
        return None
    trained = options.run or options.model.parent / "train"
    return Prepared(options.model, trained if (trained / "run.json").is_file() else None)


if __name__ == "__main__":
    sys.exit(run(main))
