"""Another modality by configuration alone: arbitrary units, other labels, from training to the
synthetic image.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import image, results, synth, write_fake_model, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.manifest import Intensity, Manifest
from runtime.engines.fake import fake_manifest
from runtime.io.marks import written_by_mask2ct
from train.metrics.scores import HU, diversity, evaluate, table

LABELS = [
    {"name": "background", "value": 0},
    {"name": "fluid", "value": 10},
    {"name": "tissue", "value": 20, "aliases": [21]},
]


def write_mr(folder: Path, patients: int) -> None:
    """MR-like pairs: tissue about 400, fluid about 800, air about 20, no HU anywhere."""
    rng = np.random.default_rng(0)
    for n in range(patients):
        labels = np.zeros((6, 64, 64), np.int16)
        labels[:, 12:50, 10 + n : 54] = 20
        labels[:, 24:36, 24:40] = 10
        values = np.choose(labels // 10, [20, 800, 400]) + rng.normal(0, 10, labels.shape)
        for kind, made in (
            ("image", np.clip(values, 0, None).astype(np.float32)),
            ("label", labels),
        ):
            sitk.WriteImage(
                image(made, spacing=(1.0, 1.0, 3.0)), str(folder / f"mr{n}_{kind}.nii.gz")
            )


@pytest.mark.slow
def test_mr_cohort_trains_exports_synthesizes(tmp_path: Path, command) -> None:
    data, run, model, out = (tmp_path / name for name in ("data", "run", "model", "out"))
    data.mkdir()
    write_mr(data, 4)
    settings = [
        f"data.labels={json.dumps(LABELS)}",
        "data.canvas=[64,64]",
        "generator.depth=4",
        "generator.filters=8",
        "discriminator.filters=8",
        "training.steps=60",
        "training.batch_size=4",
        "training.recalibrate=4",
        "training.threads=2",
        "optimizer.lr_g=2e-3",
        "intensity.high=1200",
        "license=CC-BY-4.0",
    ]
    trained = command(
        "train/run.py",
        "--config",
        "train/configs/mr.json",
        "--dataset-path",
        data,
        "--output",
        run,
        "--set",
        *settings,
    )
    assert trained.returncode == 0, trained.stderr
    exported = command("export/build_engine.py", run, "-o", model, "--onnx-only")
    assert exported.returncode == 0, exported.stderr
    assert "a.u., 1 - SSIM" in exported.stderr + exported.stdout and not re.search(
        r"\bHU\b", exported.stderr + exported.stdout
    )
    manifest = json.loads((model / "manifest.json").read_text())
    assert manifest["license"] == "CC-BY-4.0" and manifest["name"] == "mr"
    assert manifest["intensity"] == {"unit": "a.u.", "low": 0, "high": 1200}
    assert manifest["modality"] == "MR"
    assert [(row["name"], row["value"]) for row in manifest["labels"]] == [
        ("background", 0),
        ("fluid", 10),
        ("tissue", 20),
    ]
    generated = command(
        "-m",
        "runtime",
        "synth",
        data / "mr0_label.nii.gz",
        "--model",
        model,
        "--output",
        out,
        "--quiet",
    )
    assert generated.returncode == 0, generated.stderr
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "mr0_label.nii.gz")))
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "mr0_label_mr.nii.gz")))
    assert values.dtype == np.int16 and values.min() >= 0 and values.max() <= 1200
    air, fluid, tissue = (np.median(values[mask == value]) for value in (0, 10, 20))
    assert air < tissue < fluid and abs(tissue - 400) < 150  # what the labels mean is learnt
    assert "a.u. between real and real" in trained.stdout and "HU" not in trained.stdout
    for said in ((run / "report.html"), (model / "MODEL_CARD.md")):
        text = said.read_text()
        assert "a.u." in text and not re.search(r"\bHU\b", text), (
            said.name
        )  # and no figure of it is called HU

    folders = {name: tmp_path / "compared" / name for name in ("masks", "truth", "synthetic")}
    for name, source in (
        ("masks", data / "mr0_label.nii.gz"),
        ("truth", data / "mr0_image.nii.gz"),
        ("synthetic", out / "mr0_label_mr.nii.gz"),
    ):
        folders[name].mkdir(parents=True)
        shutil.copy(
            source, folders[name] / ("case_mr.nii.gz" if name == "synthetic" else "case.nii.gz")
        )
    line = [
        "-m",
        "train.evaluate",
        *(part for name, folder in folders.items() for part in (f"--{name}", folder)),
    ]
    for stated in (run, model):
        done = command(*line, "--run", stated)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert (
            result["organs"]["fluid"]["median_true"] == pytest.approx(800, abs=5)
            and "fluid" in done.stdout
            and "HU" not in done.stdout
        )
        assert result["body"]["voxels"] == pytest.approx(
            (mask != 0).sum(), rel=0.02
        )  # the outline of what is bright
    refused = command(
        *line
    )  # an HU table of what is not in HU, and labels that the preset does not know
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    again = command("-m", "train.evaluate", "--run", run)
    assert again.returncode == 0, again.stderr
    stated = json.loads((run / "run.json").read_text())["metrics"]
    assert (
        json.loads(again.stdout.splitlines()[-1])["organs"]["tissue"] == stated["organs"]["tissue"]
    )


def test_arbitrary_units_metrics_match_hu() -> None:
    """Arbitrary units are measured like HU, on their own range.

    The same images, once in HU and once as greys of 0..255: all that is relative agrees.
    """
    rng = np.random.default_rng(0)
    mask = np.zeros((3, 64, 64), np.uint8)
    mask[:, 16:40, 16:40] = 1
    ct = np.where(mask, 400, 30) + rng.normal(0, 40, mask.shape)
    ct[:, :8] = ct[:, :, :8] = -1000
    generated = ct + rng.normal(0, 60, ct.shape)
    greys = Intensity("a.u.", 0, 255)
    hu, grey = (
        evaluate([a.astype(np.float32)], [b.astype(np.float32)], [mask], ["heart"], intensity=unit)
        for a, b, unit in (
            (generated, ct, HU),
            ((generated + 1024) / 2048 * 255, (ct + 1024) / 2048 * 255, greys),
        )
    )
    assert hu["body"]["voxels"] == grey["body"]["voxels"] > 0
    assert grey["body"]["mae_ratio"] == pytest.approx(hu["body"]["mae_ratio"], rel=1e-3)
    assert grey["similarity"] == pytest.approx(hu["similarity"], rel=1e-3)
    assert grey["organs"]["heart"]["median"] == pytest.approx(
        (hu["organs"]["heart"]["median"] + 1024) / 2048 * 255, rel=1e-3
    )
    assert "MAE" in table(grey, "a.u.") and "HU" not in table(grey, "a.u.")
    variants = [[generated, generated + 50]]
    as_hu = diversity(variants, [mask], [np.array([400.0]), np.array([450.0])], ["heart"])
    as_greys = diversity(
        [[(v + 1024) / 2048 * 255 for v in variants[0]]],
        [mask],
        [np.array([400.0]), np.array([450.0])],
        ["heart"],
        greys,
    )
    assert as_greys["ssim"] == pytest.approx(as_hu["ssim"], rel=1e-3)


@pytest.mark.slow
def test_hu_table_without_hu_is_refused(tmp_path: Path, command) -> None:
    """The error states the reason."""
    for name in ("masks", "truth", "synthetic"):
        (tmp_path / name).mkdir()
        values = np.full((2, 16, 16), 500, np.int16)
        sitk.WriteImage(
            image(values),
            str(tmp_path / name / ("a_ct.nii.gz" if name == "synthetic" else "a.nii.gz")),
        )
    line = [
        "-m",
        "train.evaluate",
        *(
            part
            for name in ("masks", "truth", "synthetic")
            for part in (f"--{name}", tmp_path / name)
        ),
    ]
    done = command(*line)
    assert (
        done.returncode == 1
        and "a.nii.gz holds values from 500 to 500, which are not HU" in done.stderr
        and "--run" in done.stderr
    )
    assert "Traceback" not in done.stderr and done.stdout == ""
    for wrong, says in (
        (line[:-2], "--synthetic is not given"),
        ([*line, "--run", "x", "--labels", "mm-whs"], "given together"),
        ([*line, "--run", tmp_path], "run.json"),
    ):
        done = command(*wrong)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [[], ["--enhanced"], ["--dry-run"]], ids=" ".join)
def test_ct_series_without_hu_is_refused(
    options: list[str], greys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error states the reason."""
    mask = write_mask(tmp_path / "a.nii.gz")
    assert synth(greys, tmp_path / "out", mask, "--format", "dicom", *options) == 2
    assert_refused(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]  # not even an empty folder
    if not options:
        assert (
            synth(greys, tmp_path / "out", mask) == 0
            and (tmp_path / "out" / "a_ct.nii.gz").is_file()
        )  # the remedy that it names


