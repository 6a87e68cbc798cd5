"""DICOM SEG in: every type, missing frames, overlaps, codes; where the voxels lie, by
highdicom's own reading of the same file.
"""

from __future__ import annotations

import shutil
import zlib
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from dicom_masks import segmentation, slices
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import UID
from samples import blobs, directions, rotation

from runtime.__main__ import main
from runtime.core.errors import (
    GeometryError,
    InputError,
    MissingDecoder,
    UnknownLabels,
    UnreadableVolume,
)
from runtime.core.labels import MM_WHS, MM_WHS_INDICES, describe, load_map
from runtime.core.volume import Layers, Segment
from runtime.io.case_finding import find_cases
from runtime.io.cases import Case, ReadOptions, read_case, read_mask

HEART = [("left ventricle", "87878005"), ("left atrium", "82471001"), ("myocardium", "74281007")]
SHAPE = (5, 9, 13)  # 117 pixels: frames do not end on a byte


def case(path: Path, **options: object) -> Case:
    (found,) = find_cases([path], options=ReadOptions(**options))  # type: ignore[arg-type]
    return found


def numbers(shape: tuple[int, int, int] = SHAPE, count: int = 3) -> np.ndarray:
    return (blobs(shape, tuple(range(count + 1))) % (count + 1)).astype(np.uint8)


