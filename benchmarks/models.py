"""Networks to measure with, one of each kind at 256 x 256, made once under runs/bench.

They are trained and exported by the commands people type, for a few steps: what a network has learnt changes no engine's speed, but a
proof is needed before INT8 may run. A change of their settings makes them anew.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.contract import MANIFEST, Manifest
from runtime.errors import Mask2CTError
from runtime.files import atomic_folder, write_json

from .paired import ROOT

FOLDER = ROOT / "runs" / "bench"
COHORT = ("--patients", "4", "--seed", "1", "--size", "32", "256", "256")
SETTINGS = ("data.labels=mm-whs", "training.valid_slices=8", "training.batch_size=4", "discriminator.filters=8", "loss.adversarial=0",
            "training.ema_decay=0.9")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A config of train/configs, how many steps of it, and what else is set."""

    config: str
    steps: int
    settings: tuple[str, ...] = ()


RECIPES = {
    "reference": Recipe("whs", 20),
    "unet": Recipe("whs", 20, ("generator.kind=unet", "generator.skips=true")),
    "edge": Recipe("edge", 200),
}


@dataclass(frozen=True)
class Prepared:
    """A model folder and the run folder it came from."""

    model: Path
    trained: Path | None


class NotMade(Mask2CTError):
    """A network to measure with could not be trained or exported."""

    exit_code = 1


def prepared(kind: str) -> Prepared:
    """The network of that kind, made when it is not there: minutes, once. Raises `NotMade`."""
    recipe, folder = RECIPES[kind], FOLDER / kind
    config = ROOT / "train" / "configs" / f"{recipe.config}.json"
    made = {"config": json.loads(config.read_text(encoding="utf-8")), "steps": recipe.steps, "settings": [*SETTINGS, *recipe.settings]}
    found = Prepared(folder / "model", folder / "train")
    kept = folder / "made.json"
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == made:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    data = FOLDER / "data"
    if not (data / "cohort.json").is_file():
        _run("-m", "train.phantom", data, *COHORT)
    every = [f"training.{key}={recipe.steps}" for key in ("steps", "valid_every", "checkpoint_every")]
    _run(
        "train/run.py", "--config", config, "--dataset-path", data, "--output", found.trained, "--set", *SETTINGS, *recipe.settings, *every
    )
    _run("export/build_engine.py", found.trained, "-o", found.model, "--onnx-only")
    write_json(kept, made)
    return found


def at_size(model: Path, side: int) -> Path:
    """`model` with a canvas of `side` x `side` pixels instead of its own: its graphs take any, its proof is of its own."""
    manifest = Manifest.load(model)
    if manifest.grid.canvas == (side, side):
        return model
    folder = FOLDER / "sizes" / f"{manifest.name}-{side}"
    with atomic_folder(folder) as part:
        for name in manifest.files:
            (part / name).symlink_to((model / name).resolve())
        write_json(part / MANIFEST, replace(manifest, grid=replace(manifest.grid, canvas=(side, side))).to_json())
    return folder


def _run(*arguments: object) -> None:
    """A command of ours in a process of its own; what it says goes to standard error."""
    command = [str(a) for a in arguments]
    print(f"python {' '.join(command)}", file=sys.stderr, flush=True)
    if code := subprocess.run([sys.executable, *command], cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise NotMade(f"{command[0]} ended with exit {code}", expected="a network to measure with", remedy="see what it said above")
