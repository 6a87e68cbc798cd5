"""TotalSegmentator's results: one binary file a class is one mask; numbers of version 1 are told
from those of version 2 by embedded names.
"""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from samples import blobs, listed, results, synth, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import GeometryError, InputError, UnknownLabels
from runtime.core.labels import MM_WHS, LabelMap, load_map, names_of
from runtime.core.totalsegmentator import TOTAL_V1, TOTAL_V2
from runtime.core.volume import Segment
from runtime.io.case_finding import find_cases
from runtime.io.cases import Case, ReadOptions, read_case

CHAMBERS = [
    "heart_myocardium",
    "heart_atrium_left",
    "heart_ventricle_left",
    "heart_atrium_right",
    "heart_ventricle_right",
    "aorta",
    "pulmonary_artery",
]
VALUES = (205, 420, 500, 550, 600, 820, 850)
MASK = blobs()
EXPECTED = np.searchsorted([0, *VALUES], MASK)
HEART = "totalsegmentator-heartchambers"


def class_folder(folder: Path, names: list[str] = CHAMBERS, *, on: int = 1, **grid: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, VALUES, strict=False):
        write_mask(folder / f"{name}.nii.gz", ((value == MASK) * on).astype(np.uint8), **grid)
    return folder


def preset(name: str) -> LabelMap:
    return load_map(name, MM_WHS)


def only(path: Path, name: str | None = HEART, **options: object) -> Case:
    (found,) = find_cases([path], options=ReadOptions(**options), names=names_of(name, [MM_WHS]))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("on", [1, 255])
def test_class_folder_is_one_mask(on: int, tmp_path: Path) -> None:
    case = only(class_folder(tmp_path / "patient", on=on))
    assert (case.kind, case.name, len(case.files)) == ("classes", "patient", 7)
    read = read_case(case, MM_WHS, preset(HEART))
    assert np.array_equal(read.labels, EXPECTED)
    assert (
        read.geometry
        == read_case(find_cases([write_mask(tmp_path / "m.nii.gz", MASK)])[0], MM_WHS).geometry
    )