def by_highdicom(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Segment numbers and affine (voxel (k, row, column) → LPS mm)."""
    import highdicom as hd

    volume = hd.seg.segread(path).get_volume(combine_segments=True)
    return volume.array, volume.affine


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("tilt", [(0.0, 0.0, 0.0), (11.0, -7.0, 16.0)], ids=["straight", "oblique"])
def test_seg_axis_orders_agree_with_highdicom(
    kind: str, tilt: tuple[float, float, float], tmp_path: Path
) -> None:
    for n, direction in enumerate(
        directions()[:: 1 if kind == "BINARY" and tilt == (0.0, 0.0, 0.0) else 7]
    ):
        values = numbers()
        path = segmentation(
            tmp_path / f"{n}.dcm",
            slices(values, direction=rotation(tilt) @ direction),
            values,
            HEART,
            kind,
        )
        read = read_case(case(path), MM_WHS)
        theirs, affine = by_highdicom(path)
        ours = np.array([0, 3, 2, 1], np.uint8)  # segment → index in MM-WHS
        for k, row, column in [(0, 0, 0), (0, 0, 12), (0, 8, 0), (4, 0, 0), (4, 8, 12), (2, 4, 6)]:
            mm = affine @ [k, row, column, 1]
            i, j, slice_ = np.rint((np.linalg.inv(read.geometry.affine) @ mm)[:3]).astype(int)
            assert np.abs(read.geometry.affine @ [i, j, slice_, 1] - mm).max() < 1e-3
            assert read.labels[slice_, j, i] == ours[theirs[k, row, column]]
        assert sorted(np.bincount(read.labels.ravel())) == sorted(np.bincount(values.ravel()))


def test_seg_code_before_name_before_number(tmp_path: Path) -> None:
    """The segment's code counts before its name, and the name before its number."""
    values = numbers(count=4)
    named = [
        ("liver of all things", "87878005"),
        ("Left_Atrium", "85756007"),
        ("Segment_3", "85756007"),
        ("right ventricle", "53085002"),
    ]
    path = segmentation(tmp_path / "s.dcm", slices(values), values, named)
    read = read_case(case(path), MM_WHS_INDICES)
    assert [int(read.labels[values == n][0]) for n in range(5)] == [
        0,
        3,
        2,
        3,
        5,
    ]  # by code, by name, by number 3, by code
    unknown = segmentation(
        tmp_path / "u.dcm", slices(values), (values == 1).astype(np.uint8), [("liver", "10200004")]
    )
    with pytest.raises(
        UnknownLabels, match=r"holds 1 \(SCT:10200004\), which the model does not know"
    ):  # though it is number 1
        read_case(case(unknown), MM_WHS_INDICES)
    (tmp_path / "map.json").write_text('{"SCT:10200004": "left ventricle", "*": "background"}')
    assert (
        read_case(case(unknown), MM_WHS, load_map(tmp_path / "map.json", MM_WHS)).labels[
            values == 1
        ]
        == 3
    ).all()


def test_seg_missing_frames_are_empty_slices(
    tmp_path: Path,
) -> None:
    """Missing frames are empty slices, and the order of the frames does not matter."""
    values = np.zeros((9, 8, 8), np.uint8)
    values[1, 2, 3], values[4, 5, 6], values[6, 1, 1] = 1, 1, 2
    path = segmentation(
        tmp_path / "s.dcm", slices(values), values, HEART[:2], omit_empty_frames=True
    )
    ds = dcmread(path)
    assert ds.NumberOfFrames == 3
    read = read_case(case(path), MM_WHS)
    assert read.labels.shape == (6, 8, 8)  # slices 1 to 6: an empty end is not in the file
    assert [tuple(p) for p in np.argwhere(read.labels)] == [(0, 2, 3), (3, 5, 6), (5, 1, 1)]
    assert np.allclose(read.geometry.origin, (-12.5, 3.0, 42.5)) and np.allclose(
        read.geometry.spacing, (1.5, 1.25, 2.5)
    )


def test_seg_overlaps_need_an_order(tmp_path: Path) -> None:
    """Overlaps are an error that lists them, unless an order is given."""
    masks = np.zeros((4, 8, 8, 3), np.uint8)
    masks[1:3, 1:5, 1:5, 0], masks[1:3, 3:7, 3:7, 1] = 1, 1
    masks[0, 0, 0, 2] = 1
    path = segmentation(tmp_path / "s.dcm", slices(masks[..., 0]), masks, HEART)
    with pytest.raises(
        InputError, match=r"1 \(SCT:87878005\) and 2 \(SCT:82471001\) in 8 voxels"
    ) as caught:
        read_case(case(path), MM_WHS)
    assert "--overlap-order" in caught.value.remedy
    for order, winner in [
        (("left atrium", "left ventricle"), 2),
        (("SCT:87878005",), 3),
        (("2",), 2),
    ]:
        assert (
            read_case(case(path, overlap_order=order), MM_WHS).labels[1:3, 3:5, 3:5] == winner
        ).all()
    both = read_case(
        case(path, overlap_order=("1", "3", "2")), MM_WHS, {1: 3, 2: 2, 3: 3}
    )  # two of one label, one of them behind
    assert (both.labels[1:3, 3:5, 3:5] == 3).all()
    same = {1: 3, 2: 3, 3: 0}  # two segments of one label do not contend
    assert np.count_nonzero(read_case(case(path), MM_WHS, same).labels) == np.count_nonzero(
        masks[..., :2].any(-1)
    )


def test_seg_fractions_need_a_threshold(tmp_path: Path) -> None:
    fractions = np.zeros((3, 8, 8), float)
    fractions[1, 2:6, 2:6], fractions[1, 3:5, 3:5] = 0.4, 0.8
    path = segmentation(
        tmp_path / "s.dcm",
        slices(fractions.astype(np.uint8)),
        fractions,
        HEART[:1],
        "FRACTIONAL",
        fractional_type="PROBABILITY",
    )
    with pytest.raises(InputError, match="holds fractions, not labels") as caught:
        read_case(case(path), MM_WHS)
    assert "--threshold" in caught.value.remedy
    assert [
        np.count_nonzero(read_case(case(path, threshold=t), MM_WHS).labels) for t in (0.3, 0.5, 0.9)
    ] == [16, 4, 0]


def test_seg_compressed_label_maps_keep_labels(tmp_path: Path) -> None:
    from pydicom.uid import RLELossless

    values = numbers((4, 16, 16))
    plain, packed = (
        segmentation(tmp_path / f"{n}.dcm", slices(values), values, HEART, "LABELMAP", **options)
        for n, options in enumerate(({}, {"transfer_syntax_uid": RLELossless}))
    )
    assert dcmread(packed).file_meta.TransferSyntaxUID == RLELossless
    assert np.array_equal(
        read_case(case(plain), MM_WHS).labels, read_case(case(packed), MM_WHS).labels
    )


def test_seg_names_omit_patient_data(tmp_path: Path) -> None:
    """The source's patient data waits in the record for the attached mode."""
    values = numbers()
    sources = slices(values)
    path = segmentation(tmp_path / "Doe_John.dcm", sources, values, HEART)
    found = case(path)
    assert (
        found.name.startswith("seg-")
        and "Doe" not in found.name
        and str(found.display_name) == found.name
    )
    read = read_case(found, MM_WHS)
    assert read.dicom is not None and read.dicom.attributes["PatientID"] == "PLANTED-ID-4711"
    assert read.dicom.frame_of_reference_uid == sources[0].FrameOfReferenceUID
    assert (
        read.dicom.sop_instance_uids == (dcmread(path).SOPInstanceUID,)
        and read.dicom.sop_class_uid == dcmread(path).SOPClassUID
    )


def spoilt(path: Path, change) -> Path:
    ds = dcmread(path)
    change(ds)
    ds.save_as(path)
    return path


def positions(ds, *shifts: tuple[float, float, float]) -> None:
    for frame, shift in zip(ds.PerFrameFunctionalGroupsSequence, shifts, strict=False):
        item = frame.PlanePositionSequence[0]
        item.ImagePositionPatient = [
            float(a) + b for a, b in zip(item.ImagePositionPatient, shift, strict=True)
        ]


def claim_frames(ds) -> None:
    ds.NumberOfFrames = 4000


def mixed(ds) -> None:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]
    ds.PerFrameFunctionalGroupsSequence[1].PlaneOrientationSequence = [item]


