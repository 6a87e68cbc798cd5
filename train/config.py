"""What a run is: frozen sections, loaded from JSON, overridden by `--set`, resolved without side
effects.

The resolved config, written as JSON, alone rebuilds the run. Keys of the original system (MAX_ITER,
BATCH_SIZE ...) are accepted wherever ours are, through one table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from runtime.core.atomic_files import open_input
from runtime.core.errors import ConfigError, reading
from runtime.core.labels import MM_WHS, PRESETS
from runtime.core.manifest import GridPolicy, Intensity, Label, LabelTable, labels_from_json

from .data.original import FIXED_KEYS, check_fixed, greys
from .typed import Range, build, to_json, unknown, wrong

__all__ = [
    "RunConfig",
    "from_json",
    "grid_policy",
    "intensity",
    "label_table",
    "load",
    "resolve",
    "to_json",
]

Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(1e-12)]
NotNegative = Annotated[float, Range(0)]


@dataclass(frozen=True)
class PhantomConfig:
    """A cohort made by train/phantom/cohort.py: `patients` thoraces of `size` (D, H, W) voxels."""

    patients: Count = 24
    seed: Seed = 1
    size: tuple[Count, Count, Count] = (48, 128, 128)


@dataclass(frozen=True)
class DataConfig:
    """Where patients come from, what their labels are, and the grid the network sees them on."""

    path: str | None = (
        # folder or table in one of the layouts of train/data/layouts.py; --dataset-path sets it
        None
    )
    phantom: PhantomConfig | None = None  # made when there is no path
    # a preset's name, or [{"name": ..., "value": ...}, ...] beginning with the background; null:
    # the layout's own
    labels: Any = None
    keep: tuple[Count, ...] | None = (
        None  # indices of the table to keep, renumbered; all else becomes background
    )
    canvas: tuple[Count, Count] = (256, 256)  # (H, W) in pixels
    pixel_spacing: tuple[Positive, Positive] | None = (
        None  # mm; None: each slice is fitted to the canvas
    )
    slices: Count = 1  # Z neighbouring slices the network sees, odd
    slice_spacing: Positive | None = None  # mm between them
    train_ratio: Share = 0.95
    valid_ratio: Share = 0.02
    split_seed: Seed = 123
    split_by: Literal["patients", "slices"] = (
        "patients"  # slices: blocks of every volume, for want of patients; flatters all metrics
    )
    image_name: str = "whs_img"  # in the original's layout: PATIENT_<name>.dcm holds the image ...
    label_name: str = "whs_img_gt"  # ... and this one the labels


@dataclass(frozen=True)
class AugmentConfig:
    """How far training slices are moved at random (train/data/augmentation.py); all 0: not at
    all.
    """

    rotation: Annotated[float, Range(0, 180)] = 0.0  # degrees
    shear: Annotated[float, Range(0, 45)] = 0.0  # degrees
    shift_width: Annotated[float, Range(0, 0.5)] = 0.0  # share of the width
    shift_height: Annotated[float, Range(0, 0.5)] = 0.0  # share of the height
    zoom: Annotated[float, Range(0, 0.9)] = 0.0  # each axis is scaled by 1 - zoom to 1 + zoom
    labels: bool = True  # move the label map
    image: bool = True  # move the image
    same: bool = True  # by one map for both; false: by one each

    @property
    def active(self) -> bool:
        moves = (self.rotation, self.shear, self.shift_width, self.shift_height, self.zoom)
        return any(moves) and (self.labels or self.image)


@dataclass(frozen=True)
class IntensityConfig:
    """The range the network's [0, 1] stands for; what is outside is clipped in training.

    "auto": HU where the images hold them, else a.u. in [low, high] (train/data/inference.py);
    settled before a run is claimed.
    """

    unit: Literal["HU", "a.u.", "auto"] = "HU"
    low: int = -1024
    high: int = 1024


@dataclass(frozen=True)
class GeneratorConfig:
    """`reference`: the original's; `unet`: lighter, ends in full-resolution features; `edge`:
    the least work (train/networks/blocks.py).
    """

    kind: Literal["reference", "unet", "edge"] = "reference"
    filters: Count = 64  # of the first layer; they double with depth up to 8 times
    depth: Count = 7  # stride-2 stages: H and W are multiples of 2**depth
    skips: bool = False
    activation: Literal["sigmoid"] = "sigmoid"
    textures: Whole = 0  # learned noise filters; 0: the network takes no noise
    texture_kernel: Count = 7  # their side in pixels, odd
    style: Whole = (
        0  # S, numbers in a style (train/networks/style.py); 0: the network takes no style
    )
    style_spread: Positive = (
        1.5  # deviations of the cohort that a style of 1 stands for: how widely variants differ
    )


@dataclass(frozen=True)
class DiscriminatorConfig:
    filters: Count = 64
    patch_size: Annotated[int, Range(2, 256)] = 16  # power of two: log2 of it stride-2 stages
    conditional: bool = True


@dataclass(frozen=True)
class LossConfig:
    """Weights of the generator's losses (train/losses.py)."""

    adversarial: NotNegative = 1.0
    reconstruction: NotNegative = 100.0
    weighting: Literal["basic", "weighted"] = (
        "basic"  # of the reconstruction: everywhere alike, or centred on the mask
    )
    texture: NotNegative = 0.0
    features: NotNegative = 0.0  # matching of the discriminator's features
    gan: Literal["lsgan", "hinge"] = "lsgan"  # what the scores are to be; no weight


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam. The rate at iteration i is lr * exp(-decay * i)."""

    lr_g: Positive = 1.3e-4
    lr_d: Positive = 1.5e-4
    decay_g: NotNegative = 0.0
    decay_d: NotNegative = 0.0
    beta1: Annotated[float, Range(0, 0.9999)] = 0.5
    beta2: Annotated[float, Range(0, 0.9999)] = 0.999


@dataclass(frozen=True)
class TrainingConfig:
    steps: Whole = 100_000
    batch_size: Count = 8
    seed: Seed = 0
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.999
    # batches over which the averaged weights' batch statistics are measured anew; 0: averaged too
    recalibrate: Whole = 32
    log_every: Count = 10
    valid_every: Count = 1000
    valid_slices: Count = (
        128  # at most so many held-out slices are synthesized at a validation step
    )
    checkpoint_every: Count = 1000
    keep_checkpoints: Count = 2  # the newest; the best is kept as well
    best_metric: str | None = (
        # of the held-out patients (train/metrics/scores.py), by which a checkpoint is the best
        "body.mae_ratio"
    )
    best_is: Literal["lowest", "highest"] = "lowest"
    collapse_steps: Whole = (
        2000  # the run stops when the discriminator's losses were about 0 for so long; 0: never
    )
    threads: Annotated[int, Range(0, 1024)] = 0  # of the CPU; 0: as many as the process may use
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = (
        "fp32"  # of the networks' arithmetic in training; --dry-run times both on this machine
    )
    compile: bool = False  # the networks by torch.compile: minutes at the start, faster steps


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go beside metrics.jsonl (train/reporting/loggers.py).

    No part of what a run computes: --resume may change it.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_id: str | None = None  # of the Weights & Biases run to go on with


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Constructing it checks what no single key can show."""

    name: str = "run"
    license: str = (
        ""  # of the weights, such as "Apache-2.0": the model folder states it; empty: not stated
    )
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if (
            not self.name.strip()
            or Path(self.name).name != self.name
            or not self.name.isprintable()
        ):
            raise wrong("name", self.name, "a plain name, as of a folder")
        if self.generator.kind == "edge" and self.generator.depth < 2:
            raise wrong(
                "generator.depth",
                self.generator.depth,
                "at least 2 for edge, whose image is made in 4x4 blocks",
            )
        divisor, patch = 2**self.generator.depth, self.discriminator.patch_size
        if any(side % divisor for side in self.data.canvas):
            raise wrong(
                "data.canvas",
                list(self.data.canvas),
                f"multiples of {divisor} = 2**generator.depth",
                "change one of the two",
            )
        if patch & (patch - 1):
            raise wrong("discriminator.patch_size", patch, "a power of two")
        if min(self.data.canvas) < 2 * patch:
            raise wrong(
                "discriminator.patch_size",
                patch,
                f"at most half the canvas {list(self.data.canvas)}",
            )
        h, w = self.data.canvas
        if self.training.batch_size * (h // divisor) * (w // divisor) < 2:
            raise wrong(
                "training.batch_size",
                self.training.batch_size,
                "at least 2 when the deepest layer has one pixel (it is normalised over both)",
            )
        if self.generator.texture_kernel % 2 == 0:
            raise wrong("generator.texture_kernel", self.generator.texture_kernel, "an odd number")
        if (
            self.data.train_ratio < 1 and self.data.train_ratio + self.data.valid_ratio > 1 + 1e-9
        ):  # 1: all but the validated
            raise wrong(
                "data.train_ratio",
                self.data.train_ratio,
                f"at most 1 - valid_ratio = {1 - self.data.valid_ratio:g}",
            )
        label_table(self.data)
        for key, make in (
            ("data.slices", lambda: grid_policy(self)),
            ("intensity", lambda: intensity(self)),
        ):
            try:
                make()
            except ValueError as exc:
                raise ConfigError(f"{key}: {exc}", remedy="correct the section") from exc


def label_table(data: DataConfig) -> LabelTable:
    """The classes of the run, after `keep`.

    What is not kept becomes an alias of the background. Raises `ConfigError`.

    Labels that are not settled yet (null) count as MM-WHS'.
    """
    if data.labels is None:
        table = MM_WHS
    elif isinstance(data.labels, str):
        if data.labels not in PRESETS:
            raise wrong(
                "data.labels", data.labels, f"a list of labels, or a preset: {', '.join(PRESETS)}"
            )
        table = PRESETS[data.labels]
    else:
        if not isinstance(data.labels, list) or not all(
            isinstance(row, dict) for row in data.labels
        ):
            raise wrong(
                "data.labels",
                data.labels,
                f'a preset ({", ".join(PRESETS)}) or [{{"name": "background", "value": 0}}, ...]',
            )
        try:
            table = labels_from_json(data.labels)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            reason = f"a label lacks {exc}" if isinstance(exc, KeyError) else str(exc)
            raise ConfigError(
                f"data.labels: {reason}",
                expected='[{"name": "background", "value": 0}, {"name": ..., "value": ...}, ...]',
                remedy="correct the list, or name a preset",
            ) from exc
    if data.keep is None:
        return table
    if sorted(set(data.keep)) != list(data.keep) or not data.keep or data.keep[-1] >= len(table):
        raise wrong(
            "data.keep",
            list(data.keep),
            f"rising indices of labels, 1 to {len(table) - 1}: {table}",
        )
    background, kept = table.labels[0], [table.labels[index] for index in data.keep]
    dropped = [
        value
        for label in table.labels[1:]
        if label not in kept
        for value in (label.value, *label.aliases)
    ]
    return LabelTable(
        (
            Label(
                background.name,
                background.value,
                (*background.aliases, *dropped),
                background.snomed,
            ),
            *kept,
        )
    )


def grid_policy(config: RunConfig) -> GridPolicy:
    """The contract's grid policy of this run."""
    data = config.data
    return GridPolicy(
        data.canvas, data.pixel_spacing, 2**config.generator.depth, data.slices, data.slice_spacing
    )


def intensity(config: RunConfig) -> Intensity:
    """The contract's intensity range of this run."""
    return Intensity(config.intensity.unit, config.intensity.low, config.intensity.high)


def _labels_to_keep(value: Any) -> Any:
    return (
        [index for index in value if index != 0] if isinstance(value, (list, tuple)) else value
    )  # theirs lists the background


# The original system's key → ours, and how its value is read.
ORIGINAL_KEYS: dict[str, tuple[str, Any]] = {
    "NAME": ("name", None),
    "LABELS": ("data.keep", _labels_to_keep),
    "TARGET_NAME": ("data.image_name", None),
    "INPUT_NAME": ("data.label_name", None),
    "TARGET_TRANS": ("intensity", greys),
    "IMAGE_RES": ("data.canvas", None),
    "AUG_ROTATION_RANGE_DEGREES": ("augment.rotation", None),
    "AUG_SHEAR_RANGE_ANGLE": ("augment.shear", None),
    "AUG_WIDTH_SHIFT_RANGE_RATIO": ("augment.shift_width", None),
    "AUG_HEIGHT_SHIFT_RANGE_RATIO": ("augment.shift_height", None),
    "AUG_ZOOM_RANGE_RATIO": ("augment.zoom", None),
    "AUG_INPUT": ("augment.labels", None),
    "AUG_TARGET": ("augment.image", None),
    "AUG_SAME_FOR_BOTH": ("augment.same", None),
    "FIRST_LAYERS_FILTERS": ("generator.filters", None),
    "SKIP_CONNECTIONS_GENERATOR": ("generator.skips", None),
    "GEN_OUTPUT_ACT": ("generator.activation", None),
    "PATCH_SIZE": ("discriminator.patch_size", None),
    "CONDITIONAL_DISCRIMINATOR": ("discriminator.conditional", None),
    "LOSS_WEIGHT_DISC": ("loss.adversarial", None),
    "LOSS_WEIGHT_GEN": ("loss.reconstruction", None),
    "RECON_LOSS": ("loss.weighting", None),
    "LEARNING_RATE_G": ("optimizer.lr_g", None),
    "LEARNING_RATE_D": ("optimizer.lr_d", None),
    "LR_EXP_DECAY_FACTOR_G": ("optimizer.decay_g", None),
    "LR_EXP_DECAY_FACTOR_D": ("optimizer.decay_d", None),
    "ADAM_B1": ("optimizer.beta1", None),
    "MAX_ITER": ("training.steps", None),
    "BATCH_SIZE": ("training.batch_size", None),
    "LOG_INTERVAL": ("training.log_every", None),
    "VAL_INTERVAL": ("training.valid_every", None),
    "SAVE_MODEL_INTERVAL": ("training.checkpoint_every", None),
}


def load(path: Path) -> dict[str, Any]:
    """Read a config file. Raises `ConfigError` when it is missing or not a JSON object."""
    with (
        reading(path, "a JSON file such as train/configs/phantom.json", ConfigError),
        open_input(path) as handle,
    ):
        data = json.loads(handle.read().decode("utf-8"))
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path.name} does not hold a JSON object",
            expected='{"name": ..., "training": {...}}',
            remedy="see train/configs",
            file=path,
        )
    return data


