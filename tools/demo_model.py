"""Put the demo's model and some of its masks into the package, for `mask2ct demo`.

    make demo
    python tools/demo_model.py runs/demo

writes runtime/demo/: the model's INT8 graph alone with its layouts, manifest and card, and masks of
phantom patients that it has not seen. docs/how-to/first-picture.md states their digests.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from export.model_card import CARD, model_card
from runtime.core.atomic_files import atomic_folder, write_json, write_text
from runtime.core.console import run
from runtime.core.errors import UsageError
from runtime.core.layout_model import LAYOUT_KIND
from runtime.core.manifest import MANIFEST, Manifest

TARGET = ROOT / "runtime" / "demo"
FILE = "model.int8.onnx"
LICENSE = "Apache-2.0. Trained on simulated patients alone."
MASKS = 4
# What the whole folder may take of a clone and of the wheel.
MAX_BYTES = 4_000_000


def main(argv: Sequence[str]) -> int:
    """Write the folder.

    Args:
        argv: The command line without the program's name.

    Returns:
        The exit code.

    Raises:
        UsageError: The demo's folder lacks the model, or is too large.
    """
    parser = argparse.ArgumentParser("demo_model.py", description="Package the demo's model.")
    parser.add_argument("demo", type=Path, help="what make demo left")
    options = parser.parse_args(argv)
    manifest = Manifest.load(options.demo / "model")
    if FILE not in manifest.files:
        raise UsageError(
            f"{options.demo} has no {FILE}",
            expected="a demo whose INT8 graph was validated",
            remedy="run make demo once more",
        )
    # A model with a context draws what lies around a mask from its layouts.
    names = [FILE, *(n for n, file in manifest.files.items() if file.kind == LAYOUT_KIND)]
    packaged = Manifest(
        **{
            **vars(manifest),
            "name": "demo",
            "license": LICENSE,
            "files": {name: manifest.files[name] for name in names},
            "parity": {FILE: manifest.parity[FILE]},
        }
    )
    with atomic_folder(TARGET) as part:
        (part / "model").mkdir()
        (part / "masks").mkdir()
        for name in names:
            shutil.copyfile(options.demo / "model" / name, part / "model" / name)
        write_json(part / "model" / MANIFEST, packaged.to_json())
        write_text(part / "model" / CARD, model_card(packaged))
        for n, mask in enumerate(sorted((options.demo / "masks").glob("*.nii.gz"))[:MASKS], 1):
            shutil.copyfile(mask, part / "masks" / f"phantom_{n}.nii.gz")
        size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if size > MAX_BYTES:
            raise UsageError(
                f"the demo takes {size} bytes", expected=f"at most {MAX_BYTES}", remedy="shrink it"
            )
    print(f"{TARGET}: {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
