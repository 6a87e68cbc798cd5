"""The original system's config, folders and options, unchanged; and what of its keys is fixed
here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from samples import write_slices

from runtime.core.errors import ConfigError, ModelError
from train import checkpoint
from train.config import ORIGINAL_KEYS, AugmentConfig, label_table, load, resolve, to_json
from train.data.augmentation import augment, draw
from train.data.inference import infer_from_data
from train.data.original import FIXED_KEYS
from train.loop import open_cohort
from train.losses import centre_weight, generator_losses
from train.step import Batch, Step

WHS = Path(__file__).parent / "whs_original.json"
QUICK = [
    "MAX_ITER=4",
    "IMAGE_RES=[64,48]",
    "FIRST_LAYERS_FILTERS=4",
    "BATCH_SIZE=2",
    "generator.depth=4",
    "discriminator.filters=4",
    "training.recalibrate=1",
    "training.threads=2",
    "VAL_INTERVAL=4",
    "SAVE_MODEL_INTERVAL=2",
]


# each key but those of one value, a value that is not the default, and the key of ours that it sets
SETS = [
    ("NAME", "other", "name"),
    ("LABELS", [0, 1, 3], "data.keep"),
    ("TARGET_NAME", "ct", "data.image_name"),
    ("INPUT_NAME", "seg", "data.label_name"),
    ("TARGET_TRANS", 1 / 4095, "intensity.high"),
    ("IMAGE_RES", [128, 384], "data.canvas"),
    ("AUG_ROTATION_RANGE_DEGREES", 11, "augment.rotation"),
    ("AUG_SHEAR_RANGE_ANGLE", 12, "augment.shear"),
    ("AUG_WIDTH_SHIFT_RANGE_RATIO", 0.13, "augment.shift_width"),
    ("AUG_HEIGHT_SHIFT_RANGE_RATIO", 0.14, "augment.shift_height"),
    ("AUG_ZOOM_RANGE_RATIO", 0.15, "augment.zoom"),
    ("AUG_INPUT", False, "augment.labels"),
    ("AUG_TARGET", False, "augment.image"),
    ("AUG_SAME_FOR_BOTH", False, "augment.same"),
    ("FIRST_LAYERS_FILTERS", 16, "generator.filters"),
    ("SKIP_CONNECTIONS_GENERATOR", True, "generator.skips"),
    ("PATCH_SIZE", 32, "discriminator.patch_size"),
    ("CONDITIONAL_DISCRIMINATOR", False, "discriminator.conditional"),
    ("LOSS_WEIGHT_DISC", 2, "loss.adversarial"),
    ("LOSS_WEIGHT_GEN", 50, "loss.reconstruction"),
    ("RECON_LOSS", "weighted", "loss.weighting"),
    ("LEARNING_RATE_G", 1e-3, "optimizer.lr_g"),
    ("LEARNING_RATE_D", 2e-3, "optimizer.lr_d"),
    ("LR_EXP_DECAY_FACTOR_G", 1e-5, "optimizer.decay_g"),
    ("LR_EXP_DECAY_FACTOR_D", 2e-5, "optimizer.decay_d"),
    ("ADAM_B1", 0.4, "optimizer.beta1"),
    ("MAX_ITER", 7, "training.steps"),
    ("BATCH_SIZE", 3, "training.batch_size"),
    ("LOG_INTERVAL", 11, "training.log_every"),
    ("VAL_INTERVAL", 12, "training.valid_every"),
    ("SAVE_MODEL_INTERVAL", 13, "training.checkpoint_every"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("whs")
    write_slices(made, 6)
    return write_slices(made, 2, split="testing", seed=1)


@pytest.fixture(scope="module")
def run(folder: Path, command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of the original's config on its own folders, tested on testing/."""
    made = tmp_path_factory.mktemp("runs") / "whs"
    done = command(
        "train/run.py",
        f"--dataset_path={folder}",
        f"--config={WHS}",
        "--train_ratio",
        "1.0",
        "--valid_ratio",
        "0.2",
        "--output",
        made,
        "--set",
        *QUICK,
        "RECON_LOSS=weighted",
    )
    assert done.returncode == 0, done.stderr
    assert "single DICOM slices" in done.stderr and "a.u. from 0 to 255" in done.stderr
    return made