def test_class_folder_names_the_result(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = class_folder(tmp_path / "patient"), tmp_path / "out"
    assert (
        synth(fake_model, out, folder, "--labels", HEART, "--format", "nii", "--variants", "1") == 0
    )
    assert {"patient_v0_ct.nii", "patient_v0_mask.nii"} <= listed(out)
    assert np.array_equal(np.asarray(nibabel.load(out / "patient_v0_mask.nii").dataobj).T, MASK)
    assert (
        "patient: 7 binary files, one a class, are read as one mask, patient"
        in capsys.readouterr().err
    )
    assert run(main, ["labels", str(folder), "--labels", HEART]) == 0
    text = capsys.readouterr().out
    assert (
        f"{np.count_nonzero(MASK == 500)}" in text
        and "-3" not in text
        and "left ventricle            heart_ventricle_left" in text
    )


def test_class_file_name_enters_digest(tmp_path: Path, fake_model: Path) -> None:
    """The digest of the mask covers what each file is called."""
    folder, out = class_folder(tmp_path / "patient"), tmp_path / "out"
    arguments = (fake_model, out, folder, "--labels", HEART, "--format", "nii", "--resume")
    assert synth(*arguments) == 0
    before = results(out)
    left, right = folder / "heart_ventricle_left.nii.gz", folder / "heart_ventricle_right.nii.gz"
    left.rename(folder / "x"), right.rename(left), (folder / "x").rename(right)
    assert synth(*arguments) == 0
    assert results(out) != before


def test_map_and_model_classes_are_known(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(
        json.dumps({"LVC": "left ventricle", "la cavity": "left atrium", "1": "myocardium"})
    )
    folder = class_folder(tmp_path / "a", ["x", "la_cavity", "lvc"])
    (folder / "x.nii.gz").unlink()
    case = only(folder, str(tmp_path / "map.json"))
    assert np.array_equal(
        read_case(case, MM_WHS, load_map(tmp_path / "map.json", MM_WHS)).labels,
        np.where(np.isin(EXPECTED, (2, 3)), EXPECTED, 0),
    )
    own = only(
        class_folder(tmp_path / "b", [label.name.replace(" ", "_") for label in MM_WHS.labels[1:]]),
        None,
    )
    assert np.array_equal(read_case(own, MM_WHS).labels, EXPECTED)


def test_other_folders_are_separate_masks(tmp_path: Path) -> None:
    cases = find_cases(
        [class_folder(tmp_path / "patients", [f"p{n}" for n in range(7)])],
        names=names_of(HEART, [MM_WHS]),
    )
    assert {case.kind for case in cases} == {"volume"} and len(cases) == 7
    one = find_cases([class_folder(tmp_path / "one", ["aorta", "p1", "p2"])])
    assert [case.name for case in one] == ["aorta", "p1", "p2"]  # one name may be a patient's
    many = class_folder(tmp_path / "many", ["aorta", "liver"])
    for path in many.iterdir():
        write_mask(path, MASK)
    assert [case.kind for case in find_cases([many])] == ["volume", "volume"]  # not binary


def test_multilabel_file_among_classes_stays_separate(tmp_path: Path) -> None:
    """A file that is not binary is a mask of its own and not a class."""
    folder = class_folder(tmp_path / "patient")
    write_mask(folder / "whole.nii.gz", MASK)
    assert [(case.kind, case.name) for case in find_cases([folder])] == [
        ("classes", "patient"),
        ("volume", "whole"),
    ]


def test_unmapped_class_is_refused_by_name(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "patient")
    with pytest.raises(
        UnknownLabels, match="patient holds 'heart_atrium_left', 'heart_atrium_right',"
    ) as caught:
        read_case(only(folder), MM_WHS, preset("totalsegmentator"))
    assert f"--labels {HEART}" in caught.value.remedy
    (tmp_path / "map.json").write_text(
        json.dumps({"1": "myocardium", "2": 420, "3": 500, "aorta": "ascending aorta"})
    )
    with pytest.raises(
        UnknownLabels, match="heart_myocardium"
    ):  # the place of a file in the folder is no number
        read_case(only(folder), MM_WHS, load_map(tmp_path / "map.json", MM_WHS))


def test_an_empty_class_is_passed_over(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "patient")
    write_mask(folder / "tumour.nii.gz", np.zeros_like(MASK))
    assert np.array_equal(read_case(only(folder), MM_WHS, preset(HEART)).labels, EXPECTED)


def test_preset_knows_all_117_classes(tmp_path: Path) -> None:
    known = preset("totalsegmentator")
    assert len(TOTAL_V2) == 117 and len(TOTAL_V1) == 104
    assert {
        name for name in TOTAL_V2.values() if name.replace("_", " ").casefold() not in known
    } == set()
    assert known["aorta"] == 6 and known["liver"] == 0


def test_classes_on_two_grids_are_refused(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "patient")
    write_mask(folder / "aorta.nii.gz", (MASK == 820).astype(np.uint8), origin=(-12.5, 3.0, 41.0))
    with pytest.raises(GeometryError, match=r"lies on another grid than aorta\.nii\.gz"):
        read_case(only(folder), MM_WHS, preset(HEART))
    write_mask(folder / "aorta.nii.gz", (MASK[:5] == 820).astype(np.uint8))
    with pytest.raises(GeometryError, match="another grid"):
        read_case(only(folder), MM_WHS, preset(HEART))


def test_classes_that_overlap_need_an_order(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "patient")
    write_mask(folder / "aorta.nii.gz", np.isin(MASK, (820, 850)).astype(np.uint8))
    with pytest.raises(
        InputError, match="segments of patient overlap: 'aorta' and 'pulmonary_artery'"
    ):
        read_case(only(folder), MM_WHS, preset(HEART))
    read = read_case(only(folder, overlap_order=("pulmonary artery",)), MM_WHS, preset(HEART))
    assert np.array_equal(read.labels, EXPECTED)


def test_damaged_class_file_is_refused(tmp_path: Path) -> None:
    """A damaged class is refused and not left out of the mask."""
    folder = class_folder(tmp_path / "patient")
    damaged = folder / "aorta.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"aorta\.nii\.gz is truncated"):
        read_case(only(folder), MM_WHS, preset(HEART))


def test_zip_of_classes_is_one_mask(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "segmentations")
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"Doe John/{path.name}")
    case = only(tmp_path / "study.zip")
    assert (case.kind, case.name) == ("classes", "study")
    assert np.array_equal(read_case(case, MM_WHS, preset(HEART)).labels, EXPECTED)


def with_names(
    path: Path,
    values: NDArray[np.uint8],
    names: dict[int, str],
    *,
    cdata: bool = True,
    code: int = 0,
) -> Path:
    """A NIfTI with a label table in its extension, as TotalSegmentator writes it."""
    text = "".join(
        (
            f'<Label Key="{k}" Red="0.1" Alpha="1"><![CDATA[{n}]]></Label>'
            if cdata
            else f"<Label Red='0' Key='{k}'>{n}</Label>"
        )
        for k, n in names.items()
    )
    xml = (
        "<?xml version='1.0'?>\n<CaretExtension><VolumeInformation"
        f" Index='0'><LabelTable>{text}</LabelTable></VolumeInformation></CaretExtension>"
    )
    made = nibabel.Nifti1Image(values.T, np.diag([1.5, 1.5, 2, 1]))
    made.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, xml.encode()))
    nibabel.save(made, path)
    return path


V1 = np.array([0, 44, 45, 46, 47, 48, 7, 49], np.uint8)[EXPECTED]
V1_NAMES = {k: TOTAL_V1[k] for k in (7, 44, 45, 46, 47, 48, 49, 51)}


