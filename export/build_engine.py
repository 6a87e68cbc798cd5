"""Checkpoint → ONNX → proof → model folder:  python export/build_engine.py RUN -o MODEL --onnx-only"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # replace, not prepend: export/ must not shadow packages

from runtime.console import EXIT_CODES, duration, run
from runtime.errors import MissingComponent


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "build_engine.py", description="Export a trained run to a model folder, with proof.", epilog=EXIT_CODES
    )
    parser.add_argument("run", type=Path, help="a run folder, as train/run.py leaves it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--onnx-only", action="store_true", help="write and prove the ONNX graph, build no TensorRT engine")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    options = parser.parse_args(argv)
    started = time.perf_counter()

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    _require_packages()
    from export.graph import LabelsToIntensity
    from export.model_folder import write_model
    from train.checkpoint import load_calibration, load_generator, load_run, load_validation

    trained = load_run(options.run)
    graph = LabelsToIntensity(load_generator(options.run), len(trained.labels), trained.intensity)
    write_model(trained, graph, load_validation(trained), load_calibration(trained), options.output, say=say)
    say(f"model folder {options.output} written in {duration(time.perf_counter() - started)}")
    if not options.onnx_only:
        raise MissingComponent(
            "this version of mask2ct builds no TensorRT engine; the ONNX graph and its proof are written",
            expected="--onnx-only",
            remedy=f"use the ONNX model: python -m runtime synth MASK --model {options.output} --output OUT",
            file=options.output,
        )
    return 0


def _require_packages() -> None:
    """Name a missing package before anything is started. Raises `MissingComponent`."""
    for name in ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "scipy", "torchmetrics"):
        try:
            __import__(name)
        except ImportError as exc:
            raise MissingComponent(f"{name} cannot be imported: {exc}", expected="the packages of the export extra",
                                   remedy='pip install -e ".[train,export,onnx,openvino]"  (or: make setup)') from exc  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(main))