def test_original_config_keys_are_understood() -> None:
    config = resolve(load(WHS))
    assert (config.training.steps, config.training.valid_every, config.data.canvas) == (
        100_000,
        100,
        (256, 256),
    )
    assert (config.data.label_name, config.data.image_name, config.data.keep) == (
        "whs_img_gt",
        "whs_img",
        (1, 2, 3, 4, 5, 6, 7),
    )
    assert (config.intensity.unit, config.intensity.high, config.loss.weighting) == (
        "auto",
        255,
        "basic",
    )
    assert config.augment == AugmentConfig(5, 2, 0.05, 0.05, 0.05)


@pytest.mark.parametrize(("key", "value", "ours"), SETS, ids=[row[0] for row in SETS])
def test_original_key_sets_one_value(key: str, value: object, ours: str) -> None:
    """A key of the original system sets what it says and nothing else.

    No two of one kind are mistaken for each other, as where both have the same default.
    """
    theirs = load(WHS)
    del theirs["CONDITION_NAME"]  # INPUT_NAME's value, as the next test says
    plain, changed = (flat(to_json(resolve(data))) for data in (theirs, {**theirs, key: value}))
    made = {"LABELS": [1, 3], "TARGET_TRANS": 4095}.get(key, value)
    assert {name: changed[name] for name in plain if plain[name] != changed[name]} == {ours: made}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return found


def test_original_keys_are_complete() -> None:
    assert [*sorted({key for key, _, _ in SETS} | {"GEN_OUTPUT_ACT", *FIXED_KEYS})] == sorted(
        load(WHS)
    )
    assert {*ORIGINAL_KEYS, *FIXED_KEYS} == {*load(WHS)}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("CHANNELS", 3, "one channel"),
        ("INPUT_TRANS", 0.5, "one-hot"),
        ("CONDITION_TRANS", "x", "one-hot"),
        ("CONDITION_NAME", "other", "both networks see the same labels"),
        ("TARGET_TRANS", 0, "1/255"),
        ("TARGET_TRANS", "grey", "1/255"),
        ("TARGET_TRANS", True, "1/255"),
        ("RECON_LOSS", "wighted", "did you mean 'weighted'?"),
        ("GEN_OUTPUT_ACT", "tanh", "'sigmoid'"),
        ("AUG_SAME_FOR_BOTH", 1, "true or false"),
        ("CHANELS", 1, "did you mean 'CHANNELS'?"),
    ],
)
def test_original_key_with_one_value(key: str, value: object, says: str) -> None:
    """An error says why a key allows one value alone."""
    for arguments in (({**load(WHS), key: value}, []), (load(WHS), [f"{key}={json.dumps(value)}"])):
        with pytest.raises(ConfigError) as caught:
            resolve(*arguments)
        assert says in str(caught.value) and len(str(caught.value).splitlines()) <= 4


def test_grey_range_as_fraction() -> None:
    assert resolve({"TARGET_TRANS": "1/4095"}).intensity.high == 4095


@pytest.mark.slow
def test_original_run_greys_and_labels(run: Path) -> None:
    """The run is one in greys, on the labels of the original system."""
    data = json.loads((run / "run.json").read_text())
    assert data["intensity"] == {"unit": "a.u.", "low": 0, "high": 255}
    assert [row["value"] for row in data["labels"]] == list(range(8)) and data["labels"][3][
        "name"
    ] == "left ventricle"
    assert data["data"]["patients"] == {"train": 5, "valid": 1, "test": 2}


