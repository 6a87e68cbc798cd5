"""The config of a training run: frozen sections, loaded from JSON, overridden by `--set`.

The resolved config, written as JSON, is enough to rebuild the run. One table also accepts the keys
of the original system (MAX_ITER, BATCH_SIZE ...) wherever the keys of this project are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from runtime.core.atomic_files import open_input
from runtime.core.context import MAX_CLASSES
from runtime.core.errors import ConfigError, reading
from runtime.core.labels import MM_WHS, PRESETS
from runtime.core.manifest import GridPolicy, Intensity, Label, LabelTable, labels_from_json
from runtime.core.tissue_classes import HU_CONTEXT

from .data.original import FIXED_KEYS, check_fixed, greys
from .typed import Range, build, to_json, unknown, wrong

__all__ = [
    "RunConfig",
    "class_count",
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
    """A simulated cohort: `patients` thoraces of `size` (D, H, W) voxels (train/phantom)."""

    patients: Count = 24
    seed: Seed = 1
    size: tuple[Count, Count, Count] = (48, 128, 128)


@dataclass(frozen=True)
class DataConfig:
    """Where patients come from, what their labels are, and the grid the network sees them on."""

    # A folder or a table in one of the layouts of train/data/layouts.py; --dataset-path sets it.
    path: str | None = None
    # The simulated cohort to train on where there is no path.
    phantom: PhantomConfig | None = None
    # A preset's name, or [{"name": ..., "value": ...}, ...] with the background first. null: the
    # layout's labels.
    labels: Any = None
    # Indices of the labels to keep, which get new numbers; the others become background.
    keep: tuple[Count, ...] | None = None
    # (H, W) in pixels.
    canvas: tuple[Count, Count] = (256, 256)
    # In mm. None: each slice is fitted to the canvas.
    pixel_spacing: tuple[Positive, Positive] | None = None
    # The number Z of neighbouring slices that the network sees, odd.
    slices: Count = 1
    # The distance between these slices in mm.
    slice_spacing: Positive | None = None
    # The share of the patients to train on.
    train_ratio: Share = 0.95
    # The share to validate with; the others are tested on.
    valid_ratio: Share = 0.02
    # The seed of the shuffle before patients are split.
    split_seed: Seed = 123
    # "slices" cuts every volume into blocks, for cohorts with too few patients; it flatters all
    # metrics.
    split_by: Literal["patients", "slices"] = "patients"
    # What the images are, which the names of a model's results follow. null: as the dataset states
    # it, and CT where the unit is HU.
    modality: Literal["CT", "MR", "other"] | None = None
    # "volume" maps the 0.1 and the 99.9 percentile of each image to the intensity range: for MR,
    # whose intensities mean something else in every image.
    normalize: Literal["none", "volume"] = "none"
    # The largest share of voxels outside the intensity range that training accepts.
    max_clipped: Share = 0.01
    # "auto": voxels without a label get a tissue class (runtime/core/tissue_classes.py), which the
    # network sees as further labels.
    context: Literal["none", "auto"] = "none"
    # In the original's layout PATIENT_<name>.dcm holds the image, and another one the labels.
    image_name: str = "whs_img"
    # The same of the label map.
    label_name: str = "whs_img_gt"


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of the random maps of training slices (train/data/augmentation.py); all 0: none."""

    # In degrees.
    rotation: Annotated[float, Range(0, 180)] = 0.0
    # In degrees too.
    shear: Annotated[float, Range(0, 45)] = 0.0
    # As a share of the width.
    shift_width: Annotated[float, Range(0, 0.5)] = 0.0
    # The same of the height.
    shift_height: Annotated[float, Range(0, 0.5)] = 0.0
    # Each axis is scaled by 1 - zoom to 1 + zoom.
    zoom: Annotated[float, Range(0, 0.9)] = 0.0
    # Whether to move the label map.
    labels: bool = True
    # Whether to move the image.
    image: bool = True
    # One map for both; false: one for each.
    same: bool = True
    # With data.context: how often a label of a slice becomes its tissue class, and how often all
    # that has no label becomes unknown. A tissue class becomes unknown half as often as a label.
    drop_class: Share = 0.1
    drop_layout: Share = 0.15

    @property
    def active(self) -> bool:
        """Whether anything moves at all."""
        ranges = (self.rotation, self.shear, self.shift_width, self.shift_height, self.zoom)
        return any(ranges) and (self.labels or self.image)


