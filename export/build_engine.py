"""From a checkpoint to a model folder: ONNX graphs, their parity report and a TensorRT engine.

python export/build_engine.py RUN -o MODEL [--onnx-only]
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Replaced, not prepended: export/ must not shadow packages.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from export.to_tensorrt import HARDWARE, BuildOptions, why_not
from runtime.core.console import EXIT_CODES, duration, run
from runtime.core.errors import importing
from runtime.engines.memory import parse_bytes


def main(argv: Sequence[str]) -> int:
    """Export a run; returns the exit code.

    Args:
        argv: The command line without the program's name.

    Raises:
        MissingComponent: A package is missing, or no engine can be built here.
        ParityError: A file differs too much from the network.
    """
    parser = argparse.ArgumentParser(
        "build_engine.py",
        description="Export a trained run to a model folder, and validate every file in it.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("run", type=Path, help="a run folder that train/run.py wrote")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the model folder to write"
    )
    parser.add_argument(
        "--onnx-only",
        action="store_true",
        help="write and validate the ONNX graphs, build no TensorRT engine",
    )
    _add_engine_options(parser.add_argument_group("TensorRT engine"))
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    options = parser.parse_args(argv)
    started = time.perf_counter()

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    missing = None if options.onnx_only else why_not()
    if missing is not None:
        say(f"{missing.fact}; the ONNX graphs are written first")
    _require_packages()
    from export.graph import LabelsToIntensity
    from export.model_folder import write_model
    from train.checkpoint import load_calibration, load_generator, load_run, load_validation

    trained = load_run(options.run)
    graph = LabelsToIntensity(load_generator(options.run), trained.classes, trained.intensity)
    masks = load_validation(trained)
    write_model(trained, graph, masks, load_calibration(trained), options.output, say=say)
    say(f"model folder {options.output} written in {duration(time.perf_counter() - started)}")
    if options.onnx_only:
        return 0
    if missing is not None:
        note = (
            "the validated ONNX graphs are kept: python -m runtime synth MASK --model"
            f" {options.output} --output OUT"
        )
        missing.remedy = f"{missing.remedy}; then run this again ({note})"
        missing.file = options.output
        raise missing
    from export.attach_engine import add_engine, parity_checker
    from runtime.engines.gpu.probe import device

    names = ("precision", "native", "hardware", "max_batch", "workspace", "timing_cache")
    build = BuildOptions(**{name: getattr(options, name) for name in names})
    add_engine(
        options.output,
        build,
        parity_checker(graph, masks, options.output, options.precision),
        gpu=device(),
        say=say,
        quiet=options.quiet,
    )
    say(f"engine built and validated in {duration(time.perf_counter() - started)}")
    return 0


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    default = BuildOptions()
    group.add_argument(
        "--precision",
        choices=("fp16", "fp32"),
        default=default.precision,
        help="the engine's precision (default fp16)",
    )
    group.add_argument(
        "--native",
        action="store_true",
        help="the fastest engine, which only this TensorRT loads; without it, the lean runtime of"
        " this version or a later one loads it",
    )
    hardware = (
        "the GPUs that the engine runs on: those of this compute capability (same, the default),"
        " any from Ampere on, or this model alone"
    )
    group.add_argument(
        "--hardware", choices=tuple(HARDWARE), default=default.hardware, help=hardware
    )
    batch = f"the most slices in one call (default {default.max_batch})"
    group.add_argument(
        "--max-batch", type=_count, default=default.max_batch, metavar="N", help=batch
    )
    workspace = f"the most scratch memory of a layer (default {default.workspace >> 30}GiB)"
    group.add_argument(
        "--workspace", type=parse_bytes, default=default.workspace, metavar="SIZE", help=workspace
    )
    group.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="a file of timings that makes the next build on this GPU faster",
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _require_packages() -> None:
    """Raise `MissingComponent` for a missing package before any work starts."""
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "scipy"):
        with importing(
            name,
            "the packages of the export extra",
            'pip install -e ".[train,export,onnx,openvino]"  (or: make setup)',
        ):
            __import__(name)


if __name__ == "__main__":
    sys.exit(run(main))