def test_mm_whs_label_order() -> None:
    """0..7 in its slices, 205..850 in the challenge's volumes: the same structures in the same
    order.
    """
    values = [205, 420, 500, 550, 600, 820, 850]
    names = [
        "myocardium",
        "left atrium",
        "left ventricle",
        "right atrium",
        "right ventricle",
        "ascending aorta",
        "pulmonary artery",
    ]
    volumes = label_table(resolve({}).data)
    assert volumes.by_value == {0: 0, **{value: n for n, value in enumerate(values, 1)}, 421: 2}
    for table in (volumes, label_table(replace(resolve(load(WHS)).data, labels="mm-whs-indices"))):
        assert [label.name for label in table.labels] == ["background", *names]


def test_original_hu_slices_stay_exact(tmp_path: Path) -> None:
    """Slices in HU keep each value to the unit.

    The original made 8 bits of them. Its folders, with CT slices in HU: what is trained on is what
    was scanned.
    """
    write_slices(tmp_path, 3, hu=True)
    config = infer_from_data(
        resolve(load(WHS), ["IMAGE_RES=[64,64]", "generator.depth=4"], dataset_path=str(tmp_path))
    )[0]
    assert config.intensity.unit == "HU" and (config.intensity.low, config.intensity.high) == (
        -1024,
        1976,
    )
    cohort = open_cohort(config, tmp_path, quiet=True)
    scanned = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in sorted(tmp_path.glob("training/*/*_img.dcm"))
    ]
    assert len({int(value) for value in np.unique(scanned)}) > 100
    assert sorted(patient.image.tolist() for patient in (*cohort.train, *cohort.valid)) == sorted(
        values.tolist() for values in scanned
    )


def test_config_keeps_two_structures(folder: Path) -> None:
    """train/configs/whs-lv-myo.json: `LABELS: [0, 1, 3]`, all else becomes background."""
    shipped = load(Path("train/configs/whs-lv-myo.json"))
    assert shipped["LABELS"] == [0, 1, 3]
    shipped["intensity"] = {"unit": "a.u.", "low": 0, "high": 255}
    config = infer_from_data(
        resolve(shipped, ["IMAGE_RES=[64,64]", "generator.depth=4"], dataset_path=str(folder))
    )[0]
    assert [label.name for label in label_table(config.data).labels] == [
        "background",
        "myocardium",
        "left ventricle",
    ]
    cohort = open_cohort(config, folder, quiet=True)
    drawn = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in sorted(folder.glob("training/*/*_gt.dcm"))
    ]
    kept = sorted(np.select([labels == 1, labels == 3], [1, 2], 0).tolist() for labels in drawn)
    assert (
        sorted(patient.labels[:, 0].tolist() for patient in (*cohort.train, *cohort.valid)) == kept
    )


