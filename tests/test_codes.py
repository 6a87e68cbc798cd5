"""Codes with modifiers: one spelling in DICOM, Slicer's files, maps and messages; sides are
never merged without a word.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dicom_masks import segmentation, slices
from pydicom import dcmread
from pydicom.dataset import Dataset
from samples import blobs
from test_labels import case, slicer

from runtime.core.errors import UnknownLabels
from runtime.core.label_codes import canonical, concept
from runtime.core.labels import MM_WHS, load_map, match, refuse_contradictions
from runtime.core.volume import Segment
from runtime.io.cases import read_case, read_mask

ATRIUM, VENTRICLE, LEFT, RIGHT = "59652004", "21814001", "7771000", "24028007"
SEGMENTS = [("Atrium", ATRIUM), ("Atrium", ATRIUM), ("Ventricle", VENTRICLE)]
VALUES = (blobs((5, 9, 13), (0, 1, 2, 3)) % 4).astype(np.uint8)


def coded(value: str, scheme: str = "SCT") -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, "x"
    return item


def sided(path: Path, *sides: tuple[str, str], region: bool = False) -> Path:
    """A SEG of left and right; `region`: the side is that of the anatomic region."""
    segmentation(path, slices(VALUES), VALUES, SEGMENTS)
    ds = dcmread(path)
    for item, side in zip(ds.SegmentSequence, sides, strict=False):
        kind = item.SegmentedPropertyTypeCodeSequence[0]
        if region:
            place = coded("80891009")
            place.AnatomicRegionModifierSequence = [coded(*side)]
            item.AnatomicRegionSequence = [place]
        else:
            kind.SegmentedPropertyTypeModifierCodeSequence = [coded(*side)]
    ds.save_as(path)
    return path


def label_map(path: Path, entries: dict[str, str]) -> Path:
    path.write_text(json.dumps(entries))
    return path


BOTH = [(LEFT, "SCT"), (RIGHT, "SCT"), (LEFT, "SCT")]


def test_laterality_is_part_of_code(tmp_path: Path) -> None:
    path = sided(tmp_path / "s.dcm", *BOTH)
    assert [s.code for s in read_mask(case(path)).segments] == [
        f"SCT:{ATRIUM}+SCT:{LEFT}",
        f"SCT:{ATRIUM}+SCT:{RIGHT}",
        f"SCT:{VENTRICLE}+SCT:{LEFT}",
    ]
    expected = np.array([0, 2, 4, 3], np.uint8)[VALUES]  # the model's own codes say both in one
    assert np.array_equal(read_case(case(path), MM_WHS).labels, expected)
    entries = {
        f"SCT:{ATRIUM}+SCT:{LEFT}": 550,
        f"sct:{RIGHT}": "myocardium",
        f"SCT:{ATRIUM} + SRT:G-A100": 420,
        f"SCT:{VENTRICLE}": 500,
    }
    swapped = load_map(label_map(tmp_path / "m.json", entries), MM_WHS)
    assert np.array_equal(
        read_case(case(path), MM_WHS, swapped).labels, np.array([0, 4, 2, 3], np.uint8)[VALUES]
    )


@pytest.mark.parametrize("region", [False, True])
def test_partial_code_merges_no_segments(region: bool, tmp_path: Path) -> None:
    path = sided(tmp_path / "s.dcm", *BOTH, region=region)
    known = load_map(
        label_map(tmp_path / "m.json", {f"SCT:{ATRIUM}": "myocardium", "*": "background"}), MM_WHS
    )
    with pytest.raises(
        UnknownLabels,
        match=rf"holds 1 .*\+SCT:{LEFT}.* and 2 .*\+SCT:{RIGHT}.*make both myocardium",
    ) as caught:
        read_case(case(path), MM_WHS, known)
    assert f"+SCT:{RIGHT}" in caught.value.remedy
    by_name = load_map(
        label_map(tmp_path / "m.json", {"atrium": "myocardium", "*": "background"}), MM_WHS
    )
    with pytest.raises(UnknownLabels, match="make both myocardium"):
        read_case(case(path), MM_WHS, by_name)
    dropped = load_map(
        label_map(tmp_path / "m.json", {f"SCT:{ATRIUM}": "background", "*": "left ventricle"}),
        MM_WHS,
    )
    assert np.array_equal(
        read_case(case(path), MM_WHS, dropped).labels, np.where(VALUES == 3, 3, 0)
    )


def test_partial_code_maps_exact_segment(tmp_path: Path) -> None:
    """A part of a code counts when a segment has this part as its code."""
    path = sided(tmp_path / "s.dcm", (LEFT, "SCT"))
    ds = dcmread(path)
    ds.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0].CodeValue = "74281007"
    ds.save_as(path)
    known = load_map(
        label_map(
            tmp_path / "m.json",
            {f"SCT:{ATRIUM}": "left atrium", f"SCT:{VENTRICLE}": 500, "SCT:74281007": 205},
        ),
        MM_WHS,
    )
    assert np.array_equal(
        read_case(case(path), MM_WHS, known).labels, np.array([0, 2, 1, 3], np.uint8)[VALUES]
    )
    right = Segment(1, "Atrium", f"SCT:{ATRIUM}+SCT:{RIGHT}")
    assert match(right, MM_WHS, known) is None  # no left atrium


def test_lateralised_code_may_repeat_side() -> None:
    assert match(Segment(9, "x", f"SCT:87878005+SCT:{LEFT}"), MM_WHS) == 3
    assert match(Segment(9, "x", "SCT:87878005+SCT:80891009"), MM_WHS) == 3  # in the heart
    assert match(Segment(9, "x", f"SCT:87878005+SCT:{RIGHT}"), MM_WHS) is None


@pytest.mark.parametrize("scheme", ["SRT", "SNM3", "99SDM"])
def test_older_laterality_codes_are_equal(scheme: str, tmp_path: Path) -> None:
    path = sided(tmp_path / "s.dcm", ("G-A101", scheme), ("G-A100", scheme), ("G-A101", scheme))
    assert np.array_equal(
        read_case(case(path), MM_WHS).labels, np.array([0, 2, 4, 3], np.uint8)[VALUES]
    )
    assert (
        concept(scheme, "T-32500") == "SCT:53085002"
        and canonical(f"{scheme}:G-A101") == "sct:7771000"
    )


def retagged(path: Path, tags: list[str]) -> Path:
    """Slicer's own key: the terminology is one tag among others."""
    lines = path.read_bytes().split(b"\n\n", 1)
    head = [line for line in lines[0].split(b"\n") if b"_TerminologyEntry" not in line]
    head += [f"Segment{n}_Tags:={tag}".encode() for n, tag in enumerate(tags)]
    path.write_bytes(b"\n".join(head) + b"\n\n" + lines[1])
    return path


