"""From a checkpoint to a model folder: ONNX graphs, their parity report and TensorRT engines.

python export/build_engine.py RUN -o MODEL [--target rtx] [--require-engine] [--onnx-only]
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

from export.to_tensorrt import HARDWARE, TARGETS, BuildOptions, Target, why_not
from runtime.core.console import Parser, duration, epilog, run
from runtime.core.errors import MissingComponent, importing
from runtime.engines.gpu.probe import device, why_no_gpu
from runtime.engines.memory import parse_bytes
from runtime.engines.registry import BACKENDS

PROGRAM = "python export/build_engine.py"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Describe the command line.

    Args:
        program: What the user typed in front of the options.
    """
    p = Parser(
        program,
        description="Export a trained run to a model folder, and validate every file in it.",
        epilog=epilog(
            f"{program} RUN -o MODEL --onnx-only",
            f"{program} RUN -o MODEL --target rtx --precision fp16",
        ),
    )
    p.add_argument("run", type=Path, help="a run folder that train/run.py wrote")
    p.add_argument("-o", "--output", type=Path, required=True, help="the model folder to write")
    p.add_argument(
        "--onnx-only",
        action="store_true",
        help="write and validate the ONNX graphs, build no engine",
    )
    p.add_argument(
        "--accept-weak",
        action="store_true",
        help="export a model whose training ended with the verdict 'weak'; the card keeps it",
    )
    _add_engine_options(p.add_argument_group("TensorRT engine"))
    p.add_argument("--quiet", action="store_true", help="print errors only")
    return p


def main(argv: Sequence[str], program: str = PROGRAM) -> int:
    """Export a run; returns the exit code.

    Args:
        argv: The command line without the program's name.
        program: What the user typed in front of it.

    Raises:
        MissingComponent: A package is missing, or an engine that was asked for cannot be built.
        ParityError: A file differs too much from the network.
    """
    options = parser(program).parse_args(argv)
    started = time.perf_counter()

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    targets = [] if options.onnx_only else _targets(options.target)
    missing = {target.name: why for target in targets if (why := why_not(target))}
    lacking = _required_but_missing(options, targets, missing)
    if lacking is not None:
        say(f"{lacking.fact}; the ONNX graphs are written first")
    _require_packages()
    from export.attach_engine import add_engine, parity_checker
    from export.graph import LabelsToIntensity
    from export.model_folder import write_model
    from export.verdict import check_verdict
    from train.checkpoint import load_calibration, load_generator, load_run, load_validation

    trained = load_run(options.run)
    check_verdict(trained, accept_weak=options.accept_weak)
    graph = LabelsToIntensity(load_generator(options.run), trained.classes, trained.intensity)
    masks = load_validation(trained)
    write_model(
        trained,
        graph,
        masks,
        load_calibration(trained),
        options.output,
        say=say,
        int8_gpu=options.precision == "int8",
    )
    say(f"model folder {options.output} written in {duration(time.perf_counter() - started)}")
    if lacking is not None:
        note = (
            "the validated ONNX graphs are kept: python -m runtime synth MASK --model"
            f" {options.output} --output OUT"
        )
        lacking.remedy = f"{lacking.remedy}; then run this again ({note})"
        lacking.file = options.output
        raise lacking
    names = ("precision", "native", "hardware", "max_batch", "workspace", "timing_cache")
    build = BuildOptions(**{name: getattr(options, name) for name in names})
    for target in (target for target in targets if target.name not in missing):
        not_validated = _why_not_validated(target)
        add_engine(
            options.output,
            build,
            None
            if not_validated
            else parity_checker(graph, masks, options.output, options.precision, target),
            gpu=device() if target.needs_gpu else None,
            say=say,
            target=target,
            quiet=options.quiet,
        )
        outcome = f"not run here ({not_validated})" if not_validated else "validated"
        say(f"{target.file} built, {outcome}, in {duration(time.perf_counter() - started)}")
    if missing:
        say(_what_can_be_added(missing))
    return 0


def _targets(name: str) -> list[Target]:
    return list(TARGETS.values()) if name == "auto" else [TARGETS[name]]


def _required_but_missing(
    options: argparse.Namespace, targets: list[Target], missing: dict[str, MissingComponent]
) -> MissingComponent | None:
    """Why an engine that the user asked for cannot be built; None where nothing is in the way.

    Who names a target asks for its engine; who says `--require-engine`, for any.
    """
    is_required = options.require_engine or options.target != "auto"
    if not is_required or not targets or len(missing) < len(targets):
        return None
    # the last one is what a machine without a GPU can do
    return missing[targets[-1].name]


def _why_not_validated(target: Target) -> str | None:
    """Why an engine cannot be run on this machine; None where it can, or where it has to be."""
    if target.needs_gpu:
        return None
    if why := why_no_gpu():
        return why
    backend = next(backend for backend in BACKENDS if backend.name == target.backend)
    missing = backend.missing()
    return missing and missing[0]


def _what_can_be_added(missing: dict[str, MissingComponent]) -> str:
    """One line: which engines could be built, where, and with what."""
    rows = []
    for name in missing:
        target = TARGETS[name]
        where = "here, for GeForce and RTX GPUs"
        if target.needs_gpu:
            where = "on a machine with an NVIDIA GPU, for that GPU"
        rows.append(f"{target.install} builds one {where}")
    return f"engines that can be added: {'; '.join(reversed(rows))}"


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    default = BuildOptions()
    group.add_argument(
        "--target",
        choices=("auto", *TARGETS),
        default="auto",
        help="what to build an engine for: this machine's GPU (tensorrt), or GeForce and RTX GPUs,"
        " which needs no GPU (rtx); auto builds what can be built here (default)",
    )
    group.add_argument(
        "--require-engine",
        action="store_true",
        help="exit with 3 where no engine can be built; without it, the ONNX graphs are enough",
    )
    group.add_argument(
        "--precision",
        choices=("fp16", "fp32", "int8"),
        default=default.precision,
        help="the engine's precision (default fp16); int8 writes model.int8-gpu.onnx too",
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
            'pip install -e ".[export]"  (or: make setup)',
        ):
            __import__(name)


if __name__ == "__main__":
    sys.exit(run(main))