@dataclass(frozen=True)
class IntensityConfig:
    """The intensity range that the network's [0, 1] stands for; training clips to it.

    "auto" becomes HU where the images hold them, else a.u. in [low, high]
    (train/data/inference.py), before a run folder is claimed.
    """

    # Hounsfield units, or arbitrary ones as of MR.
    unit: Literal["HU", "a.u.", "auto"] = "HU"
    # The lowest intensity; what is below is clipped.
    low: int = -1024
    # The highest one.
    high: int = 1024


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator (train/networks/blocks.py).

    `reference` is the original's network, `unet` is lighter and ends in full-resolution features,
    `edge` needs the least work.
    """

    kind: Literal["reference", "unet", "edge"] = "reference"
    # Channels of the first layer; they double with depth up to 8 times.
    filters: Count = 64
    # The number of stride-2 blocks: H and W are multiples of 2**depth.
    depth: Count = 7
    skips: bool = False
    activation: Literal["sigmoid"] = "sigmoid"
    # The number of learned noise filters; 0: the network takes no noise.
    textures: Whole = 0
    # The side of these filters in pixels, odd.
    texture_kernel: Count = 7
    # The length S of a style vector (train/networks/style.py); 0: the network takes no style.
    style: Whole = 0
    # Deviations of the cohort that a style of 1 stands for: how widely variants differ. With
    # data.context, a style is the contrast of each class, and `style` counts the directions in
    # which it is drawn.
    style_spread: Positive = 1.5
    # The share of a neighbouring slice's noise in a slice's noise, relative to its own, when a
    # volume is synthesized.
    noise_along_z: Share = 0.0


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator (train/networks/discriminator.py)."""

    filters: Count = 64
    # In pixels, a power of two: log2 of it is the number of stride-2 blocks.
    patch_size: Annotated[int, Range(2, 256)] = 16
    conditional: bool = True


