"""What files call a structure → the model's labels: presets, maps by value, code and name;
Slicer's files; unstated orientation.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs, image, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import InputError, UnknownLabels, UnreadableVolume
from runtime.core.label_presets import AMOS, PRESETS
from runtime.core.labels import MM_WHS, load_map, lost, match, to_indices
from runtime.core.volume import Segment
from runtime.io.case_finding import find_cases
from runtime.io.cases import Case, ReadOptions, read_case


def case(path: Path, **options: object) -> Case:
    (found,) = find_cases([path], options=ReadOptions(**options))  # type: ignore[arg-type]
    return found


def test_presets_map_labels_by_code() -> None:
    """Presets map labels by their codes and say which structures the model lacks."""
    chambers = load_map("totalsegmentator-heartchambers", MM_WHS)
    assert [chambers[v] for v in range(8)] == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # the aorta stands for its ascending part
    assert lost("totalsegmentator-heartchambers", MM_WHS) == []
    total = load_map("totalsegmentator", MM_WHS)
    assert {v: i for v, i in total.items() if i and isinstance(v, int)} == {52: 6}
    assert "51 heart" in lost("totalsegmentator", MM_WHS) and "52 aorta" not in lost(
        "totalsegmentator", MM_WHS
    )
    values = np.array([[[0, 5, 51, 52, 117]]], np.uint8)
    assert to_indices(values, MM_WHS, total).tolist() == [[[0, 0, 0, 6, 0]]]
    with pytest.raises(UnknownLabels, match="holds 118"):
        to_indices(values + (values == 117), MM_WHS, total)
    amos = load_map("amos", MM_WHS)
    assert amos[8] == 6 and amos[6] == 0
    assert [load_map("amos", AMOS)[v] for v in range(16)] == [*range(16)]
    assert all(
        load_map(name, table)[x.value] == n
        for name, table in PRESETS.items()
        for n, x in enumerate(table.labels)
    )


def test_label_map_value_code_name(tmp_path: Path) -> None:
    """A label map may name a structure by its value, its code or its name."""
    path = tmp_path / "map.json"
    path.write_text(
        json.dumps(
            {
                "3": "myocardium",
                "SCT:80891009": "left ventricle",
                "Left Auricle": 420,
                "*": "background",
            }
        )
    )
    known = load_map(path, MM_WHS)
    for segment, index in [
        (Segment(3), 1),
        (Segment(9, "x", "SCT:80891009"), 3),
        (Segment(3, "x", "sct:80891009"), 3),
        (Segment(9, "left_auricle"), 2),
        (Segment(3, "left auricle", "SCT:1"), 2),
        (Segment(4, "left auricles"), 0),
    ]:
        assert match(segment, MM_WHS, known) == index, segment
    assert (
        match(Segment(500, "liver"), MM_WHS) is None
        and match(Segment(500, "Segment_500"), MM_WHS) == 3
        and match(Segment(500), MM_WHS) == 3
    )


def slicer(path: Path, layers: np.ndarray, segments: list[tuple[str, int, int, str]]) -> Path:
    """A .seg.nrrd as Slicer writes it.

    `layers` (L, D, H, W); segments: name, label value, layer, SNOMED code.
    """
    data = layers[0] if len(layers) == 1 else np.moveaxis(layers, 0, -1)
    sizes = " ".join(str(n) for n in reversed(layers.shape[1:]))
    head = ["NRRD0004", "type: unsigned char", "space: left-posterior-superior", "encoding: raw"]
    grid = "(1.5,0,0) (0,1.25,0) (0,0,2.5)"
    head += (
        [
            "dimension: 3",
            f"sizes: {sizes}",
            f"space directions: {grid}",
            "kinds: domain domain domain",
        ]
        if len(layers) == 1
        else [
            "dimension: 4",
            f"sizes: {len(layers)} {sizes}",
            f"space directions: none {grid}",
            "kinds: list domain domain domain",
        ]
    )
    head += ["space origin: (-12.5,3,40)"]
    for n, (name, value, layer, code) in enumerate(segments):
        entry = (
            "Segmentation category and type~SCT^123037004^Anatomical"
            f" Structure~SCT^{code}^x~^^~Anatomic codes~^^~^^"
        )
        head += [
            f"Segment{n}_LabelValue:={value}",
            f"Segment{n}_Layer:={layer}",
            f"Segment{n}_Name:={name}",
            f"Segment{n}_TerminologyEntry:={entry}",
        ]
    path.write_bytes(
        "\n".join(head).encode() + b"\n\n" + np.ascontiguousarray(data, np.uint8).tobytes()
    )
    return path


def test_slicer_seg_maps_code_and_name(tmp_path: Path) -> None:
    values = (blobs((4, 10, 12), (0, 1, 2)) % 3).astype(np.uint8)
    path = slicer(
        tmp_path / "m.seg.nrrd",
        values[None],
        [("Segment_1", 1, 0, "87878005"), ("left atrium", 2, 0, "85756007")],
    )
    read = read_case(case(path), MM_WHS)
    assert np.array_equal(
        read.labels, np.array([0, 3, 2], np.uint8)[values]
    ) and read.geometry.origin == (-12.5, 3, 40)
    with pytest.raises(UnknownLabels, match=r"1 'liver' \(SCT:10200004\)"):
        read_case(
            case(
                slicer(
                    path,
                    values[None],
                    [("liver", 1, 0, "10200004"), ("left atrium", 2, 0, "85756007")],
                )
            ),
            MM_WHS,
        )


def test_overlapping_slicer_layers_need_order(tmp_path: Path) -> None:
    """Layers of a Slicer segmentation may overlap only where an order is stated."""
    layers = np.zeros((2, 4, 10, 12), np.uint8)
    layers[0, 1, 2:6, 2:6], layers[1, 1, 4:8, 4:8], layers[1, 3, 0, 0] = 1, 1, 2
    segments = [
        ("left ventricle", 1, 0, "85756007"),
        ("left atrium", 1, 1, "85756007"),
        ("myocardium", 2, 1, "85756007"),
    ]
    path = slicer(tmp_path / "m.seg.nrrd", layers, segments)
    with pytest.raises(InputError, match=r"'left ventricle' .* and 2 'left atrium' .* in 4 voxels"):
        read_case(case(path), MM_WHS)
    first, second = (
        read_case(case(path, overlap_order=(name,)), MM_WHS).labels
        for name in ("left ventricle", "left atrium")
    )
    assert (
        (first[1, 4:6, 4:6] == 3).all()
        and (second[1, 4:6, 4:6] == 2).all()
        and first[3, 0, 0] == second[3, 0, 0] == 1
    )
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnreadableVolume, match="truncated"):
        read_case(case(path), MM_WHS)


def test_volume_without_orientation_warns(tmp_path: Path) -> None:
    (tmp_path / "m.nrrd").write_bytes(
        b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nspacings: 1 1 2\nencoding: raw\n\n"
        + bytes(8)
    )
    (tmp_path / "m.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementSpacing ="
        b" 1 1 2\nElementDataFile = LOCAL\n" + bytes(8)
    )
    for name in ("m.nrrd", "m.mha"):
        assert "states no orientation" in read_case(case(tmp_path / name), MM_WHS).notes[0]
    for name in ("a.nrrd", "a.mha", "a.nii.gz"):
        assert read_case(case(write_mask(tmp_path / name)), MM_WHS).notes == ()


def test_labels_command_prints_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints what a segmentation holds and how it maps."""
    layers = np.zeros((1, 4, 10, 10), np.uint8)
    layers[0, 1, :5, :4], layers[0, 2, 0, 0] = 1, 7
    path = slicer(
        tmp_path / "m.seg.nrrd", layers, [("LV", 1, 0, "87878005"), ("my heart", 7, 0, "80891009")]
    )
    assert run(main, ["labels", str(path)]) == 1
    text = capsys.readouterr().out
    assert "      1          20        0.1  left ventricle            LV SCT:87878005" in text
    assert (
        "      7           1        0.0  UNKNOWN                   my heart SCT:80891009" in text
        and "1 unknown" in text
    )
    (tmp_path / "map.json").write_text('{"LV": "left ventricle", "My_Heart": "myocardium"}')
    assert run(main, ["labels", str(path), "--labels", str(tmp_path / "map.json")]) == 0
    assert "myocardium" in capsys.readouterr().out
    assert (
        run(main, ["labels", str(path), "--labels", "amos"]) == 0
    )  # one says so: the values are those of AMOS
    assert "1 spleen" in capsys.readouterr().err  # what the preset loses is said


