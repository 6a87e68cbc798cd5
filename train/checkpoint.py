"""What a training writes: checkpoints to resume from, and the run folder that export reads.

Both are tensors (safetensors) and JSON, never pickles.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.atomic_files import (
    atomic_folder,
    atomic_path,
    remove_orphans,
    sha256_of,
    write_json,
)
from runtime.core.context import Context
from runtime.core.errors import ConfigError, ModelError
from runtime.core.layout_model import LAYOUT_FILE
from runtime.core.manifest import (
    GridPolicy,
    Intensity,
    LabelTable,
    grid_from_json,
    labels_from_json,
)

from . import config as configs
from .config import RunConfig

# Only for types: the command line answers --help without torch.
if TYPE_CHECKING:
    from torch import Tensor

    from .networks.generator import Generator

SCHEMA_VERSION = 1
RUN, CONFIG, METRICS = "run.json", "config.json", "metrics.jsonl"
WEIGHTS, CHECKPOINTS = "generator.safetensors", "checkpoints"
# Label maps for export, which has no data set: it checks its graphs on the held-out ones and
# calibrates INT8 on the training ones.
MASKS = {"validation": "validation.safetensors", "calibration": "calibration.safetensors"}
# Learned layouts (train/layouts), for a run with data.context.
LAYOUTS = LAYOUT_FILE
_STATE, _META = "state.safetensors", "state.json"
# Keys that do not change what a run computes up to a step: --resume may change them.
FREE = (
    "training.steps",
    "training.best_",
    "logging.",
    "license",
    "data.modality",
    "data.max_clipped",
)
_REMEDY = "point at a folder that `python train/run.py` has finished"


@dataclass(frozen=True)
class TrainedRun:
    """A finished training, as its run.json states it; `data` is all of run.json."""

    folder: Path
    config: RunConfig
    labels: LabelTable
    grid: GridPolicy
    intensity: Intensity
    style: int
    noise: bool
    step: int
    data: Mapping[str, Any]
    context: Context | None = None

    @property
    def classes(self) -> int:
        """The number of classes that the network sees."""
        return len(self.labels) + (0 if self.context is None else len(self.context))

    @property
    def weights(self) -> Path:
        """The generator's weights, a safetensors file."""
        return self.folder / str(self.data["weights"]["file"])


def load_run(folder: Path) -> TrainedRun:
    """Read RUN/run.json and compare the weights with its SHA-256.

    Args:
        folder: The run folder.

    Returns:
        The run.

    Raises:
        ModelError: A file is missing, damaged, or of another version.
    """
    path = folder / RUN
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no {RUN}",
            expected="a run folder with run.json and generator.safetensors",
            remedy=_REMEDY,
            file=folder,
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"schema version {data['schema_version']!r} (expected {SCHEMA_VERSION})"
            )
        weights = data["weights"]
        if Path(weights["file"]).name != weights["file"]:
            raise ValueError(f"file name {weights['file']!r} (expected a plain name)")
        labels, context = labels_from_json(data["labels"]), data.get("context")
        run = TrainedRun(
            folder,
            configs.from_json(data["config"]),
            labels,
            grid_from_json(data["grid"]),
            Intensity(**data["intensity"]),
            int(data["style"]),
            bool(data["noise"]),
            int(data["step"]),
            data,
            None if context is None else Context.from_json(context, len(labels)),
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, ConfigError) as exc:
        reason = f"key {exc} is missing" if isinstance(exc, KeyError) else str(exc).splitlines()[0]
        raise ModelError(
            f"{RUN} cannot be used: {reason}",
            expected="a run.json as train/run.py writes it",
            remedy=_REMEDY,
            file=path,
        ) from exc
    if not run.weights.is_file() or sha256_of(run.weights) != weights["sha256"]:
        raise ModelError(
            f"{run.weights.name} is not the file {RUN} describes",
            expected=f"sha256 {weights['sha256']}",
            remedy="copy the run folder again, or train again",
            file=run.weights,
        )
    return run


