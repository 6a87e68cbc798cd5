"""Show, on a machine without a GPU, that an export ends with an engine for RTX GPUs.

    python tools/engine_without_gpu.py RUN [--pip OPTION ...]

It installs `.[export,rtx]` into a fresh environment, exports the run, reads the engine's entry in
the manifest, and describes the model. It prints a line for each and ends with 1 where
one does not hold. `--pip "--extra-index-url https://download.pytorch.org/whl/cpu"` saves several GB
on Linux; `--python PYTHON` uses an environment that exists.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from export.precision_audit import LEAST_HALF
from export.to_tensorrt import FOR_RTX
from runtime.core.manifest import Manifest

SECONDS = 60  # after training, for the export


def main(argv: Sequence[str]) -> int:
    """Run the commands and print what held; returns the exit code.

    Args:
        argv: The command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        "engine_without_gpu.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="a run folder that train/run.py wrote")
    parser.add_argument("--pip", default="", help="options for pip install")
    parser.add_argument("--python", type=Path, help="use this environment, install nothing")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="engine-without-gpu-") as work:
        claims = check(options, Path(work))
    for line, ok in claims.items():
        print(f"{'holds' if ok else 'FAILS'}  {line}")
    return 0 if all(claims.values()) else 1


def check(options: argparse.Namespace, work: Path) -> dict[str, bool]:
    """Run the commands.

    Args:
        options: The command line's options.
        work: A folder for the environment and the model.

    Returns:
        What was seen, and whether it is as it should be.
    """
    claims: dict[str, bool] = {}
    python, model = options.python, work / "model"
    if python is None:
        python = work / "venv" / "bin" / "python"
        venv.create(python.parent.parent, with_pip=True)
        install = [*shlex.split(options.pip), f"{ROOT}[export,rtx]"]
        seconds = timed([python, "-m", "pip", "install", "--quiet", *install])
        files = [f for f in python.parent.parent.rglob("*") if f.is_file() and not f.is_symlink()]
        size = sum(file.stat().st_size for file in files)
        claims[f'pip install ".[export,rtx]": {seconds:.0f} s, {size / 2**30:.1f} GiB'] = True
    seconds = timed([python, "export/build_engine.py", options.run, "-o", model, "--quiet"])
    claims[f"the export takes {seconds:.0f} s of at most {SECONDS}"] = seconds <= SECONDS
    manifest = Manifest.load(model)
    manifest.verify(model, manifest.files)
    engine = manifest.files.get(FOR_RTX.file)
    claims[f"{FOR_RTX.file} is in the manifest, and its SHA-256 is right"] = engine is not None
    if engine is not None:
        half = engine.facts["half_network"]
        claims[f"{100 * half:.0f} % of its convolutions are FP16"] = half >= LEAST_HALF
        gpus = ", ".join(engine.facts["compute_capabilities"])
        claims[f"it runs on compute capabilities {gpus}"] = bool(gpus)
    describe = [python, "-m", "runtime", "describe", model]
    claims[f"describe takes {timed(describe):.1f} s"] = True
    return claims


def timed(command: Sequence[object]) -> float:
    """Run a command in the repository; returns its seconds.

    Args:
        command: The program and its arguments.

    Raises:
        CalledProcessError: It fails.
    """
    began = time.monotonic()
    subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
