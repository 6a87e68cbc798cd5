"""Every format a result is written in: the grid is the mask's for every reader, the bytes are
one's own, others' files are left alone.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs, directions, mask2ct, rotation, synth, write_mask

from runtime import LabelVolume, OutputError, Synthesizer, UsageError
from runtime.core.manifest import Label, LabelTable
from runtime.core.volume import CTSlab, Geometry
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.io.marks import written_by_mask2ct
from runtime.io.writers.base import result_name
from runtime.io.writers.registry import DEFAULT_OPTIONS, FORMATS, OutputRecord
from runtime.io.writers.volume import GZIP_THREADS, planes_of, write_ct

VOLUMES = {"nifti": ".nii.gz", "nii": ".nii", "nrrd": ".nrrd", "mha": ".mha"}
NOTICE = b"SYNTHETIC CT - NOT FOR DIAGNOSIS"


def test_command_formats_are_known() -> None:
    """Those that scripts name; a new format is tested by each test that takes `FORMATS`."""
    assert {*VOLUMES, "dicom", "nnunet", "msd"} <= set(FORMATS)


@pytest.mark.parametrize(
    "direction",
    directions(),
    ids=lambda d: "".join("+-"[int(c.sum() < 0)] + "xyz"[int(np.abs(c).argmax())] for c in d.T),
)
@pytest.mark.parametrize("shape", [(4, 6, 5), (1, 6, 5)], ids=["volume", "single slice"])
def test_volume_grid_equals_mask_grid(direction: np.ndarray, shape, tmp_path: Path) -> None:
    """Every volume format has the grid of the mask, in all axis orders.

    Oblique and anisotropic. SimpleITK reads all of them, nibabel the NIfTIs: corners and centre
    within 1e-3 mm, every voxel its own.
    """
    axis = int(np.abs(direction[2]).argmax())
    hu = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) - 60
    mask = LabelVolume(
        np.zeros(shape, np.uint8),
        Geometry.from_parts(
            (12.5, -90, 300.25), (0.7, 0.9, 3.1), (rotation((12, -8, 25)) @ direction).ravel()
        ),
    )
    last = shape[0] - 1
    index = [[0, 0, 0], [4, 5, last], [4, 0, last], [0, 5, 0], [2, 3, last // 2]]
    expected = np.array([(mask.geometry.affine @ [*i, 1])[:3] for i in index])
    array_axis = 2 - axis
    slabs = [CTSlab(np.take(hu, [k], array_axis), array_axis, k) for k in range(shape[array_axis])]
    for suffix in VOLUMES.values():
        path = tmp_path / f"x{suffix}"
        write_ct(path, slabs, mask)
        read = sitk.ReadImage(str(path))
        assert (
            np.array_equal(sitk.GetArrayFromImage(read), hu) and read.GetPixelID() == sitk.sitkInt16
        )
        assert (
            np.abs([read.TransformIndexToPhysicalPoint(i) for i in index] - expected).max() < 1e-3
        )
        if "nii" in suffix:
            nib = nibabel.load(path)
            assert np.array_equal(np.asarray(nib.dataobj).T, hu)
            assert (
                np.abs([(nib.affine @ [*i, 1])[:3] * [-1, -1, 1] for i in index] - expected).max()
                < 1e-3
            )


@pytest.mark.parametrize(("name", "suffix"), VOLUMES.items())
def test_volume_states_synthetic(name: str, suffix: str, tmp_path: Path, fake_model: Path) -> None:
    """A volume states that it is synthetic, and its mask lies beside it."""
    mask = write_mask(tmp_path / "case.nii.gz")
    assert synth(fake_model, tmp_path / "out", mask, "--format", name, "--variants", "2") == 0
    made = sorted((tmp_path / "out").glob(f"*{suffix}"))
    assert [p.name for p in made] == [
        f"case_v{n}_{what}{suffix}" for n in range(2) for what in ("ct", "mask")
    ]
    for path in made:
        content = gzip.decompress(path.read_bytes()) if suffix == ".nii.gz" else path.read_bytes()
        assert NOTICE in content[:1024] and written_by_mask2ct(path)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(made[1]))), blobs())
    before = {p.name: p.read_bytes() for p in made}
    assert (
        synth(
            fake_model, tmp_path / "out", mask, "--format", name, "--variants", "2", "--batch", "1"
        )
        == 0
    )  # over its own
    assert {p.name: p.read_bytes() for p in made} == before


@pytest.mark.parametrize("suffix", VOLUMES.values())
def test_bytes_ignore_threads_and_slabs(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes depend neither on the number of threads nor on the size of the slabs."""
    shape = (12, 300, 290)
    hu = np.random.default_rng(0).integers(-1024, 1024, shape).astype(np.int16)
    mask = LabelVolume(np.zeros(shape, np.uint8), Geometry(np.eye(4)))
    written = set()
    for threads, step in ((GZIP_THREADS, 12), (1, 1), (4, 5)):
        monkeypatch.setattr("runtime.io.writers.volume.GZIP_THREADS", threads)
        write_ct(
            tmp_path / f"x{suffix}",
            [CTSlab(hu[k : k + step], 0, k) for k in range(0, 12, step)],
            mask,
        )
        written.add((tmp_path / f"x{suffix}").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("axis", [1, 2])
def test_other_axis_volume_is_streamed(
    axis: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume that is synthesized along another axis is never held in memory."""
    monkeypatch.setattr("runtime.io.writers.volume.SPOOLED", 1 << 20)
    shape = (96, 200, 200)  # 7.3 MiB
    hu = np.random.default_rng(0).integers(-1024, 1024, shape).astype(np.int16)
    slabs = (CTSlab(np.take(hu, range(k, k + 8), axis), axis, k) for k in range(0, 200, 8))
    tracemalloc.start()
    try:
        for k, plane in enumerate(planes_of(slabs, shape, tmp_path)):
            assert np.array_equal(plane, hu[k])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert k == 95 and peak < 3 << 20 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_foreign_files_are_not_replaced(
    name: str, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, manifest = tmp_path / "out", fake_manifest()
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        mask = write_mask(tmp_path / "case.nii.gz")
        (result,) = opened.stream([mask], out, format=name)
        target = result.files[0]
        precious = target / "notes.dcm" if target.is_dir() else target
        precious.write_bytes(b"mine")
        with pytest.raises(UsageError, match="was not written by mask2ct"):
            opened.stream([mask], out, format=name)
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("name", FORMATS)
def test_failed_write_keeps_previous_result(name: str, tmp_path: Path) -> None:
    manifest, labels = fake_manifest(), np.ones((6, 8, 9), np.uint8)
    record = OutputRecord(
        "case", 0, LabelVolume(labels, Geometry(np.eye(4))), manifest, "fake (given)", "", 0
    )
    writer = FORMATS[name](DEFAULT_OPTIONS)
    writer.check(manifest, tmp_path)

    def slabs(count: int) -> Iterator[CTSlab]:
        for k in range(count):
            yield CTSlab(np.full((1, 8, 9), k, np.int16), 0, k)
        if count < 6:
            raise OSError(28, "No space left on device")

    for _ in range(2):  # first there is nothing before it, then a whole result
        before = {
            p: p.read_bytes()
            for p in tmp_path.rglob("*")
            if p.is_file() and "labelsTr" not in p.parts
        }
        with pytest.raises(OutputError, match="the disk is full"):
            writer.write(tmp_path, record, slabs(3))
        assert {
            p: p.read_bytes()
            for p in tmp_path.rglob("*")
            if p.is_file() and "labelsTr" not in p.parts
        } == before
        writer.write(tmp_path, record, slabs(6))


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "\\\\server\\x", "x\0y", ".hidden"])
def test_case_names_stay_in_output_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot name a file"):
        result_name(name, None)
    for made in FORMATS.values():
        with pytest.raises(UsageError):
            made(DEFAULT_OPTIONS).files(tmp_path, name, 0)


def test_dot_dot_name_replaces_no_folder(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file "...nii.gz" is the case ".."; as a DICOM folder that would be the output folder's
    parent.
    """
    os.replace(write_mask(tmp_path / "m.nii.gz"), tmp_path / "...nii.gz")
    for name in FORMATS:
        assert (
            synth(fake_model, tmp_path / "out" / "deep", tmp_path / "...nii.gz", "--format", name)
            == 2
        )
        assert "rename the mask" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["...nii.gz", "deep", "out"]


def test_nnunet_raw_dataset_grows(tmp_path: Path, fake_model: Path) -> None:
    """The folder is what nnU-Net asks for, and a later run adds to it."""
    out = tmp_path / "Dataset501_Synthetic"
    for n in range(2):
        write_mask(tmp_path / f"c{n}.nii.gz", blobs(seed=n))
    assert (
        synth(fake_model, out, tmp_path / "c0.nii.gz", "--format", "nnunet", "--variants", "2") == 0
    )
    data = json.loads((out / "dataset.json").read_text())
    names = [
        "background",
        "myocardium",
        "left atrium",
        "left ventricle",
        "right atrium",
        "right ventricle",
        "ascending aorta",
        "pulmonary artery",
    ]
    assert (
        data["channel_names"] == {"0": "CT"}
        and data["file_ending"] == ".nii.gz"
        and data["numTraining"] == 2
    )
    assert data["labels"] == {name: n for n, name in enumerate(names)}
    assert sorted(p.name for p in (out / "imagesTr").iterdir()) == [
        "c0_v0_0000.nii.gz",
        "c0_v1_0000.nii.gz",
    ]
    assert sorted(p.name for p in (out / "labelsTr").iterdir()) == ["c0_v0.nii.gz", "c0_v1.nii.gz"]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "labelsTr" / "c0_v0.nii.gz")))
    assert np.array_equal(label, np.searchsorted([0, 205, 420, 500, 550, 600, 820, 850], blobs()))
    for _ in range(2):  # appended, and a second time: the same
        assert synth(fake_model, out, tmp_path / "c1.nii.gz", "--format", "nnunet") == 0
        assert json.loads((out / "dataset.json").read_text())["numTraining"] == 3