def load_generator(folder: Path) -> Generator:
    """Load the trained generator of a run folder.

    Args:
        folder: The run folder.

    Returns:
        The generator, in eval mode on the CPU.

    Raises:
        ModelError: A file is missing or damaged, or the weights do not fit the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from .step import make_generator

    run = load_run(folder)
    net: Generator = make_generator(run.config)
    try:
        net.load_state_dict(load_file(run.weights))
    except (RuntimeError, OSError, SafetensorError) as exc:
        raise ModelError(
            f"{run.weights.name} does not fit the network its config describes",
            expected="weights of that network",
            remedy="train again",
            file=run.weights,
        ) from exc
    net.eval()
    return net


def load_validation(run: TrainedRun) -> NDArray[np.uint8]:
    """Load the held-out label slices of a run.

    Args:
        run: The run.

    Returns:
        uint8 (n, Z, H, W) model indices.

    Raises:
        ModelError: The file is missing or was altered.
    """
    return _load_masks(run, "validation")


def load_calibration(run: TrainedRun) -> NDArray[np.uint8] | None:
    """Load label slices that a run was trained on.

    Args:
        run: The run.

    Returns:
        As `load_validation`; None for an old run, whose folder has none.

    Raises:
        ModelError: The file is missing or was altered.
    """
    return _load_masks(run, "calibration") if "calibration" in run.data else None


def _load_masks(run: TrainedRun, tag: str) -> NDArray[np.uint8]:
    """Label slices of one kind, compared with the SHA-256 in run.json."""
    from safetensors.numpy import load_file

    stated = run.data.get(tag, {})
    path = run.folder / MASKS[tag]
    if not path.is_file() or sha256_of(path) != stated.get("sha256"):
        raise ModelError(
            f"{path.name} is not the file {RUN} describes",
            expected=f"sha256 {stated.get('sha256')}",
            remedy="copy the run folder again, or train again",
            file=path,
        )
    labels: NDArray[np.uint8] = load_file(path)["labels"]
    return labels


def write_run(
    folder: Path, net: Generator, masks: Mapping[str, NDArray[np.uint8]], facts: Mapping[str, Any]
) -> None:
    """Write the weights and the masks, then run.json with their SHA-256.

    Args:
        folder: The run folder.
        net: The trained generator.
        masks: Label slices by their use in export (see `MASKS`), uint8 (n, Z, H, W).
        facts: The other content of run.json.

    Raises:
        OutputError: A file cannot be written.
    """
    import torch

    stated = {}
    for tag, labels in masks.items():
        path = folder / MASKS[tag]
        with atomic_path(path) as part:
            write_tensors({"labels": torch.from_numpy(np.ascontiguousarray(labels))}, part)
        stated[tag] = {"file": path.name, "sha256": sha256_of(path), "slices": len(labels)}
    with atomic_path(folder / WEIGHTS) as part:
        write_tensors(
            {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}, part
        )
    weights = {"file": WEIGHTS, "sha256": sha256_of(folder / WEIGHTS), "average": "ema"}
    write_json(
        folder / RUN, {"schema_version": SCHEMA_VERSION, **facts, "weights": weights, **stated}
    )


def write_layouts(folder: Path, content: bytes) -> None:
    """Put layouts into a finished run folder, and their SHA-256 into its run.json.

    Args:
        folder: The run folder.
        content: The layout file.

    Raises:
        OutputError: A file cannot be written.
    """
    with atomic_path(folder / LAYOUTS) as part:
        part.write_bytes(content)
    stated = json.loads((folder / RUN).read_text(encoding="utf-8"))
    stated["layouts"] = {"file": LAYOUTS, "sha256": sha256_of(folder / LAYOUTS)}
    write_json(folder / RUN, stated)


def load_layouts(run: TrainedRun) -> Path | None:
    """The layout file of a run; None for a run without layouts.

    Args:
        run: The run.

    Raises:
        ModelError: The file is missing or altered.
    """
    stated = run.data.get("layouts")
    if stated is None:
        return None
    path = run.folder / LAYOUTS
    if not path.is_file() or sha256_of(path) != stated["sha256"]:
        raise ModelError(
            f"{LAYOUTS} is not the file {RUN} describes",
            expected=f"sha256 {stated['sha256']}",
            remedy="copy the run folder again, or run: python -m train.layouts RUN",
            file=path,
        )
    return path


def starting_point(
    folder: Path, config: RunConfig, resume: bool, *, quiet: bool = False
) -> Path | None:
    """Check that a config may be trained in a folder, without writing.

    Args:
        folder: The run folder.
        config: The config of the run.
        resume: Whether to continue a run.
        quiet: Whether to print no warning about damaged checkpoints.

    Returns:
        The checkpoint to continue from (see `usable`), or None to start at step 0.

    Raises:
        ConfigError: Without `resume`, the folder already holds a run. With it, the folder holds no
            run, or a run of another config.
        ModelError: All checkpoints are damaged.
    """
    path = folder / CONFIG
    if not resume:
        if path.exists() or (folder / CHECKPOINTS).exists() or (folder / RUN).exists():
            raise ConfigError(
                f"{folder} already holds a run",
                expected="a new run folder",
                file=folder,
                remedy="add --resume to continue it, choose another --output, or remove the folder",
            )
        return None
    stored = configs.to_json(stored_config(folder))
    changed = [
        key for key in differences(stored, configs.to_json(config)) if not key.startswith(FREE)
    ]
    if changed:
        raise ConfigError(
            f"the run was started with other values of {', '.join(changed)}",
            expected="that config (steps, logging, licence and modality may change)",
            remedy="drop the change, or start a new run with another --output",
            file=path,
        )
    return usable(folder, config.training.steps, quiet=quiet)


def claim(folder: Path, config: RunConfig) -> None:
    """Make `folder` the run folder of this config: from now on, only --resume trains in it.

    Args:
        folder: The run folder.
        config: The config of the run.

    Raises:
        OutputError: The folder cannot be written.
    """
    for place in (folder, folder / CHECKPOINTS):
        if place.is_dir():
            # A killed training may have left temporary files.
            remove_orphans(place)
    write_json(folder / CONFIG, configs.to_json(config))


def stored_config(folder: Path) -> RunConfig:
    """Load the config that the run in `folder` was started with.

    Args:
        folder: The run folder.

    Returns:
        The config.

    Raises:
        ConfigError: The folder holds no run, or its config cannot be used.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no run to resume",
            expected=f"a run folder with {CONFIG}",
            remedy="correct --output, or drop --resume (--test, --run)",
            file=folder,
        )
    return configs.from_json(configs.load(path))