@pytest.mark.slow
def test_original_intervals_are_followed(run: Path) -> None:
    """Scores every LOG_INTERVAL steps (10), pictures every VAL_INTERVAL (4), checkpoints every
    SAVE_MODEL_INTERVAL (2).
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "metrics" in row) for row in rows] == [(2, False), (4, True)]
    assert {"adversarial", "reconstruction", "d_real", "d_fake"} <= rows[0]["losses"].keys()
    assert [p.name for p in sorted((run / "figures").glob("step-*"))] == ["step-00000004.png"]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000004",
    ]


def test_resizing_mixes_no_labels(tmp_path: Path) -> None:
    """Between 0 and 7, a smoothing filter would make every label there is."""
    write_slices(tmp_path, 3)
    for path in tmp_path.glob("training/*/*_gt.dcm"):
        labels = np.zeros((1, 64, 64), np.uint8)
        labels[0, 11:50, 13:46] = 7
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(path))
    config = infer_from_data(
        resolve(load(WHS), ["IMAGE_RES=[48,80]", "generator.depth=4"], dataset_path=str(tmp_path))
    )[0]
    cohort = open_cohort(config, tmp_path, quiet=True)
    for patient in (*cohort.train, *cohort.valid):
        assert patient.labels.shape == (1, 1, 48, 80) and np.unique(patient.labels).tolist() == [
            0,
            7,
        ]


@pytest.mark.parametrize("conditional", [True, False])
def test_skips_and_unconditional_discriminator_train(conditional: bool) -> None:
    config = resolve(
        load(WHS),
        [
            *QUICK,
            "SKIP_CONNECTIONS_GENERATOR=true",
            f"CONDITIONAL_DISCRIMINATOR={json.dumps(conditional)}",
        ],
    )
    step, rng = Step(config), np.random.default_rng(0)
    batch = Batch(
        torch.from_numpy(rng.integers(0, 8, (2, 1, 64, 48), np.uint8)),
        torch.rand(2, 1, 64, 48),
        torch.zeros(2, 1, 64, 48),
    )
    assert (
        step.discriminator.stages[0][0].in_channels == (9 if conditional else 1)
        and step.generator.skips
    )
    assert all(torch.isfinite(value) for value in step(0, batch).values())


@pytest.mark.slow
def test_original_test_split_is_measured(run: Path, folder: Path, command) -> None:
    """`--test` measures the test split, not the validation split."""
    done = command("train/run.py", "--output", run, "--test", "--quiet")
    assert done.returncode == 0, done.stderr
    tested = json.loads((run / "test.json").read_text())
    assert (tested["split"], tested["patients"], tested["slices"], tested["step"]) == (
        "test",
        2,
        2,
        4,
    )
    assert (
        tested["metrics"]["cases"] == 2
        and tested["metrics"] != json.loads((run / "run.json").read_text())["metrics"]
    )
    assert (run / "figures" / "test.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_checkpoint_tested_into_other_folder(
    run: Path, folder: Path, tmp_path: Path, command
) -> None:
    source = run / "checkpoints" / "step-00000002"
    line = [
        "train/run.py",
        "--config",
        WHS,
        "--dataset_path",
        folder,
        "--set",
        *QUICK,
        "RECON_LOSS=weighted",
        "data.valid_ratio=0.2",
    ]
    done = command(
        *line,
        "--train_ratio",
        "1",
        "--ckpt_load",
        source,
        "--test",
        "--output",
        tmp_path,
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "test.json").read_text())["step"] == 2
    done = command(
        *line,
        "--train_ratio",
        "0.5",
        "--ckpt_load",
        source,
        "--test",
        "--output",
        tmp_path / "b",
        "--quiet",
    )
    assert (
        done.returncode == 2 and "data.train_ratio" in done.stderr and not (tmp_path / "b").exists()
    )


def test_test_without_patients_or_run(trained: Path, tmp_path: Path, command) -> None:
    """A test without test patients or without a run is refused."""
    done = command("train/run.py", "--output", trained, "--test", "--quiet")
    assert done.returncode == 2 and "the test split is empty" in done.stderr
    for more in (["--output", tmp_path], ["--ckpt_load", tmp_path], []):
        done = command("train/run.py", "--test", *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_training_from_loaded_checkpoint(run: Path, folder: Path, tmp_path: Path, command) -> None:
    line = [
        "train/run.py",
        "--config",
        WHS,
        "--dataset_path",
        folder,
        "--quiet",
        "--ckpt_load",
        run,
        "--output",
    ]
    done = command(*line, tmp_path / "next", "--set", *QUICK, "RECON_LOSS=weighted", "MAX_ITER=0")
    assert done.returncode == 0, done.stderr
    source = checkpoint.load(run / "checkpoints" / "step-00000004")[1]
    begun = checkpoint.load(tmp_path / "next" / "checkpoints" / "step-00000000")[1]
    assert source.keys() == begun.keys() and all(
        torch.equal(source[name], begun[name]) for name in source
    )
    done = command(*line, tmp_path / "other", "--set", *QUICK, "FIRST_LAYERS_FILTERS=8")
    assert (
        done.returncode == 2
        and "does not fit the networks" in done.stderr
        and not (tmp_path / "other").exists()
    )
    done = command(*line, tmp_path / "next", "--resume", "--set", *QUICK)
    assert done.returncode == 2 and "--ckpt-load and --resume" in done.stderr


def test_bad_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    from train.restore import checkpoint_of

    with pytest.raises(ModelError, match="is not a checkpoint"):
        checkpoint_of(tmp_path)


def test_original_loss_weight() -> None:
    """The weight is 1 in the mask and a Gaussian about the centroid of the mask."""
    labels = torch.zeros(2, 3, 8, 10)
    labels[0, 1, 2:5, 6] = 3  # rows 2, 3, 4 of column 6: the centroid is (3, 6)
    labels[0, 0] = 1  # a neighbouring slice does not count
    weight = centre_weight(labels)
    assert weight.shape == (2, 1, 8, 10) and weight.dtype == torch.float32
    assert weight[0, 0, 2:5, 6].tolist() == [1, 1, 1]
    assert weight[0, 0, 7, 1].item() == pytest.approx(
        np.exp(-0.5 * (4**2 / (60 * 8) + 5**2 / (30 * 10)))
    )
    assert weight[0, 0, 3, 9].item() == pytest.approx(np.exp(-0.5 * 3**2 / 300))
    assert torch.equal(weight[1], torch.ones(1, 8, 10))  # an empty mask: everywhere alike


def test_weighted_reconstruction_loss() -> None:
    """The weighted reconstruction loss is the weighted mean difference."""
    smooth, real = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8) * 0.5
    weight = torch.zeros(1, 1, 8, 8)
    weight[..., :2] = 1  # a quarter
    score = torch.zeros(1, 1, 2, 2)
    assert generator_losses(score, smooth, smooth, real, weight=weight)[
        "reconstruction"
    ].item() == pytest.approx(0.125)
    assert generator_losses(score, smooth, smooth, real)["reconstruction"].item() == pytest.approx(
        0.5
    )


def test_shear_slants_columns() -> None:
    """The one range that the others do not show: rows stay where they are, columns lean, as
    Keras' generator draws it.
    """
    maps = draw(AugmentConfig(shear=20), 200, np.random.default_rng(0))
    angles = np.degrees(np.arctan2(-maps[:, 0, 1], maps[:, 1, 1]))
    assert (
        np.array_equal(maps[:, :, 0], np.broadcast_to([1, 0], (200, 2))) and not maps[:, :, 2].any()
    )
    assert (
        19 < angles.max() <= 20
        and -20 <= angles.min() < -19
        and np.allclose(np.hypot(maps[:, 0, 1], maps[:, 1, 1]), 1)
    )


def test_original_augmentation_moves_both() -> None:
    """Labels and image move alike, unless the config says otherwise."""
    labels = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    labels[:, :, 12:20, 12:20] = 1
    image = labels.float()

    def moved(**settings: bool) -> tuple[torch.Tensor, torch.Tensor]:
        config = AugmentConfig(shift_width=0.25, shift_height=0.25, **settings)
        return augment(config, labels, image, np.random.default_rng(0))

    both, alone = moved(), moved(same=False)
    config = AugmentConfig(shift_width=0.25, shift_height=0.25, same=False)
    assert (
        (both[0] - both[1].round()).abs().mean() < 0.02 < (alone[0] - alone[1].round()).abs().mean()
    )
    assert torch.equal(both[0], alone[0])
    assert torch.equal(moved(labels=False)[0], labels) and torch.equal(
        moved(labels=False)[1], both[1]
    )
    assert torch.equal(moved(image=False)[1], image) and torch.equal(moved(image=False)[0], both[0])
    parts = [
        augment(config, labels[part], image[part], np.random.default_rng(0), 4, part)
        for part in (slice(2), slice(2, 4))
    ]
    for whole, *pieces in zip(
        alone, *parts, strict=True
    ):  # ranks move their parts as one process moves all
        assert torch.equal(whole, torch.cat(pieces))
    assert (
        not AugmentConfig(rotation=5, labels=False, image=False).active
        and AugmentConfig(rotation=5).active
    )
