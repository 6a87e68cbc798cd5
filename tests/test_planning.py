"""A training without a config: everything is planned from the data, and said."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image
from samples import image, write_fake_model

from runtime.core.errors import ConfigError, InputError, Mask2CTError, UsageError
from runtime.core.manifest import Intensity, Label, LabelTable
from runtime.engines.fake import fake_manifest
from train import config as configs
from train import run
from train.config import DataConfig, RunConfig, intensity, resolve
from train.data.inference import infer_from_data
from train.data.intensities import normalized
from train.data.layouts import find
from train.distributed import DistributedContext
from train.evaluate import main as evaluate_main
from train.loop import open_cohort
from train.phantom.cohort import generate_cohort
from train.planning.budget import plan_budget, plan_steps
from train.planning.data_plan import Choices, plan_data
from train.planning.document import commented_config, plan_table
from train.planning.plan import Plan
from train.planning.survey import survey

Values = NDArray[Any]


def write_set(
    folder: Path,
    channel: str,
    make: Callable[[Values, int], Values],
    patients: int = 4,
    spacing: tuple[float, float, float] = (2.0, 2.0, 3.0),
) -> Path:
    """An nnU-Net set; `make` turns a label map (D, H, W) of 0, 1 and 2 into an image."""
    for n in range(patients):
        labels = np.zeros((12, 48, 40), np.uint8)
        labels[2:10, 8:40, 8 : 30 + n] = 1
        labels[4:8, 16:30, 12:24] = 2
        for file, values in (
            (folder / f"imagesTr/case_{n}_0000.nii.gz", make(labels, n)),
            (folder / f"labelsTr/case_{n}.nii.gz", labels),
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image(values, spacing=spacing), str(file))
    stated = {
        "channel_names": {"0": channel},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": patients,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(stated))
    return folder


def mr(labels: Values, n: int) -> Values:
    """A float MR of 0 to 3.6, in which one patient is twice as bright."""
    noise = np.random.default_rng(n).normal(0, 0.02, labels.shape)
    values = np.choose(labels, [0.02, 0.8, 1.8]) * (1 + (n == 1)) + noise
    return values.clip(0).astype(np.float32)


def ct(labels: Values, n: int) -> Values:
    noise = np.random.default_rng(n).normal(0, 10, labels.shape)
    return (np.choose(labels, [-1000, 40, 300]) + noise).astype(np.int16)


def choices_of(path: Path, **stated: Any) -> Choices:
    return plan_data(survey(find(path, DataConfig())), path, stated, cuda=False)


def planned(path: Path, *overrides: str) -> Plan:
    """A plan for few steps of a narrow network, without a measurement."""
    choices = choices_of(path) | plan_steps(3, "a test")
    tree: dict[str, Any] = {}
    for key, (value, _) in choices.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    config = resolve(tree, overrides, dataset_path=str(path))
    return Plan(config, {key: why for key, (_, why) in choices.items()}, "4 patients")


def test_float_mr_is_normalized(tmp_path: Path) -> None:
    """Every image fills the range, whatever its scanner's unit."""
    plan = planned(write_set(tmp_path / "knees", "T2", mr))
    data, unit = plan.config.data, plan.config.intensity
    assert (plan.config.name, data.modality, data.normalize) == ("knees", "MR", "volume")
    assert (unit.unit, unit.low, unit.high) == ("a.u.", 0, 1000)
    cohort = open_cohort(infer_from_data(plan.config)[0], tmp_path, quiet=True)
    medians = [
        float(np.median(patient.image[patient.labels[:, patient.labels.shape[1] // 2] == 1]))
        for patient in (*cohort.train, *cohort.valid)
    ]
    assert len(medians) == 4 and max(medians) / min(medians) < 1.1 and 300 < min(medians) < 600


def test_ct_range_spacing_canvas(tmp_path: Path) -> None:
    plan = planned(write_set(tmp_path / "livers", "CT", ct))
    data, unit = plan.config.data, plan.config.intensity
    assert (data.modality, unit.unit, unit.low, unit.high) == ("CT", "HU", -1024, 1024)
    assert data.pixel_spacing == (2.0, 2.0) and data.canvas == (64, 64)
    assert (data.slices, data.slice_spacing) == (5, 3.6)
    assert [row["name"] for row in data.labels] == ["background", "organ", "lesion"]
    bright = planned(write_set(tmp_path / "stents", "CT", lambda x, n: ct(x, n) * (1 + 5 * x)))
    assert 2048 < bright.config.intensity.high <= 3071


def test_pictures_are_fitted(tmp_path: Path) -> None:
    for n in range(5):
        grey = np.random.default_rng(n).integers(0, 60, (100, 150)).astype(np.uint8)
        label = np.zeros(grey.shape, np.uint8)
        label[20:60, 30:90] = 255
        for kind, values in (("images", grey + label // 2), ("masks", label)):
            (tmp_path / "xrays" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(tmp_path / "xrays" / kind / f"{n}.png")
    config = planned(tmp_path / "xrays").config
    assert (config.data.modality, config.data.normalize) == ("other", "none")
    assert (config.intensity.unit, config.intensity.high) == ("a.u.", 255)
    assert config.data.pixel_spacing is None and config.data.slices == 1
    assert config.data.canvas == (128, 192)
    assert config.data.labels[1] == {"name": "label 255", "value": 255}
    assert open_cohort(infer_from_data(config)[0], tmp_path, quiet=True).train[0].labels.max() == 1


def test_ct_channel_without_hu_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "CT", lambda x, n: ct(x, n) + np.int16(1024))
    with pytest.raises(InputError, match="which are not HU"):
        choices_of(folder)


def test_init_config_loads_again(tmp_path: Path) -> None:
    """The written file is the plan, and has a comment above every key."""
    plan = planned(write_set(tmp_path / "data", "CT", ct))
    file = tmp_path / "plan.json"
    file.write_text(commented_config(plan))
    assert resolve(configs.load(file)) == plan.config
    lines = file.read_text().splitlines()
    keys = [n for n, line in enumerate(lines) if re.match(r' +"\w+": ', line)]
    assert len(keys) > 50
    assert not [lines[n] for n in keys if not lines[n - 1].lstrip().startswith("//")]
    assert "// Planned: 3 of" not in file.read_text() and "// Planned: a test." in file.read_text()
    file.write_text(file.read_text().replace('"steps": 3', '"steps": x'))
    with pytest.raises(ConfigError):
        configs.load(file)


def test_budget_decides_width_and_steps(tmp_path: Path) -> None:
    """More time means more steps or a wider network; stated steps are kept."""
    config = planned(write_set(tmp_path / "data", "CT", ct)).config
    small = replace(config, data=replace(config.data, slices=1, slice_spacing=None))
    small = replace(small, training=replace(small.training, batch_size=2, threads=1))

    def resolve_with(choices: Choices) -> RunConfig:
        filters = choices.get("generator.filters", (8, ""))[0]
        return replace(small, generator=replace(small.generator, kind="edge", filters=filters))

    short = plan_budget(resolve_with, 1e-3, set())
    assert short["generator.filters"][0] == 8 and "raise --budget" in short["training.steps"][1]
    long = plan_budget(resolve_with, 1e5, set())
    assert long["generator.filters"][0] >= 32 and long["training.steps"][0] == 20_000
    own = plan_budget(resolve_with, 1e-3, {"training.steps"})
    assert own["training.steps"][0] == 3 and own["optimizer.decay_g"][0] == round(2 / 3, 7)


def test_plan_table_states_reasons(tmp_path: Path) -> None:
    table = plan_table(planned(write_set(tmp_path / "data", "MRI", mr)))
    for line in (
        r"data\.modality +MR +the dataset states it",
        r"data\.canvas +\[64, 64\] +fields of view up to 96 mm",
        r"training\.steps +3 +a test",
    ):
        assert re.search(line, table), table


@pytest.mark.parametrize(
    ("channel", "make", "settings", "says"),
    [
        ("CT", mr, (), "which are not HU"),
        ("CT", lambda x, n: ct(x, n) + np.int16(1024), (), "which are not HU"),
        ("MR", mr, ('intensity={"unit": "a.u.", "low": 0, "high": 1000}',), "of the range that is"),
        (
            "MR",
            lambda x, n: (mr(x, n) * 1000).astype(np.int16),
            ('intensity={"unit": "a.u.", "low": 0, "high": 1000}',),
            "of all voxels lie outside the range",
        ),
        (
            "MR",
            lambda x, n: (mr(x, n) * 1000).astype(np.int16),
            ('intensity={"unit": "a.u.", "low": 20000, "high": 30000}',),
            "all outside the range",
        ),
        ("CT", lambda x, n: ct(x, n) * (1 + 5 * x), (), "of all voxels lie outside the range"),
        ("MR", mr, ("data.modality=MR",), "data.modality is 'MR'"),
        ("MR", mr, ("data.normalize=volume",), "data.normalize is 'volume'"),
    ],
)
def test_settings_in_remedies_work(
    channel: str,
    make: Callable[[Values, int], Values],
    settings: tuple[str, ...],
    says: str,
    tmp_path: Path,
) -> None:
    """Every setting that a refusal suggests lets the data be read."""
    folder = write_set(tmp_path, channel, make)
    small = ["data.canvas=[64,64]", "generator.depth=4", "training.threads=1"]

    def read(extra: list[str]) -> RunConfig:
        config = resolve({}, [*small, *extra], dataset_path=str(folder))
        open_cohort(infer_from_data(config)[0], folder, quiet=True)
        return config

    def suggestions(extra: list[str]) -> list[list[str]]:
        try:
            config = read(extra)
        except Mask2CTError as exc:
            text = str(exc)
            parts = re.findall(r"--set ((?:'[^']*'|[\w.]+=[^\s;,]+)(?: [\w.]+=[^\s;,]+)*)", text)
            assert parts, text
            return [shlex.split(part) for part in parts]
        assert intensity(config).low < intensity(config).high
        return []

    with pytest.raises(Mask2CTError, match=says):
        read(list(settings))
    for extra in suggestions(list(settings)):
        assert not suggestions([*settings, *extra]), extra


def test_evaluation_normalizes_true_images(tmp_path: Path) -> None:
    """A model of normalised images is measured against true images that are normalised too."""
    labels = LabelTable((Label("background", 0), Label("organ", 1), Label("lesion", 2)))
    manifest = replace(
        fake_manifest(labels),
        intensity=Intensity("a.u.", 0, 1000),
        modality="MR",
        training={"normalize": "volume"},
    )
    model = write_fake_model(tmp_path / "model", manifest)
    data = write_set(tmp_path / "data", "T1", mr)
    for name in ("truth", "synthetic"):
        (tmp_path / name).mkdir()
    for n in range(4):
        true = sitk.ReadImage(str(data / f"imagesTr/case_{n}_0000.nii.gz"))
        sitk.WriteImage(true, str(tmp_path / "truth" / f"case_{n}.nii.gz"))
        values = normalized(sitk.GetArrayFromImage(true), manifest.intensity)
        generated = sitk.GetImageFromArray(np.rint(values).astype(np.int16))
        generated.CopyInformation(true)
        sitk.WriteImage(generated, str(tmp_path / "synthetic" / f"case_{n}_mr.nii.gz"))
    folders = {"truth": "truth", "synthetic": "synthetic", "masks": "data/labelsTr"}
    line = [part for key, name in folders.items() for part in (f"--{key}", str(tmp_path / name))]
    result = tmp_path / "result.json"
    assert evaluate_main([*line, "--run", str(model), "--json", str(result)]) == 0
    measured = json.loads(result.read_text())
    assert measured["body"]["mae"] < 1 and measured["organs"]["lesion"]["median_true"] > 400


def test_several_processes_need_a_config(tmp_path: Path) -> None:
    args = run.parser().parse_args(["--dataset-path", str(tmp_path)])
    with pytest.raises(UsageError, match="several processes train") as caught:
        run.planned(args, DistributedContext(world=2))
    assert f"--dataset-path {tmp_path} --init-config FILE" in caught.value.remedy


@pytest.mark.slow
def test_newcomer_trains_without_config(tmp_path: Path, command) -> None:
    """12 phantom patients in nnU-Net's layout with three labels: one command plans and trains."""
    source, data = tmp_path / "phantom", tmp_path / "Dataset007_Hearts"
    generate_cohort(source, 12, seed=5, size=(32, 48, 48))
    for kind in ("imagesTr", "labelsTr"):
        (data / kind).mkdir(parents=True)
    for file in sorted(source.glob("*_label.nii.gz")):
        case = file.name.removesuffix("_label.nii.gz")
        volume = sitk.ReadImage(str(file))
        values = sitk.GetArrayFromImage(volume)
        three = np.select([values == 500, values == 600, values == 205], [1, 2, 3], 0)
        labels = sitk.GetImageFromArray(three.astype(np.uint8))
        labels.CopyInformation(volume)
        sitk.WriteImage(labels, str(data / "labelsTr" / f"{case}.nii.gz"))
        shutil.copy(source / f"{case}_image.nii.gz", data / "imagesTr" / f"{case}_0000.nii.gz")
    stated = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "LV": 1, "RV": 2, "myocardium": 3},
        "numTraining": 12,
        "file_ending": ".nii.gz",
    }
    (data / "dataset.json").write_text(json.dumps(stated))
    folder = tmp_path / "run"
    few = ["training.steps=3", "training.batch_size=2", "training.recalibrate=1"]
    narrow = ["generator.filters=4", "discriminator.filters=4", "training.valid_slices=4"]
    line = ["train/run.py", "--dataset-path", data, "--budget", "30s", "--output", folder]
    trained = command(*line, "--set", *few, *narrow)
    assert trained.returncode == 0, trained.stderr
    stored = json.loads((folder / "run.json").read_text())
    # What follows from the number of steps follows the one that was given.
    assert stored["config"]["optimizer"]["decay_g"] == pytest.approx(2 / 3, abs=1e-6)
    assert stored["name"] == "Dataset007_Hearts" and stored["step"] == 3
    assert stored["data"]["patients"] == {"train": 10, "valid": 1, "test": 1}
    again = command(*line[:3], "--budget", "30s", "--config", "train/configs/phantom.json")
    assert again.returncode == 2 and "--budget and --init-config are for" in again.stderr
    resumed = command("train/run.py", "--dataset-path", data, "--output", folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