def newest(folder: Path) -> Path | None:
    """Find the checkpoint with the highest step, intact or not.

    Args:
        folder: The run folder.

    Returns:
        The checkpoint's folder, or None without checkpoints.
    """
    checkpoints = _all(folder)
    return checkpoints[-1] if checkpoints else None


def usable(folder: Path, limit: int, *, quiet: bool = False) -> Path | None:
    """Find the last intact checkpoint of at most `limit` steps.

    Each damaged one that is skipped is named on standard error.

    Args:
        folder: The run folder.
        limit: The highest step.
        quiet: Whether to print no warnings.

    Returns:
        The checkpoint's folder, or None without checkpoints.

    Raises:
        ModelError: There are checkpoints, but none can be used.
    """
    checkpoints = _all(folder)
    for path in reversed([p for p in checkpoints if _step(p) <= limit]):
        try:
            _verified(path)
        except ModelError as exc:
            if not quiet:
                print(f"warning: {exc.fact}; trying the one before", file=sys.stderr)
        else:
            return path
    if checkpoints:
        raise ModelError(
            f"none of the {len(checkpoints)} checkpoints can be used to train to step {limit}",
            expected="an intact checkpoint of no more steps",
            remedy="start anew in another --output, or copy a checkpoint back",
            file=folder / CHECKPOINTS,
        )
    return None


