"""nnU-Net data sets state which cases are synthetic, and keep a patient on one side of a fold."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs, image, results, synth, write_mask

FORMAT = ("--format", "nnunet")
INDICES = ("--labels", "mm-whs-indices")


def read_folds(folder: Path) -> list[dict[str, set[str]]]:
    folds = json.loads((folder / "splits_final.json").read_text())
    return [{side: set(cases) for side, cases in fold.items()} for fold in folds]


def read_table(folder: Path) -> dict[str, str]:
    with open(folder / "synthetic.csv", newline="") as handle:
        return {row["case"]: row["source"] for row in csv.DictReader(handle)}


def write_real_case(folder: Path, name: str) -> Path:
    """A real case of the data set with the labels of the fake model; the path of its label map."""
    labels = blobs(values=tuple(range(8))).astype(np.uint8)
    for kind, file, values in (
        ("imagesTr", f"{name}_0000.nii.gz", labels.astype(np.int16) * 100),
        ("labelsTr", f"{name}.nii.gz", labels),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image(values), str(folder / kind / file))
    return folder / "labelsTr" / f"{name}.nii.gz"


def test_variants_stay_with_their_patient(fake_model: Path, tmp_path: Path) -> None:
    """Folds of synthetic cases alone: all variants of a mask are on one side."""
    masks = [write_mask(tmp_path / f"p{n}.nii.gz") for n in range(7)]
    out = tmp_path / "Dataset001"
    assert synth(fake_model, out, *masks, *FORMAT, "--variants", "3") == 0
    assert read_table(out) == {f"p{n}_v{k}": f"p{n}" for n in range(7) for k in range(3)}
    folds = read_folds(out)
    assert len(folds) == 5
    validated: set[str] = set()
    for fold in folds:
        patients = {side: {case[:2] for case in cases} for side, cases in fold.items()}
        assert fold["val"] and not patients["train"] & patients["val"]
        assert fold["train"] | fold["val"] == {*read_table(out)}
        validated |= patients["val"]
    assert validated == {f"p{n}" for n in range(7)}


def test_folds_validate_on_real_cases(fake_model: Path, tmp_path: Path) -> None:
    """Where the folder holds real cases, no fold validates on a synthetic one."""
    out = tmp_path / "Dataset002"
    masks = [write_real_case(out, f"p{n}") for n in range(3)]
    assert synth(fake_model, out, *masks, *FORMAT, *INDICES, "--variants", "2") == 0
    assert {*read_table(out).values()} == {"p0", "p1", "p2"} and "p0" not in read_table(out)
    for fold in read_folds(out):
        assert len(fold["val"]) == 1 and fold["val"] <= {"p0", "p1", "p2"}
        (held_out,) = fold["val"]
        assert len(fold["train"]) == 6 and not any(c.startswith(held_out) for c in fold["train"])


def test_folds_of_the_user_are_kept(fake_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "Dataset003"
    masks = [write_real_case(out, f"p{n}") for n in range(3)]
    own = [{"train": ["p0"], "val": ["p1", "p2"]}]
    (out / "splits_final.json").write_text(json.dumps(own))
    assert synth(fake_model, out, *masks, *FORMAT, *INDICES, "--variants", "1") == 0
    assert read_folds(out) == [{"train": {"p0", "p0_v0"}, "val": {"p1", "p2"}}]


def test_resumed_set_has_the_same_bytes(fake_model: Path, tmp_path: Path) -> None:
    masks = [write_mask(tmp_path / f"p{n}.nii.gz") for n in range(6)]
    line = [*FORMAT, "--variants", "2", "--resume"]
    for part in (masks[3:], masks):
        assert synth(fake_model, tmp_path / "twice", *part, *line) == 0
    assert synth(fake_model, tmp_path / "once", *masks, *line) == 0
    twice, once = (results(tmp_path / name) for name in ("twice", "once"))
    for files in (twice, once):
        files.pop("dataset.json")  # it holds the folder's name
    assert twice == once and "splits_final.json" in once


@pytest.mark.parametrize(
    ("file", "text"), [("splits_final.json", "[1]"), ("synthetic.csv", "patient,age\n1,2\n")]
)
def test_foreign_files_are_refused(
    file: str, text: str, fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of that name that is something else stops the run before any work."""
    out = tmp_path / "Dataset004"
    out.mkdir()
    (out / file).write_text(text)
    assert synth(fake_model, out, write_mask(tmp_path / "a.nii.gz"), *FORMAT) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err
    assert (out / file).read_text() == text and not (out / "imagesTr").exists()
