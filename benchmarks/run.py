"""Throughput of this machine, against what a user would otherwise run and against its limit:  python benchmarks/run.py SUITE...

Suites: engine, stream, memory, coldstart, io, train; each module says what it measures. Contenders run in processes of their own and
take turns within every round (benchmarks/paired.py). A table for people, then one JSON line with every record.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks import coldstart, engine, io, memory, stream
from benchmarks.history import STANDARD, Record, append, before, falls, load, make_record
from benchmarks.paired import Contender, Measured, measure
from benchmarks.report import measured_on, rows
from runtime.console import EXIT_CODES, run
from runtime.contract import Manifest
from runtime.errors import UsageError
from runtime.files import write_json


@dataclass(frozen=True)
class Suite:
    """`groups(options)`: contenders that are measured together, by name, ours first. `shares`: of the roof, if there is one."""

    unit: str
    groups: Callable[[argparse.Namespace], Mapping[str, Sequence[Contender]]]
    shares: Callable[[argparse.Namespace, Mapping[str, Measured]], Mapping[str, float]] = field(default=lambda options, measured: {})


SUITES = {
    "engine": Suite(
        "slices/s",
        lambda o: engine.groups(o.model, _trained(o), o.backend, 16 if o.quick else 64, compiled=not o.quick),
        lambda o, measured: engine.shares(o.model, measured),
    ),
    "stream": Suite(
        "slices/s", lambda o: stream.groups(None if o.random else o.model, None if o.random else _trained(o), o.backend, o.quick)
    ),
    "memory": Suite("slices/s", lambda o: memory.groups(o.model, _trained(o), o.backend, o.quick)),
    "coldstart": Suite("starts/s", lambda o: coldstart.groups(o.model, _trained(o), o.backend)),
    "train": Suite("steps/s", lambda o: _train_groups(o)),
    "io": Suite("bytes/s", lambda o: io.groups("64x128x128" if o.quick else "300x512x512")),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("run.py", description="Throughput on this machine.", epilog=EXIT_CODES)
    parser.add_argument("suites", nargs="+", choices=list(SUITES), metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--model", type=Path, help="a model folder (default: that of `make demo`; of `stream`, `edge` with random weights)")
    parser.add_argument("--run", type=Path, help="the run folder it came from, for PyTorch (default: `train` beside the model)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--config", type=Path, default=ROOT / "train" / "configs" / "phantom.json", help="what `train` trains (default: the phantom)"
    )
    parser.add_argument("--dataset-path", metavar="DIR", help="on which patients (default: the config's phantom, made first)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", nargs="+", help="override the config, as train/run.py has it"
    )
    parser.add_argument("--quick", action="store_true", help="less work a round, fewer rounds and contenders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records here")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/results/history.jsonl")
    parser.add_argument("--compare", metavar="REV|last", help="exit 1 when a ratio fell since that commit's record, by more than its noise")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(argv)
    options.random, options.model = options.model is None, options.model or ROOT / "runs" / "demo" / "model"

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
        measured = measure(contenders, 7 if options.quick else 11, quiet=options.quiet)
        record = make_record(group, _options(name, options), suite.unit, measured)
        for contender, share in suite.shares(options, measured).items():
            record["contenders"][contender]["share_of_roof"] = share
        records.append(record)
        _print(record)
    return records


def _options(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a record must share with another to be compared with it. No path: records travel."""
    if name == "train":
        return {"quick": options.quick, "config": options.config.stem, "set": [x for xs in options.set for x in xs]}
    model = "random" if name == "stream" and options.random else Manifest.load(options.model).name if name != "io" else ""
    return {"quick": options.quick, "backend": options.backend, "model": model}


def _print(record: Record) -> None:
    table = rows(record)
    widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
    print(f"\n{record['suite']}")
    for row in table:
        print(
            "  ".join(cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=True)))
        )
    for contender, row in record["contenders"].items():
        if facts := {key: value for key, value in row.items() if key not in (*STANDARD, "backend")}:
            print(f"{contender}: {json.dumps(facts)[1:-1]}")
    for contender, why in record["absent"].items():
        print(f"not there: {contender} ({why})")
    print(measured_on(record))


def _compare(records: Sequence[Record], revision: str) -> int:
    """How many ratios fell; each is said on standard error. Raises `UsageError` when there is nothing to compare with."""
    kept, found = load(), 0
    for record in records:
        old = before(record, kept, revision)
        if old is None:
            raise UsageError(
                f"there is no record of {record['suite']} for {revision} with these options on this machine",
                expected="a record in benchmarks/results/history.jsonl", remedy="record one with --record",
            )  # fmt: skip
        for fall in falls(old, record):
            found += 1
            print(f"{fall} since commit {old['machine']['commit']}", file=sys.stderr)
    return found


def _train_groups(options: argparse.Namespace) -> Mapping[str, Sequence[Contender]]:
    from benchmarks import train  # takes seconds: it imports torch
    from train import config
    from train.settle import settle

    given = config.resolve(config.load(options.config), [x for xs in options.set for x in xs], dataset_path=options.dataset_path)
    return train.groups(settle(given)[0], options.quick)


def _trained(options: argparse.Namespace) -> Path | None:
    """The run folder that the model came from, when it is known."""
    beside: Any = options.run or options.model.parent / "train"
    return beside if (beside / "run.json").is_file() else None


if __name__ == "__main__":
    sys.exit(run(main))
