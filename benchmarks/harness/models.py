"""Networks to measure with, one of each kind at 256 x 256, made once under runs/bench.

What a network has learnt does not change an engine's speed, so they have learnt next to nothing.
`edge` is trained a little and exported by the commands that people type, with a parity check,
because our runtime accepts INT8 only where it is validated. `reference` and `unet`, twenty times as
heavy, have random weights, settled norms and every convolution in INT8; none of their files is
validated. A change of their settings makes them anew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.atomic_files import atomic_folder, write_json
from runtime.core.errors import Mask2CTError
from runtime.core.manifest import MANIFEST, Manifest, grid_to_json, labels_to_json

from .paired import ROOT
from .volumes import mask

FOLDER = ROOT / "runs" / "bench"
CONFIGS = ROOT / "train" / "configs"
COHORT = ("--patients", "4", "--seed", "1", "--size", "32", "256", "256")
STEPS = 120
EDGE = (
    "data.labels=mm-whs",
    "training.valid_slices=8",
    "training.batch_size=4",
    "discriminator.filters=8",
    "loss.adversarial=0",
    "training.ema_decay=0.95",
    *(f"training.{key}={STEPS}" for key in ("steps", "valid_every", "checkpoint_every")),
)
UNTRAINED = {
    "reference": ("data.labels=mm-whs",),
    "unet": ("data.labels=mm-whs", "generator.kind=unet", "generator.skips=true"),
}
MASKS = 8  # slices to settle the norms and to calibrate INT8 on


@dataclass(frozen=True)
class Prepared:
    """A model folder and the run folder it came from."""

    model: Path
    trained: Path | None


class NotMade(Mask2CTError):
    """A network to measure with could not be trained or exported."""

    exit_code = 1


def prepared(kind: str) -> Prepared:
    """The network of a kind; it is made if it is missing, which takes a minute.

    Args:
        kind: "edge", "reference" or "unet".

    Returns:
        The model folder and the run folder.

    Raises:
        NotMade: It could not be trained or exported.
    """
    folder, config = FOLDER / kind, CONFIGS / ("edge.json" if kind == "edge" else "whs.json")
    settings = EDGE if kind == "edge" else UNTRAINED[kind]
    training_settings = {
        "config": json.loads(config.read_text(encoding="utf-8")),
        "settings": [*settings],
    }
    result, settings_file = Prepared(folder / "model", folder / "train"), folder / "made.json"
    if (
        settings_file.is_file()
        and json.loads(settings_file.read_text(encoding="utf-8")) == training_settings
    ):
        return result
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "edge":
        data = FOLDER / "data"
        if not (data / "cohort.json").is_file():
            _run("-m", "train.phantom", data, *COHORT)
        inputs = ("--config", config, "--dataset-path", data)
        _run("train/run.py", *inputs, "--output", result.trained, "--set", *settings)
        _run("export/build_engine.py", result.trained, "-o", result.model, "--onnx-only")
    else:
        # in a process of its own, so that the contenders' parent does not hold its memory
        _run("-m", "benchmarks.harness.models", kind)
    write_json(settings_file, training_settings)
    return result


def make_untrained(kind: str) -> None:
    """Write the run folder and the model folder of a network with random weights.

    Its FP32, FP16 and INT8 graphs are not validated.

    Args:
        kind: "reference" or "unet".
    """
    import torch

    from export.graph import LabelsToIntensity, fuse_batch_norm, to_fp16
    from export.model_folder import FILES, describe_file
    from export.parity import draw_inputs
    from export.quantize import Quantizer
    from export.to_onnx import to_onnx
    from train import config as configs
    from train.checkpoint import write_run
    from train.networks.generator import initialise, one_hot, standardise_noise
    from train.step import make_generator

    settings = configs.resolve(configs.load(CONFIGS / "whs.json"), UNTRAINED[kind])
    labels, grid, intensity = (
        configs.label_table(settings.data),
        configs.grid_policy(settings),
        configs.intensity(settings),
    )
    torch.manual_seed(0)
    net = make_generator(settings)
    initialise([net])
    manifest = Manifest(kind, labels, grid, intensity, style=0, noise=net.noisy, files={})
    masks = mask((MASKS, *grid.canvas), len(labels)).labels[:, None]
    inputs = draw_inputs(manifest.inputs, masks)
    with torch.no_grad():
        for _ in range(4):
            net.train()(
                one_hot(torch.from_numpy(masks), len(labels)),
                standardise_noise(torch.from_numpy(inputs["noise"])).unsqueeze(1),
            )
    facts: Mapping[str, Any] = {
        "name": kind,
        "config": configs.to_json(settings),
        "labels": labels_to_json(labels),
        "grid": grid_to_json(grid),
        "intensity": vars(intensity),
        "style": 0,
        "noise": net.noisy,
        "step": 0,
    }
    (FOLDER / kind / "train").mkdir(parents=True, exist_ok=True)
    write_run(FOLDER / kind / "train", net, {"validation": masks}, facts)
    network = fuse_batch_norm(LabelsToIntensity(net, len(labels), intensity))
    with atomic_folder(FOLDER / kind / "model") as part:
        to_onnx(network, manifest, part / FILES["fp32"])
        to_onnx(to_fp16(network), manifest, part / FILES["fp16"])
        Quantizer(
            part / FILES["fp32"],
            {name: np.ascontiguousarray(array) for name, array in inputs.items()},
        ).write(part / FILES["int8"], ())
        files = {
            name: describe_file(part / name, "onnx", precision) for precision, name in FILES.items()
        }
        write_json(part / MANIFEST, replace(manifest, files=files).to_json())


def at_size(model: Path, side: int) -> Path:
    """The same model with another canvas; its graphs take any.

    Args:
        model: The model folder. Its parity report is of its own canvas.
        side: Height and width of the canvas in pixels.

    Returns:
        A model folder whose files are links.
    """
    manifest = Manifest.load(model)
    if manifest.grid.canvas == (side, side):
        return model
    folder = FOLDER / "sizes" / f"{manifest.name}-{side}"
    with atomic_folder(folder) as part:
        for name in manifest.files:
            (part / name).symlink_to((model / name).resolve())
        write_json(
            part / MANIFEST,
            replace(manifest, grid=replace(manifest.grid, canvas=(side, side))).to_json(),
        )
    return folder


def _run(*arguments: object) -> None:
    """Run one of our commands in a process of its own; its output goes to standard error."""
    command = [str(a) for a in arguments]
    print(f"python {' '.join(command)}", file=sys.stderr, flush=True)
    if code := subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=sys.stderr, check=False
    ).returncode:
        raise NotMade(
            f"{command[0]} ended with exit {code}",
            expected="a network to measure with",
            remedy="see its message above",
        )


if __name__ == "__main__":
    make_untrained(sys.argv[1])