@pytest.mark.parametrize("name", ["m.nii.gz", "m.nii"])
@pytest.mark.parametrize("cdata", [True, False])
def test_preset_against_embedded_names_is_refused(
    name: str, cdata: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preset that does not fit the names in the file is refused."""
    path = with_names(tmp_path / name, V1, V1_NAMES, cdata=cdata)
    with pytest.raises(
        UnknownLabels,
        match=(
            r"calls its value 44 'heart_myocardium', the preset totalsegmentator calls it"
            r" 'vertebrae_C7'"
        ),
    ) as caught:
        read_case(only(path), MM_WHS, preset("totalsegmentator"))
    assert "--labels totalsegmentator-v1" in caught.value.remedy
    assert run(main, ["labels", str(path), "--labels", "totalsegmentator"]) == 1
    assert "calls its value 44 'heart_myocardium'" in capsys.readouterr().err
    assert np.array_equal(
        read_case(only(path), MM_WHS, preset("totalsegmentator-v1")).labels, EXPECTED
    )
    assert run(main, ["labels", str(path), "--labels", "totalsegmentator-v1"]) == 0


def test_embedded_names_are_segment_names(tmp_path: Path) -> None:
    names = {0: "???", 1: "Left_Atrium", 2: "myocardium &amp; more", 3: "right atrium"}
    path = with_names(
        tmp_path / "m.nii.gz", (MASK != 0).astype(np.uint8), {**names, 2: "myocardium"}
    )
    assert np.array_equal(read_case(only(path, None), MM_WHS).labels, np.where(MASK, 2, 0))
    from runtime.io.readers.nifti_names import embedded_names

    path = with_names(
        tmp_path / "n.nii.gz", np.ones((2, 3, 4), np.uint8), names, cdata=False, code=30
    )
    assert embedded_names(path) == tuple(
        Segment(k, n.replace("&amp;", "&"), strict=True) for k, n in names.items() if k
    )
    assert embedded_names(write_mask(tmp_path / "o.nii.gz")) == ()


def test_value_map_overrides_embedded_names(tmp_path: Path) -> None:
    path = with_names(tmp_path / "m.nii.gz", (MASK == 500).astype(np.uint8), {1: "my own word"})
    with pytest.raises(UnknownLabels, match="1 'my own word'"):
        read_case(only(path, None), MM_WHS)
    (tmp_path / "map.json").write_text('{"1": "left ventricle"}')
    assert np.array_equal(
        read_case(only(path, None), MM_WHS, load_map(tmp_path / "map.json", MM_WHS)).labels,
        np.where(MASK == 500, 3, 0),
    )


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<LabelTable>",
        b"\xff" * 99,
        b"<LabelTable><Label Key='1'></LabelTable>",
        b"<LabelTable></LabelTable>",
    ],
)
def test_nifti_extension_without_table_is_ignored(text: bytes, tmp_path: Path) -> None:
    path = write_mask(tmp_path / "m.nii", (MASK == 500).astype(np.int16) * 500)
    raw = path.read_bytes()
    size = (len(text) + 8 + 15) // 16 * 16
    head = bytearray(raw[:348])
    struct.pack_into("<f", head, 108, 352 + size)
    for length in (size, 7, 1 << 30):  # what the extension says of its own length is not trusted
        path.write_bytes(
            bytes(head)
            + b"\1\0\0\0"
            + (struct.pack("<2i", length, 0) + text).ljust(size, b"\0")
            + raw[352:]
        )
        assert np.array_equal(
            read_case(only(path, None), MM_WHS).labels, np.where(MASK == 500, 3, 0)
        )


def test_watched_class_folder_is_one_case(tmp_path: Path, fake_model: Path) -> None:
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    class_folder(inbox / "patient")
    line = [
        "watch",
        str(inbox),
        "--model",
        str(fake_model),
        "--output",
        str(out),
        "--backend",
        "fake",
        "--labels",
        HEART,
        "--once",
        "--stable",
        "0",
    ]
    assert run(main, line) == 0
    assert {name for name in listed(out) if not name.startswith(".")} == {"patient_ct.nii.gz"}
    assert (inbox / "done").is_dir() and len(list((inbox / "done").rglob("*.nii.gz"))) == 7


def test_list_names_and_counts_classes(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folder(tmp_path / "patient")
    assert synth(fake_model, tmp_path / "out", folder, "--list") == 0
    assert (
        "classes   patient" in (text := capsys.readouterr().out)
        and "(7 files)" in text
        and "contours" not in text
    )


@pytest.mark.parametrize("name", ["aorta", "heart_myocardium"])
def test_one_class_alone_contradicts_no_preset(
    name: str, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its 1 is what the file is called, not what the preset has at 1: an aorta would become
    myocardium.
    """
    path = write_mask(tmp_path / f"{name}.nii.gz", (MASK == 205).astype(np.uint8))
    code = synth(fake_model, tmp_path / "out", path, "--labels", HEART)
    error = capsys.readouterr().err
    if name == "aorta":
        assert (
            code == 2
            and "'heart_myocardium'" in error
            and "aorta.nii.gz" in error
            and not listed(tmp_path / "out")
        )
    else:
        assert code == 0 and listed(tmp_path / "out") >= {f"{name}_ct.nii.gz"}