@dataclass(frozen=True)
class LossConfig:
    """Weights of the generator's losses (train/losses.py), and how two of them are computed.

    Every loss needs a weight of its own name here; `train.losses.generator_weights` checks it.
    """

    adversarial: NotNegative = 1.0
    reconstruction: NotNegative = 100.0
    # Where the reconstruction loss counts: everywhere alike, or most at the mask.
    weighting: Literal["basic", "weighted"] = "basic"
    texture: NotNegative = 0.0
    # Matching of the discriminator's features.
    features: NotNegative = 0.0
    # The form of the adversarial loss; not a weight.
    gan: Literal["lsgan", "hinge"] = "lsgan"


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam's settings; the learning rate at step i is lr * exp(-decay * i)."""

    # The generator's learning rate.
    lr_g: Positive = 1.3e-4
    # The discriminator's.
    lr_d: Positive = 1.5e-4
    # How fast the generator's learning rate falls.
    decay_g: NotNegative = 0.0
    # The same of the discriminator's.
    decay_d: NotNegative = 0.0
    # Adam's first moment.
    beta1: Annotated[float, Range(0, 0.9999)] = 0.5
    # Adam's second moment.
    beta2: Annotated[float, Range(0, 0.9999)] = 0.999


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, on what device, and when to report, to validate and to save."""

    # The number of steps: one of the discriminator and one of the generator each.
    steps: Whole = 100_000
    # Slices per step, over all processes.
    batch_size: Count = 8
    # The seed of order, noise and augmentation.
    seed: Seed = 0
    # How slowly the averaged weights, which are exported, follow the trained ones.
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.999
    # Batches over which the averaged weights' batch statistics are measured anew; 0: the
    # statistics are averaged too.
    recalibrate: Whole = 32
    # Steps between lines in metrics.jsonl.
    log_every: Count = 10
    # Steps between validations.
    valid_every: Count = 1000
    # The most held-out slices that a validation synthesizes.
    valid_slices: Count = 128
    # Steps between checkpoints.
    checkpoint_every: Count = 1000
    # The number of newest checkpoints to keep; the best one stays as well.
    keep_checkpoints: Count = 2
    # The metric of the held-out patients that decides which checkpoint is the best. An error such
    # as body.mae_ratio rewards images that show each label's mean.
    best_metric: str | None = "distribution.frechet.axial"
    # Whether the best checkpoint has the lowest or the highest value of it.
    best_is: Literal["lowest", "highest"] = "lowest"
    # The run stops when the discriminator's losses were about 0 for so many steps; 0: never.
    collapse_steps: Whole = 2000
    # CPU threads; 0: as many as the process may use.
    threads: Annotated[int, Range(0, 1024)] = 0
    # Where to train; auto takes a CUDA device if there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # The networks' arithmetic in training; --dry-run times both on this machine.
    precision: Literal["fp32", "bf16"] = "fp32"
    # torch.compile for the networks: minutes at the start, faster steps.
    compile: bool = False


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides metrics.jsonl (train/reporting/loggers.py).

    It does not change what a run computes: --resume may change it.
    """

    # To RUN/tensorboard.
    tensorboard: bool = False
    # To Weights & Biases.
    wandb: bool = False
    # The Weights & Biases run to continue.
    wandb_id: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """The config of a run; its constructor checks what no single key can show."""

    # The name of the model, and of the run folder where none is given.
    name: str = "run"
    # The licence of the weights, such as "Apache-2.0", which the model folder states.
    license: str = ""
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
                "at least 2 for edge, whose image is generated in 4x4 blocks",
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
        # A train_ratio of 1 stands for all patients but the held-out ones.
        total_ratio = self.data.train_ratio + self.data.valid_ratio
        if self.data.train_ratio < 1 and total_ratio > 1 + 1e-9:
            raise wrong(
                "data.train_ratio",
                self.data.train_ratio,
                f"at most 1 - valid_ratio = {1 - self.data.valid_ratio:g}",
            )
        if self.data.modality == "MR" and self.intensity.unit == "HU":
            raise wrong(
                "data.modality",
                "MR",
                "a modality in HU, since intensity.unit is HU",
                "--set intensity.unit=a.u. intensity.low=0 intensity.high=1000"
                " data.normalize=volume",
            )
        if self.data.normalize == "volume" and self.intensity.unit == "HU":
            raise wrong(
                "data.normalize",
                "volume",
                "none, since HU mean the same in every image",
                "drop it, or train in arbitrary units: --set"
                ' \'intensity={"unit": "a.u.", "low": 0, "high": 1000}\'',
            )
        if class_count(self.data) > MAX_CLASSES:
            raise wrong("data.context", self.data.context, f"at most {MAX_CLASSES} classes in all")
        for key, make in (
            ("data.slices", lambda: grid_policy(self)),
            ("intensity", lambda: intensity(self)),
        ):
            try:
                make()
            except ValueError as exc:
                raise ConfigError(f"{key}: {exc}", remedy="correct the section") from exc