BAD = {
    "tilted": (
        lambda ds: positions(ds, (0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)),
        GeometryError,
        "is sheared",
    ),
    "uneven": (lambda ds: positions(ds, (0, 0, 0), (0, 0, 0.6)), GeometryError, "mm apart"),
    "two in one place": (
        lambda ds: positions(ds, (0, 0, 0), (0, 0, -2.5)),
        GeometryError,
        "two frames of one segment",
    ),
    "mixed": (mixed, GeometryError, "mixed orientations"),
    "frames": (claim_frames, UnreadableVolume, "claims 4000 frames"),
    "truncated": (
        lambda ds: setattr(ds, "PixelData", ds.PixelData[:10]),
        UnreadableVolume,
        "truncated",
    ),
    "no position": (
        lambda ds: [
            delattr(f, "PlanePositionSequence") for f in ds.PerFrameFunctionalGroupsSequence
        ],
        GeometryError,
        "PlanePositionSequence",
    ),
    "not a number": (
        lambda ds: positions(ds, (float("nan"), 0, 0)),
        GeometryError,
        "ImagePositionPatient",
    ),
    "surface": (
        lambda ds: setattr(ds, "SegmentationType", "MESH"),
        UnreadableVolume,
        "segmentation of another type",
    ),
    "undescribed segment": (
        lambda ds: setattr(
            ds.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0],
            "ReferencedSegmentNumber",
            9,
        ),
        UnreadableVolume,
        "which it does not describe",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_seg_is_refused_with_reason(kind: str, tmp_path: Path) -> None:
    change, error, fact = BAD[kind]
    values = np.zeros((4, 8, 8), np.uint8)
    values[:, 2:4, 2:4], values[3, 6, 6] = 1, 2
    found = case(
        spoilt(segmentation(tmp_path / "s.dcm", slices(values), values, HEART[:2]), change)
    )
    with pytest.raises(error, match=fact) as caught:
        read_case(found, MM_WHS)
    assert caught.value.remedy and str(caught.value.file) == found.name


def test_real_segs_agree_with_highdicom(real_data: Path) -> None:
    for name in (
        "seg_and_ct/liver.dcm",
        "seg_and_ct/23x38x3/seg/label.seg",
        "seg_and_ct/24x38x3/seg/label.seg",
    ):
        mask = read_mask(case(real_data / name))
        assert (
            isinstance(mask, Layers) and mask.segments[0].code == "SCT:10200004"
        )  # SNOMED-RT's T-62000
        theirs, affine = by_highdicom(real_data / name)
        total = 0
        for _, k, piece in mask.pieces():
            total += np.count_nonzero(piece)
            if not piece.any():
                continue
            row, column = np.argwhere(piece)[0]
            at = np.rint(np.linalg.inv(affine) @ mask.geometry.affine @ [column, row, k, 1]).astype(
                int
            )
            assert theirs[tuple(at[:3])]
        assert total == np.count_nonzero(theirs)


def plain_seg(
    path: Path, kind: str = "BINARY", shape: tuple[int, int, int] = SHAPE
) -> tuple[Path, np.ndarray]:
    values = numbers(shape)
    return segmentation(path, slices(values), values, HEART, kind), values


def deflated(frame: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(frame) + packer.flush()


def rle(*segments: bytes) -> bytes:
    """Literal runs, and the header (PS3.5, G.5)."""
    runs = [
        b"".join(bytes([len(s[i : i + 128]) - 1]) + s[i : i + 128] for i in range(0, len(s), 128))
        for s in segments
    ]
    runs = [run + b"\x80" * (len(run) % 2) for run in runs]
    offsets = np.cumsum([64, *map(len, runs)])[:-1]
    return np.array([len(runs), *offsets, *[0] * (15 - len(runs))], "<u4").tobytes() + b"".join(
        runs
    )


def j2k(frame: np.ndarray) -> bytes:
    """A codestream of the frame as 8 bits: pydicom's encoder needs a package more, Pillow is
    there.
    """
    stream = BytesIO()
    Image.fromarray(frame.astype(np.uint8)).save(
        stream, "JPEG2000", irreversible=False, no_jp2=True
    )
    return stream.getvalue()


def encapsulated(path: Path, syntax: str, frames: list[bytes]) -> Path:
    """The SEG with its frames in fragments; pydicom writes no syntax that it does not know, so
    that the UID is put in afterwards.
    """
    known = "1.2.840.10008.1.2.4.90"
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = UID(known)
    ds.PixelData = encapsulate([f + b"\0" * (len(f) % 2) for f in frames])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path)
    path.write_bytes(
        path.read_bytes().replace(known.encode(), syntax.encode().ljust(len(known), b"\0"), 1)
    )
    return path


def frames_of(path: Path) -> np.ndarray:
    """Every frame (N, rows, columns), bits as they follow each other (PS3.5, 8.1.1)."""
    ds = dcmread(path)
    shape = (int(ds.NumberOfFrames), ds.Rows, ds.Columns)
    if ds.BitsAllocated == 1:
        return np.unpackbits(
            np.frombuffer(ds.PixelData, np.uint8), bitorder="little", count=int(np.prod(shape))
        ).reshape(shape)
    return np.frombuffer(ds.PixelData, f"<u{ds.BitsAllocated // 8}", int(np.prod(shape))).reshape(
        shape
    )


def packed(frame: np.ndarray) -> bytes:
    return (
        np.packbits(frame, bitorder="little").tobytes()
        if frame.max(initial=0) < 2
        else frame.tobytes()
    )


ENCODINGS = {
    "uncompressed": ("1.2.840.10008.1.2.1.98", packed),
    "deflated": ("1.2.840.10008.1.2.8.1", lambda f: deflated(packed(f))),
    "RLE of packed bits": ("1.2.840.10008.1.2.5", lambda f: rle(packed(f))),
    "RLE of a byte a bit": ("1.2.840.10008.1.2.5", lambda f: rle(f.astype(np.uint8).tobytes())),
    "JPEG 2000": ("1.2.840.10008.1.2.4.90", j2k),
}


@pytest.mark.parametrize("shape", [SHAPE, (4, 16, 24)], ids=["odd bits", "whole bytes"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_seg_compressed_bits_equal_plain(
    encoding: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    syntax, encode = ENCODINGS[encoding]
    path, values = plain_seg(tmp_path / "s.dcm", shape=shape)
    expected = read_case(case(path), MM_WHS).labels
    assert sorted(np.bincount(expected.ravel())) == sorted(np.bincount(values.ravel()))
    encapsulated(path, syntax, [encode(frame) for frame in frames_of(path)])
    assert np.array_equal(read_case(case(path), MM_WHS).labels, expected)


@pytest.mark.parametrize(
    "encoding", ["uncompressed", "deflated", "RLE of a byte a bit", "JPEG 2000"]
)
def test_seg_compressed_label_maps_equal_plain(encoding: str, tmp_path: Path) -> None:
    syntax, encode = ENCODINGS[encoding]
    path, _ = plain_seg(tmp_path / "s.dcm", "LABELMAP")
    expected = read_case(case(path), MM_WHS).labels
    plain = {"uncompressed": np.ndarray.tobytes, "deflated": lambda f: deflated(f.tobytes())}
    encapsulated(path, syntax, [plain.get(encoding, encode)(frame) for frame in frames_of(path)])
    assert np.array_equal(read_case(case(path), MM_WHS).labels, expected)


def test_seg_rle_keeps_wide_labels(tmp_path: Path) -> None:
    path, _ = plain_seg(tmp_path / "s.dcm", "LABELMAP")
    wide = np.array([0, 1, 256, 515], np.uint16)[frames_of(path)]
    ds = dcmread(path)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelData = 16, 16, 15, wide.tobytes()
    for segment in ds.SegmentSequence:
        segment.SegmentNumber = int([0, 1, 256, 515][segment.SegmentNumber])
    ds.save_as(path)
    expected = read_case(case(path), MM_WHS).labels
    encapsulated(
        path,
        "1.2.840.10008.1.2.5",
        [rle((f >> 8).astype(np.uint8).tobytes(), f.astype(np.uint8).tobytes()) for f in wide],
    )
    assert np.array_equal(read_case(case(path), MM_WHS).labels, expected) and expected.max() == 3


SPOILT = {
    "a frame too few": lambda frames: [packed(f) for f in frames[:-1]],
    "a frame too many": lambda frames: [packed(f) for f in (*frames, frames[0])],
    "a frame cut": lambda frames: [packed(f)[:-2] for f in frames],
    "a byte a bit": lambda frames: [f.tobytes() for f in frames],
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("encoding", ["uncompressed", "deflated", "RLE of packed bits"])
def test_seg_frames_of_other_size_refused(kind: str, encoding: str, tmp_path: Path) -> None:
    if (kind, encoding) == ("a byte a bit", "RLE of packed bits"):
        pytest.skip("it is read")
    path, _ = plain_seg(tmp_path / "s.dcm")
    wrap = {"uncompressed": bytes, "deflated": deflated, "RLE of packed bits": rle}[encoding]
    encapsulated(path, ENCODINGS[encoding][0], [wrap(f) for f in SPOILT[kind](frames_of(path))])
    with pytest.raises(UnreadableVolume):
        read_case(case(path), MM_WHS)


def test_seg_codestream_of_other_size_refused(tmp_path: Path) -> None:
    path, _ = plain_seg(tmp_path / "s.dcm", shape=(4, 16, 24))
    for frames in (frames_of(path).reshape(-1, 24, 16), frames_of(path) * 255):
        bad = tmp_path / "bad.dcm"
        shutil.copy(path, bad)
        with pytest.raises(UnreadableVolume, match=r"size that its header states|hold 255"):
            read_case(
                case(encapsulated(bad, "1.2.840.10008.1.2.4.90", [j2k(frame) for frame in frames])),
                MM_WHS,
            )


def test_seg_missing_decoder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("gdcm") or find_spec("libjpeg"):
        pytest.skip("a decoder of JPEG Lossless is installed")
    path, _ = plain_seg(tmp_path / "s.dcm")
    encapsulated(path, "1.2.840.10008.1.2.4.57", [j2k(frame) for frame in frames_of(path)])
    with pytest.raises(MissingDecoder) as caught:
        read_case(case(path), MM_WHS)
    assert isinstance(caught.value, InputError) and "pip install python-gdcm" in caught.value.remedy
    assert main(["labels", str(path)]) == 3 and "no decoder is installed" in capsys.readouterr().err


def test_seg_binary_valued_fractions_are_read(tmp_path: Path) -> None:
    whole = np.zeros((3, 8, 8), float)
    whole[1, 2:6, 2:6] = 1
    path = segmentation(
        tmp_path / "s.dcm",
        slices(whole.astype(np.uint8)),
        whole,
        HEART[:1],
        "FRACTIONAL",
        fractional_type="OCCUPANCY",
    )
    read = read_case(case(path), MM_WHS)
    assert np.count_nonzero(read.labels == 3) == 16 and "is read as BINARY" in " ".join(read.notes)
    encapsulated(
        path, "1.2.840.10008.1.2.8.1", [deflated(frame.tobytes()) for frame in frames_of(path)]
    )
    assert np.count_nonzero(read_case(case(path), MM_WHS).labels == 3) == 16


def test_seg_of_slide_is_refused(tmp_path: Path) -> None:
    path, _ = plain_seg(tmp_path / "s.dcm")

    def tile(ds) -> None:
        ds.DimensionOrganizationType, ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows = (
            "TILED_FULL",
            900,
            900,
        )
        del ds.PerFrameFunctionalGroupsSequence

    with pytest.raises(GeometryError, match="a segmentation of a slide"):
        read_case(case(spoilt(path, tile)), MM_WHS)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("SCT:10200004", "1 (SCT:10200004)"),
        ("SCT:10200004+SCT:7771000", "1 (SCT:10200004+SCT:7771000)"),
        ("DCM:125040", "1 (DCM:125040)"),
        ("99DOE:LESION", "1"),
        ("SCT:Doe^John", "1"),
        ("SCT:10200004+99DOE:2", "1"),
        ("", "1"),
    ],
)
def test_seg_messages_show_public_codes_alone(code: str, shown: str) -> None:
    assert describe(Segment(1, "Doe's liver", code, private=True)) == shown
    assert "Doe's liver" in describe(
        Segment(1, "Doe's liver", code)
    )  # a volume's words are its owner's