def test_watch_without_hu_is_refused(
    greys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A watcher does not begin to write a CT series of a model that is not in HU."""
    inbox = tmp_path / "in"
    inbox.mkdir()
    mask = write_mask(inbox / "a.nii.gz")
    line = [
        "--model",
        str(greys),
        "--backend",
        "fake",
        "--output",
        str(tmp_path / "out"),
        "--format",
        "dicom",
        "--once",
        "--stable",
        "0",
    ]
    assert run(main, ["watch", str(inbox), *line]) == 2
    assert_refused(capsys.readouterr().err)
    assert mask.is_file() and [*inbox.iterdir()] == [mask] and [*tmp_path.iterdir()] == [inbox]


def test_node_without_hu_is_refused(
    greys: Path, fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node for a model that is not in HU does not begin to listen.

    Nor beside one that is: which studies it would refuse, no sender could know.
    """
    spool = tmp_path / "spool"
    for models in ([greys], [fake_model, greys]):
        line = [part for model in models for part in ("--model", str(model))]
        assert (
            run(
                main,
                [
                    "serve",
                    *line,
                    "--backend",
                    "fake",
                    "--spool",
                    str(spool),
                    "--port",
                    "0",
                    "--allow-any",
                    "--keep",
                ],
            )
            == 2
        )
        said = capsys.readouterr().err
        assert_refused(said)
        assert "listening" not in said and not spool.exists()


@pytest.fixture
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for `--backend fake` whose images are in arbitrary units."""
    manifest = replace(
        fake_manifest(noise=False), name="greys", intensity=Intensity("a.u.", 0, 255)
    )
    return write_fake_model(tmp_path_factory.mktemp("models") / "greys", manifest)


@pytest.mark.parametrize(
    ("modality", "content", "channel", "mark"),
    [
        ("MR", "mr", "synthetic MR", b"SYNTHETIC MR - NOT FOR DIAGNOSIS"),
        ("other", "image", "synthetic image", b"SYNTHETIC IMAGE - NOT FOR DIAGNOSIS"),
        # as older models, whose output folders are resumed
        ("", "ct", "synthetic", b"SYNTHETIC CT - NOT FOR DIAGNOSIS"),
    ],
)
def test_names_follow_the_modality(
    modality: str, content: str, channel: str, mark: bytes, tmp_path: Path
) -> None:
    manifest = replace(
        fake_manifest(noise=False), intensity=Intensity("a.u.", 0, 255), modality=modality
    )
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    model = write_fake_model(tmp_path / "model", manifest)
    mask, out = write_mask(tmp_path / "a.nii.gz"), tmp_path / "out"
    for arguments in ((), ("--variants", "1"), ("--resume",)):
        assert synth(model, out, mask, *arguments) == 0
    names = {f"a_{content}.nii.gz", f"a_v0_{content}.nii.gz", "a_v0_mask.nii.gz"}
    assert {path.name for path in out.glob("*.nii.gz")} == names
    file = out / f"a_{content}.nii.gz"
    assert mark in gzip.decompress(file.read_bytes())[:400] and written_by_mask2ct(file)
    assert synth(model, tmp_path / "set", mask, "--format", "nnunet") == 0
    stated = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert stated["channel_names"] == {"0": channel}
    assert mark.decode() in stated["description"]


def test_ct_names_and_mark_stay(fake_model: Path, tmp_path: Path) -> None:
    """Whether a model states CT or, as before, nothing: the same files."""
    stated = replace(Manifest.load(fake_model), modality="CT")
    mask = write_mask(tmp_path / "a.nii.gz")
    model = write_fake_model(tmp_path / "model", stated)
    for name, folder in (("old", fake_model), ("new", model)):
        assert synth(folder, tmp_path / name, mask, "--variants", "2") == 0
    assert results(tmp_path / "old") == results(tmp_path / "new")
    assert (tmp_path / "new" / "a_v1_ct.nii.gz").is_file()


def assert_refused(said: str) -> None:
    assert (
        "synthesizes a.u., not HU" in said
        and "Hounsfield units for a CT series" in said
        and "--format nifti" in said
    )
    assert "Traceback" not in said and "→" not in said