def entry(kind: str, modifier: str = "^^", region: str = "^^", side: str = "^^") -> str:
    return (
        "TerminologyEntry:Segmentation category and type - 3D Slicer General Anatomy"
        f" list~SCT^123037004^Anatomical Structure~{kind}~{modifier}~Anatomic codes - DICOM master"
        f" list~{region}~{side}"
    )


def test_slicer_keeps_codes_among_its_tags(tmp_path: Path) -> None:
    values = VALUES.copy()
    path = slicer(
        tmp_path / "m.seg.nrrd", values[None], [("a", 1, 0, ""), ("b", 2, 0, ""), ("c", 3, 0, "")]
    )
    tags = [
        f"Segmentation.Status:inprogress|{entry(f'SCT^{ATRIUM}^Atrium', f'SCT^{LEFT}^Left')}|",
        (
            f"{entry('SRT^T-32100^Atrium', 'SRT^G-A100^Right')}|Segmentation.Status:completed|DicomRtImport.RoiNumber:2|"
        ),
        f"Note:see http://x|{entry('SCT^74281007^Myocardium')}",
    ]
    retagged(path, tags)
    assert [s.code for s in read_mask(case(path)).segments] == [
        f"SCT:{ATRIUM}+SCT:{LEFT}",
        f"SCT:{ATRIUM}+SCT:{RIGHT}",
        "SCT:74281007",
    ]
    assert np.array_equal(
        read_case(case(path), MM_WHS).labels, np.array([0, 2, 4, 1], np.uint8)[values]
    )


def test_slicer_region_and_side_enter_code(tmp_path: Path) -> None:
    """Slicer's region and the side of this region are part of the code."""
    path = slicer(tmp_path / "m.seg.nrrd", (VALUES % 3)[None], [("m", 1, 0, ""), ("m", 2, 0, "")])
    retagged(
        path,
        [
            entry("SCT^4147007^Mass", region="SCT^23451007^Adrenal gland", side=f"SCT^{side}^x")
            + "|"
            for side in (LEFT, RIGHT)
        ],
    )
    assert [s.code for s in read_mask(case(path)).segments] == [
        f"SCT:4147007+SCT:23451007+SCT:{RIGHT}",
        f"SCT:4147007+SCT:23451007+SCT:{LEFT}",
    ][::-1]
    known = load_map(label_map(tmp_path / "m.json", {"SCT:4147007": "myocardium"}), MM_WHS)
    with pytest.raises(UnknownLabels, match="make both myocardium"):
        read_case(case(path), MM_WHS, known)


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "|",
        "TerminologyEntry:|",
        "TerminologyEntry:Segmentation category and type - 3D Slicer General Anatomy |",
        "x",
    ],
)
def test_slicer_tags_without_code_skipped(tag: str, tmp_path: Path) -> None:
    path = slicer(
        tmp_path / "m.seg.nrrd",
        (VALUES == 1).astype(np.uint8)[None],
        [("left ventricle", 1, 0, "")],
    )
    assert read_mask(case(retagged(path, [tag]))).segments == (Segment(1, "left ventricle"),)


def test_old_slicer_segments_without_value(tmp_path: Path) -> None:
    """Old segments have a name and no value.

    As Slicer wrote them before 4.11: one segment as 1, several as layers.
    """
    for count in (1, 2):
        layers = np.stack([(n + 1 == VALUES).astype(np.uint8) for n in range(count)])
        path = slicer(
            tmp_path / f"{count}.seg.nrrd",
            layers,
            [("left ventricle", 1, 0, ""), ("left atrium", 1, 1, "")][:count],
        )
        lines = path.read_bytes().split(b"\n\n", 1)
        head = [
            line
            for line in lines[0].split(b"\n")
            if b"_LabelValue" not in line and b"_Layer" not in line
        ]
        head += [f"Segment{n}_ID:=Segment_{n + 1}".encode() for n in range(count - 1)]
        path.write_bytes(b"\n".join(head) + b"\n\n" + lines[1])
        expected = np.array([0, 3, 2 if count == 2 else 0, 0], np.uint8)[VALUES]
        assert np.array_equal(read_case(case(path), MM_WHS).labels, expected)


def test_private_codes_stay_out_of_remedies() -> None:
    held = [Segment(n, "", f"SCT:{ATRIUM}+99DOE:J{n}", private=True) for n in (1, 2)]
    with pytest.raises(UnknownLabels) as caught:
        refuse_contradictions(held, MM_WHS, {f"sct:{ATRIUM}": 1})
    assert (
        "DOE" not in str(caught.value).upper() and "labels FILE shows of 2" in caught.value.remedy
    )