def label_table(data: DataConfig) -> LabelTable:
    """Build the label table of the run, after `keep`.

    Labels that `keep` leaves out become aliases of the background. Open labels (null) count as
    those of MM-WHS.

    Args:
        data: The section of the config.

    Returns:
        The label table.

    Raises:
        ConfigError: The labels or `keep` are wrong.
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
        except (TypeError, ValueError, AttributeError) as exc:
            raise ConfigError(
                f"data.labels: {exc}",
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
    background = table.labels[0]
    structures = [table.labels[index] for index in data.keep]
    dropped = [
        value
        for label in table.labels[1:]
        if label not in structures
        for value in (label.value, *label.aliases)
    ]
    merged_background = Label(
        background.name,
        background.value,
        (*background.aliases, *dropped),
        background.snomed,
    )
    return LabelTable((merged_background, *structures))


def class_count(data: DataConfig) -> int:
    """Count the classes that the network sees: labels with the background, and context classes.

    Args:
        data: The section of the config.

    Returns:
        The number of classes.
    """
    # Every context has as many classes as the one of HU.
    return len(label_table(data)) + (len(HU_CONTEXT) if data.context == "auto" else 0)


def grid_policy(config: RunConfig) -> GridPolicy:
    """Build the contract's grid policy for this run.

    Args:
        config: The config.

    Returns:
        The grid policy.
    """
    data = config.data
    return GridPolicy(
        data.canvas, data.pixel_spacing, 2**config.generator.depth, data.slices, data.slice_spacing
    )


def intensity(config: RunConfig) -> Intensity:
    """Build the contract's intensity range for this run.

    Args:
        config: The config.

    Returns:
        The intensity range.
    """
    return Intensity(config.intensity.unit, config.intensity.low, config.intensity.high)


def _labels_to_keep(value: Any) -> Any:
    """Convert LABELS of the original to `data.keep`."""
    # The original's list contains the background.
    return [index for index in value if index != 0] if isinstance(value, (list, tuple)) else value


# The original system's key → this project's key, and the function that converts the value.
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


def modality(config: RunConfig) -> str:
    """Tell the modality that the model folder of a run states.

    Args:
        config: The config.

    Returns:
        "CT", "MR" or "other"; empty where nothing states it.
    """
    return config.data.modality or ("CT" if config.intensity.unit == "HU" else "")


def load(path: Path) -> dict[str, Any]:
    """Read a config file.

    Args:
        path: The JSON file; lines that begin with // are comments.

    Returns:
        The JSON object.

    Raises:
        ConfigError: The file is missing or does not hold a JSON object.
    """
    with (
        reading(path, "a JSON file such as train/configs/phantom.json", ConfigError),
        open_input(path) as handle,
    ):
        data = json.loads(without_comments(handle.read().decode("utf-8")))
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path.name} does not hold a JSON object",
            expected='{"name": ..., "training": {...}}',
            remedy="see train/configs",
            file=path,
        )
    return data


def without_comments(text: str) -> str:
    """Empty the lines of JSON that are comments, so that errors name the right line.

    Args:
        text: JSON, with comments on lines of their own that begin with //.

    Returns:
        JSON; no string of it spans lines, so that none of them begins with //.
    """
    lines = text.split("\n")
    return "\n".join("" if line.lstrip().startswith("//") else line for line in lines)


def resolve(
    data: Mapping[str, Any], overrides: Iterable[str] = (), *, dataset_path: str | None = None
) -> RunConfig:
    """Apply overrides to config data, and check the result.

    The function is pure. An override's value is JSON; text that is not JSON counts as a string. A
    dataset path replaces the phantom.

    Args:
        data: The config data, as `load` returns it.
        overrides: Overrides as `key=value`.
        dataset_path: The value of --dataset-path.

    Returns:
        The checked config.

    Raises:
        ConfigError: A key or a value is wrong.
    """
    tree: dict[str, Any] = {}
    for key, value in data.items():
        if key in FIXED_KEYS:
            check_fixed(key, value, data)
        elif key.isupper():
            _put(tree, *_from_original(key, value))
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
        _put(tree, *(_from_original(key, value) if key.isupper() else (key, value)))
    if dataset_path is not None:
        _put(tree, "data.path", dataset_path)
    section = tree.get("data")
    if isinstance(section, dict) and section.get("path") is not None:
        section["phantom"] = None
    return build(RunConfig, tree)


def from_json(data: Mapping[str, Any]) -> RunConfig:
    """Build the config that `to_json` wrote.

    Args:
        data: The JSON object.

    Returns:
        The config.

    Raises:
        ConfigError: A key or a value is wrong.
    """
    return build(RunConfig, data)


def _from_original(key: str, value: Any) -> tuple[str, Any]:
    """Translate a key of the original system and its value."""
    if key not in ORIGINAL_KEYS:
        raise unknown(key, key, [*ORIGINAL_KEYS, *FIXED_KEYS])
    name, convert = ORIGINAL_KEYS[key]
    return name, convert(value) if convert else value


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `tree[a][b] = value` for the key "a.b".

    `build` reports a wrong name later.
    """
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[name] = value