def test_integer_labels_any_byte_order(tmp_path: Path) -> None:
    """Integers of any width and byte order are labels."""
    values = blobs((3, 6, 8))
    for dtype in (np.uint16, np.int16, np.int32, np.uint32, np.int64, np.float32, np.float64):
        sitk.WriteImage(image(values.astype(dtype)), str(tmp_path / "m.mha"))
        assert np.array_equal(
            read_case(case(tmp_path / "m.mha"), MM_WHS).labels, to_indices(values, MM_WHS)
        )
    import nibabel

    big = nibabel.Nifti1Image(
        values.T.astype(">i4"), np.eye(4), nibabel.Nifti1Header(endianness=">")
    )
    nibabel.save(big, tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == b"\x00\x00\x01\x5c"
    assert np.array_equal(
        read_case(case(tmp_path / "big.nii"), MM_WHS).labels, to_indices(values, MM_WHS)
    )


def test_voxel_values_become_class_indices() -> None:
    """Each voxel gets the index of its own value.

    Single voxels, runs across lines and slices, values of any sign and size, arrays of any layout.
    """
    rng = np.random.default_rng(3)
    label_map = {-(1 << 40): 1, -3: 2, 0: 0, 7: 3, 65536: 4, 1 << 50: 5}
    known = np.array([*label_map])
    values = np.where(
        rng.random((5, 9, 11)) < 0.5, known[rng.integers(0, len(known), (5, 9, 11))], 7
    )
    values[1:3] = -3
    for given in (values, values.T, values[::-1, ::2, ::-1]):
        assert (
            to_indices(given, MM_WHS, label_map).tolist()
            == np.vectorize(label_map.get)(given).tolist()
        )
    values[-1, -1, -1] = 12
    with pytest.raises(
        UnknownLabels,
        match=r"holds 12, .*all its values: -1099511627776, -3, 0, 7, 12, 65536, 1125899906842624",
    ):
        to_indices(values, MM_WHS, label_map)
    assert to_indices(np.empty((2, 0, 3), np.int16), MM_WHS).shape == (2, 0, 3)