def resolve(
    data: Mapping[str, Any], overrides: Iterable[str] = (), *, dataset_path: str | None = None
) -> RunConfig:
    """Config data, then `key=value` overrides, then --dataset-path → the checked config.

    Pure. Raises `ConfigError`.

    Values of overrides are JSON; what is not JSON is taken as a string. A dataset path replaces the
    phantom.
    """
    tree: dict[str, Any] = {}
    for key, value in data.items():
        if key in FIXED_KEYS:
            check_fixed(key, value, data)
        elif key.isupper():
            _put(tree, *_ours(key, value))
        elif isinstance(value, Mapping):
            tree[key] = {**tree.get(key, {}), **json.loads(json.dumps(value))}
        else:
            tree[key] = value
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {override} has no value",
                expected="--set section.key=value",
                remedy="write key=value without blanks",
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if key in FIXED_KEYS:
            check_fixed(key, value, data)
            continue
        _put(tree, *(_ours(key, value) if key.isupper() else (key, value)))
    if dataset_path is not None:
        _put(tree, "data.path", dataset_path)
    section = tree.get("data")
    if isinstance(section, dict) and section.get("path") is not None:
        section["phantom"] = None
    return build(RunConfig, tree)


def from_json(data: Mapping[str, Any]) -> RunConfig:
    """The config that `to_json` wrote."""
    return build(RunConfig, data)


def _ours(key: str, value: Any) -> tuple[str, Any]:
    if key not in ORIGINAL_KEYS:
        raise unknown(key, key, [*ORIGINAL_KEYS, *FIXED_KEYS])
    ours, convert = ORIGINAL_KEYS[key]
    return ours, convert(value) if convert else value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `tree[a][b] = value` for the key "a.b".

    A wrong name is found when the config is built.
    """
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[name] = value