def best(folder: Path, limit: int, metric: str | None = None) -> tuple[Path, float] | None:
    """Find the checkpoint with the lowest score.

    Args:
        folder: The run folder.
        limit: The highest step.
        metric: The metric that the scores are of: scores of another one do not compare.

    Returns:
        The checkpoint's folder and its score, or None where no checkpoint has one.
    """
    scored = [
        (score, path)
        for path in _all(folder)
        if _step(path) <= limit and (score := _score(path, metric)) is not None
    ]
    # Of equal scores, the first checkpoint wins.
    return min(scored)[::-1] if scored else None


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    keep: int | None,
    score: float | None = None,
    metric: str | None = None,
) -> Path:
    """Write RUN/checkpoints/step-00000020 atomically, then remove older checkpoints.

    The best one stays. Checkpoints of later steps stay too: a run that continues from before a
    damaged checkpoint writes them again.

    Args:
        folder: The run folder.
        step: The number of steps done.
        tensors: The tensors by name.
        keep: How many of the newest to keep; None: all.
        score: The score of the held-out patients, lower is better; None: not measured.
        metric: The metric that the score is of.

    Returns:
        The checkpoint's folder.

    Raises:
        OutputError: A file cannot be written.
    """
    path = folder / CHECKPOINTS / f"step-{step:08d}"
    with atomic_folder(path) as part:
        write_tensors(tensors, part / _STATE)
        meta = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "score": score,
            **({} if metric is None else {"metric": metric}),
            "sha256": sha256_of(part / _STATE),
        }
        (part / _META).write_text(json.dumps(meta) + "\n")
    best_checkpoint = best(folder, step, metric)
    earlier = [p for p in _all(folder) if _step(p) <= step]
    for old in earlier[:-keep] if keep else []:
        if best_checkpoint is None or old != best_checkpoint[0]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def is_checkpoint(path: Path) -> bool:
    """Say whether `path` has the name and the files that `save` writes.

    `load` checks the SHA-256.

    Args:
        path: Any path.

    Returns:
        True if it looks like a checkpoint.
    """
    return re.fullmatch(r"step-\d{8}", path.name) is not None and (path / _META).is_file()


def load(path: Path) -> tuple[int, dict[str, Tensor]]:
    """Load a checkpoint.

    Args:
        path: The checkpoint's folder.

    Returns:
        The number of steps done, and the tensors by name.

    Raises:
        ModelError: The checkpoint is incomplete or was altered.
    """
    from safetensors.torch import load_file

    return int(_verified(path)["step"]), load_file(path / _STATE)


def _verified(path: Path) -> dict[str, Any]:
    """Read state.json, and compare the tensors with the SHA-256 that it states.

    Raises:
        ModelError: They differ, or a file is missing.
    """
    try:
        meta: dict[str, Any] = json.loads((path / _META).read_text())
        if sha256_of(path / _STATE) != meta["sha256"]:
            raise ValueError("its sha256 differs")
        if meta["step"] != _step(path):
            raise ValueError(f"it says step {meta['step']}")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        reason = (
            f"{Path(exc.filename).name}: {exc.strerror}"
            if isinstance(exc, OSError) and exc.filename
            else exc
        )
        raise ModelError(
            f"checkpoint {path.name} cannot be used: {reason}",
            expected="a checkpoint as training writes it",
            remedy="remove that folder to resume from the one before",
            file=path,
        ) from exc
    return meta


def _score(path: Path, metric: str | None) -> float | None:
    """The score in state.json, without a look at the tensors; None where it is of another metric.

    Before 0.2 the metric was not stated; it was body.mae_ratio unless a config said otherwise.
    """
    try:
        meta = json.loads((path / _META).read_text())
        score = meta["score"]
        if metric is not None and meta.get("metric", "body.mae_ratio") != metric:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(score) if isinstance(score, (int, float)) else None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Args:
        tensors: The tensors by name.
        path: The file.

    Raises:
        OSError: The file cannot be written. safetensors has an error of its own, which is
            converted.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as exc:
        code = re.search(r"os error (\d+)", str(exc))
        raise OSError(int(code[1]) if code else errno.EIO, str(exc)) from exc


def _all(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, by rising step."""
    root = folder / CHECKPOINTS
    return (
        sorted(p for p in root.iterdir() if re.fullmatch(r"step-\d{8}", p.name))
        if root.is_dir()
        else []
    )


def _step(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the keys in which two configs differ.

    Args:
        old: A config as JSON data.
        new: Another one.
        prefix: The path to both, for keys of sections.

    Returns:
        Keys such as "training.steps".
    """
    names: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names
