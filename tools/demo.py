"""Run the whole job from nothing, with the commands that a person would type.

    python tools/demo.py --output runs/demo

The stages: phantom cohort, training, export with a parity check, masks that no network has seen,
synthetic CTs, report.html.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.harness.record import machine
from runtime.core.atomic_files import write_json
from runtime.core.console import EXIT_CODES, duration, run
from runtime.core.errors import Mask2CTError, OutputError, UsageError, writing

PHANTOM = ROOT / "train" / "configs" / "phantom.json"
# Every voxel has a class, drawn where no label lies (docs/decisions/0040), and three minutes of
# training instead of ten; the learning rates fall as far.
SHORT = [
    "data.context=auto",
    "data.slices=1",
    "data.slice_spacing=null",
    "generator.filters=16",
    "generator.depth=5",
    "generator.style=6",
    "generator.noise_along_z=0.3",
    "training.steps=480",
    "optimizer.decay_g=0.0045",
    "optimizer.decay_d=0.0038",
    "training.valid_every=240",
    "training.checkpoint_every=240",
]
MARKER = ".mask2ct-demo"  # in a folder that this program made and may replace
CASES_SHOWN = 3


class StageFailed(Mask2CTError):
    """A stage ended with an exit code other than 0, after its own message."""

    def __init__(self, name: str, command: Sequence[str], code: int):
        super().__init__(
            f"the stage '{name}' ended with exit code {code}",
            expected="exit code 0",
            remedy=f"see its message above; to try it alone: {shlex.join(command)}",
        )
        self.exit_code = code if code in (1, 2, 3, 4, 130) else 1


def main(argv: Sequence[str]) -> int:
    """Run all stages and write the report; returns the exit code.

    Args:
        argv: The command line without the program's name.

    Raises:
        StageFailed: A stage failed.
        UsageError: The output folder holds something else.
    """
    parser = argparse.ArgumentParser(
        "demo.py",
        description="The whole job on phantom patients, with a report.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "runs" / "demo",
        help="the folder, made anew (default: runs/demo)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=PHANTOM,
        help="the training config (default: phantom.json, shortened)",
    )
    parser.add_argument(
        "--patients", type=int, default=24, help="patients to train on (default: %(default)s)"
    )
    parser.add_argument(
        "--unseen",
        type=int,
        default=8,
        help="patients to synthesize, not trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--size", type=int, nargs=3, default=(48, 128, 128), metavar=("Z", "Y", "X")
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="passed to train/run.py",
    )
    options = parser.parse_args(argv)
    out: Path = options.output
    _make_anew(out)
    size = [str(n) for n in options.size]
    changes = [
        part
        for change in (SHORT if options.config == PHANTOM else []) + options.set
        for part in ("--set", change)
    ]
    stages: list[tuple[str, list[str]]] = [
        (
            "phantom cohort",
            [
                "-m",
                "train.phantom",
                f"{out}/data",
                "--patients",
                str(options.patients),
                "--seed",
                "1",
                "--size",
                *size,
            ],
        ),
        (
            "training",
            [
                "train/run.py",
                "--config",
                str(options.config),
                "--dataset-path",
                f"{out}/data",
                "--output",
                f"{out}/train",
                *changes,
            ],
        ),
        (
            "export and proof",
            [
                "export/build_engine.py",
                f"{out}/train",
                "-o",
                f"{out}/model",
                "--onnx-only",
                "--accept-weak",
            ],
        ),
        (
            "unseen patients",
            [
                "-m",
                "train.phantom",
                f"{out}/unseen",
                "--patients",
                str(options.unseen),
                "--seed",
                "2",
                "--size",
                *size,
            ],
        ),
        (
            "synthesis",
            [
                "-m",
                "runtime",
                "synth",
                f"{out}/masks",
                "--model",
                f"{out}/model",
                "--output",
                f"{out}/synthetic",
                "--report",
                f"{out}/synthesis.json",
            ],
        ),
    ]
    seconds: dict[str, float] = {}
    for name, command in stages:
        if name == "synthesis":
            _split_unseen(out)
        seconds[name] = _run(name, command)
    started = time.perf_counter()
    from tools.demo_report import write_report

    write_report(out, seconds, machine(ROOT), CASES_SHOWN)
    write_json(out / "demo.json", {"seconds": seconds, "machine": machine(ROOT)})
    print(
        f"report in {duration(time.perf_counter() - started)}; all in"
        f" {duration(sum(seconds.values()))}\nopen {out}/report.html"
    )
    return 0


def _run(name: str, command: list[str]) -> float:
    """Run one stage in a process of its own, as a person would; returns its wall seconds."""
    print(f"\n[{name}] python {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    try:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None
    if code:
        raise StageFailed(name, ["python", *command], code)
    return time.perf_counter() - started


def _make_anew(out: Path) -> None:
    """Make an empty folder with the marker.

    Raises `UsageError` instead of removing a folder that is not this program's.
    """
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UsageError(
                f"{out} holds something else than a demo",
                expected="a new folder, or one that a demo made",
                remedy="choose another --output",
                file=out,
            )
        with writing(out):
            shutil.rmtree(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()


def _split_unseen(out: Path) -> None:
    """Sort the cohort's files into masks/CASE.nii.gz and truth/CASE.nii.gz.

    Synthesis sees the masks only; the truth is for comparison.
    """
    try:
        for folder, kind in (("masks", "label"), ("truth", "image")):
            (out / folder).mkdir()
            for path in sorted((out / "unseen").glob(f"*_{kind}.nii.gz")):
                number = path.name.split("_")[2]
                path.rename(out / folder / f"unseen_{number}.nii.gz")
        shutil.rmtree(out / "unseen")
    except OSError as exc:
        raise OutputError(
            f"the unseen patients cannot be sorted: {exc}",
            expected="a folder that can be written",
            remedy="choose another --output",
            file=out,
        ) from exc


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its values.
    """
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run(main))