def test_msd_index_keeps_foreign_pairs(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index of MSD lists the new pairs and keeps those that other programs listed."""
    out = tmp_path / "Task01_Heart"
    assert synth(fake_model, out, write_mask(tmp_path / "a.nii.gz"), "--format", "msd") == 0
    data = json.loads((out / "dataset.json").read_text())
    assert data["labels"]["3"] == "left ventricle" and data["modality"] == {"0": "CT"}
    assert (
        data["training"] == [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
        and data["numTraining"] == 1
    )
    real = {"image": "./imagesTr/real_7.nii.gz", "label": "./labelsTr/real_7.nii.gz"}
    (out / "dataset.json").write_text(
        json.dumps({**data, "training": [real, *data["training"]], "licence": "theirs"})
    )
    assert synth(fake_model, out, write_mask(tmp_path / "b.nii.gz"), "--format", "msd") == 0
    data = json.loads((out / "dataset.json").read_text())
    assert [row["label"][11:] for row in data["training"]] == [
        "real_7.nii.gz",
        "a.nii.gz",
        "b.nii.gz",
    ]
    assert data["numTraining"] == 3 and data["licence"] == "theirs"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nnunet", "msd"])
def test_index_of_500_cases_survives_kill(format: str, tmp_path: Path, fake_model: Path) -> None:
    """It is written once a run: of one that was killed, by the run that goes on, even where
    nothing was left to synthesize.
    """
    out = tmp_path / "set"
    arguments = [
        "synth",
        str(write_mask(tmp_path / "c.nii.gz", blobs((2, 16, 16)))),
        "--model",
        str(fake_model),
        "--backend",
        "fake",
        "--quiet",
        "--output",
        str(out),
        "--format",
        format,
        "--variants",
        "500",
        "--deform",
        "0",
        "--rotate",
        "0",
        "--scale",
        "0",
    ]
    process = multiprocessing.get_context("spawn").Process(target=mask2ct, args=(arguments,))
    process.start()
    while process.is_alive() and len(list((out / "labelsTr").glob("c*"))) < 100:
        process.join(0.01)
    process.kill()
    process.join()
    assert (
        not (out / "dataset.json").exists() and 99 <= len(list((out / "labelsTr").glob("c*"))) < 500
    )
    for _ in range(2):
        assert synth(fake_model, out, *arguments[1:2], *arguments[9:], "--resume") == 0
        data = json.loads((out / "dataset.json").read_text())
        assert data["numTraining"] == 500
        if format == "msd":
            rows = [
                {"image": f"./imagesTr/c_v{n}.nii.gz", "label": f"./labelsTr/c_v{n}.nii.gz"}
                for n in range(500)
            ]
            assert sorted(data["training"], key=str) == sorted(rows, key=str)
        (out / "dataset.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"background": 0, "tumour": 1}},
        {"channel_names": {"0": "CT", "1": "PET"}},
        {"file_ending": ".mha"},
        {"dataset": {}},
        "no json",
    ],
)
def test_foreign_dataset_is_not_touched(
    change, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data set of another kind is refused and stays as it was."""
    out = tmp_path / "Dataset001_Theirs"
    mask = write_mask(tmp_path / "a.nii.gz")
    assert synth(fake_model, out, mask, "--format", "nnunet") == 0
    theirs = (
        change
        if isinstance(change, str)
        else json.dumps({**json.loads((out / "dataset.json").read_text()), **change})
    )
    (out / "dataset.json").write_text(theirs)
    assert synth(fake_model, out, write_mask(tmp_path / "b.nii.gz"), "--format", "nnunet") == 2
    assert "dataset.json" in capsys.readouterr().err
    assert (out / "dataset.json").read_text() == theirs and len(
        list((out / "imagesTr").iterdir())
    ) == 1


def test_arbitrary_units_nnunet_and_dicom(tmp_path: Path) -> None:
    """A volume in arbitrary units is not a CT for nnU-Net, and never becomes a DICOM series."""
    from dataclasses import replace

    from runtime.core.manifest import Intensity

    manifest = replace(
        fake_manifest(LabelTable((Label("background", 0), Label("a", 1)))),
        intensity=Intensity("a.u.", 0, 255),
    )
    mask = write_mask(tmp_path / "m.nii.gz", (blobs() > 0).astype(np.uint8))
    with Synthesizer(manifest, FakeEngine(manifest)) as opened:
        list(opened.stream([mask], tmp_path / "set", format="nnunet"))
        assert json.loads((tmp_path / "set" / "dataset.json").read_text())["channel_names"] == {
            "0": "synthetic"
        }
        with pytest.raises(UsageError, match=r"synthesizes a\.u\., not HU"):
            opened.stream([mask], tmp_path / "series", format="dicom")
    assert not (tmp_path / "series").exists()
