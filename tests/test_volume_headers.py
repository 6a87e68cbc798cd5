"""What a volume's header states is read once: the grid nibabel and SimpleITK see, or a refusal."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs, image, rotation, synth, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import GeometryError, InputError, UnreadableVolume
from runtime.core.labels import MM_WHS
from runtime.core.volume import LabelVolume
from runtime.io.case_finding import find_cases
from runtime.io.readers.volume import read_labels, read_volume
from runtime.io.volume_files import check_header, volume_files

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SFORM = np.array([[-1.5, 0, 0, 60], [0, -1.5, 0, 55], [0, 0, 3, -40], [0, 0, 0, 1]], float)


def nifti(path: Path, values: np.ndarray | None = None, qform=None, sform=SFORM, **fields) -> Path:
    """A NIfTI by nibabel, with bytes of the header replaced: {offset: (format, numbers)}."""
    made = nibabel.Nifti1Image(
        blobs((5, 6, 7)).astype(np.int16).T if values is None else values, None
    )
    made.header.set_qform(qform, int(qform is not None))
    made.header.set_sform(sform, 0 if sform is None else 2)
    made.header.set_xyzt_units("mm")
    made.header["vox_offset"] = 352
    made.header["pixdim"][1:4] = fields.pop("pixdim", np.abs(np.diag(SFORM)[:3]))
    for name, value in fields.items():
        made.header[name] = value
    path.write_bytes(made.header.binaryblock + bytes(4) + made.dataobj.tobytes("F"))
    return path


def affine_ras(path: Path) -> np.ndarray:
    return LPS @ read_volume(path).geometry.affine


@pytest.mark.parametrize(
    ("matrices", "pixdim"),
    [
        ({"sform": SFORM}, (1.5, -1.5, 3)),
        ({"sform": SFORM, "qform": SFORM}, (1.5, -1.5, 3)),
        ({"sform": None, "qform": SFORM}, (1.5, -1.5, 3)),
        ({"sform": SFORM}, (1, 1, 1)),
        ({"sform": SFORM}, (1.5, 1.5, 3.3)),
    ],
)
def test_nifti_contradicting_voxel_sizes_follow_nibabel(matrices, pixdim, tmp_path: Path) -> None:
    path = nifti(tmp_path / "m.nii", pixdim=pixdim, **matrices)
    assert np.allclose(affine_ras(path), nibabel.load(path).affine, atol=1e-5)
    volume = read_volume(path)
    assert volume.notes and "pixdim" in volume.notes[0]
    assert volume.nifti_header is None, "a result must not carry the contradiction on"


def test_nifti_sform_counts_before_qform(tmp_path: Path) -> None:
    other = SFORM.copy()
    other[0, 3] += 0.3  # a fifth of a voxel: within what counts as one place
    path = nifti(tmp_path / "m.nii", qform=other)
    assert (
        np.array_equal(affine_ras(path), nibabel.load(path).affine) and affine_ras(path)[0, 3] == 60
    )


@pytest.mark.parametrize("spacing", [(0.2, 0.2, 0.2), (0.98, 0.98, 1.0)])
def test_nifti_oblique_simpleitk_files_are_read(spacing, tmp_path: Path) -> None:
    """An axial grid in RAS is a half turn, near which a float32 quaternion loses the angle."""
    rng = np.random.default_rng(0)
    size = (400, 400, 300) if spacing[0] < 0.5 else (512, 512, 500)
    path = tmp_path / "m.nii"
    for _ in range(100):
        made = sitk.Image(4, 4, 4, sitk.sitkUInt8)
        made.SetSpacing(spacing)
        made.SetDirection(rotation(np.degrees(rng.normal(0, 0.0004, 3))).ravel())
        sitk.WriteImage(made, str(path))
        data = bytearray(path.read_bytes()[:352])
        struct.pack_into("<3h", data, 42, *size)
        path.write_bytes(data)
        os.truncate(path, 352 + int(np.prod(size)))  # sparse
        assert (
            np.abs(
                (LPS @ check_header(path).geometry.affine - nibabel.load(path).affine) @ [*size, 1]
            ).max()
            < 1e-3
        )


@pytest.mark.parametrize("shear", [1e-4, 3e-4, 9e-4])
def test_nifti_rounding_shear_gets_note(shear: float, tmp_path: Path, fake_model: Path) -> None:
    sform = SFORM @ np.array([[1, shear, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    path = nifti(tmp_path / "m.nii", sform=sform)
    assert np.allclose(affine_ras(path), nibabel.load(path).affine, atol=1e-5)
    assert any("sheared a little" in note for note in read_volume(path).notes)
    assert synth(fake_model, tmp_path / "out", path) == 0
    result = tmp_path / "out" / "m_ct.nii.gz"
    assert sitk.ReadImage(str(result)).GetSize() == (7, 6, 5)  # which refuses the sform alone
    assert np.allclose(nibabel.load(result).affine, nibabel.load(path).affine, atol=1e-5)


def test_nifti_real_shear_is_refused(tmp_path: Path) -> None:
    sform = SFORM @ np.array([[1, 0.01, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with pytest.raises(GeometryError, match="the grid is sheared") as refused:
        read_volume(nifti(tmp_path / "m.nii", sform=sform))
    assert refused.value.file == tmp_path / "m.nii"


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0)])
def test_nifti_units_become_millimetres(unit: str, mm: float, tmp_path: Path) -> None:
    small = SFORM / mm
    small[3] = SFORM[3]
    path = nifti(
        tmp_path / "m.nii",
        sform=small,
        pixdim=np.abs(np.diag(small)[:3]),
        xyzt_units=nibabel.nifti1.unit_codes[unit],
    )
    assert np.allclose(affine_ras(path), SFORM, atol=1e-4)


def test_unknown_nifti_unit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="unit 5"):
        read_volume(nifti(tmp_path / "m.nii", xyzt_units=5))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32"])
def test_nifti_2_is_read(dtype: str, suffix: str, order: str, tmp_path: Path) -> None:
    values = blobs((5, 6, 7)).clip(0, 200).astype(np.dtype(dtype).newbyteorder(order))
    header = nibabel.Nifti2Header(endianness=order)
    header.set_data_dtype(values.dtype)
    made = nibabel.Nifti2Image(values.T, SFORM, header)
    nibabel.save(made, tmp_path / f"m{suffix}")
    read = read_volume(tmp_path / f"m{suffix}")
    assert read.values.dtype == dtype and np.array_equal(read.values, values)
    assert np.array_equal(affine_ras(tmp_path / f"m{suffix}"), SFORM) and read.nifti_header is None


def nrrd(
    path: Path,
    fields: str = "",
    *,
    space: str = "space: left-posterior-superior\n",
    data: bytes | None = None,
    directions: str = "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n",
    encoding: str = "raw",
    kind: str = "uint8",
    sizes: str = "2 3 4",
    endian: str = "little",
) -> Path:
    text = (
        f"NRRD0005\ntype: {kind}\ndimension: {len(sizes.split())}\n{space}sizes:"
        f" {sizes}\n{directions}encoding: {encoding}\nendian: {endian}\n{fields}\n"
    )
    path.write_bytes(text.encode() + (bytes(range(24)) if data is None else data))
    return path


def meta(
    path: Path,
    fields: str = "",
    *,
    data: bytes | None = None,
    kind: str = "MET_UCHAR",
    size: str = "2 3 4",
    file: str = "LOCAL",
    spacing: str = "ElementSpacing = 2 3 4\nOffset = 10 20 30\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n",
) -> Path:
    text = (
        f"ObjectType = Image\nNDims = {len(size.split())}\n{spacing}{fields}DimSize ="
        f" {size}\nElementType = {kind}\nElementDataFile = {file}\n"
    )
    path.write_bytes(text.encode() + (bytes(range(24)) if data is None else data))
    return path


@pytest.mark.parametrize(
    ("units", "spacing", "origin"),
    [
        ('space units: "mm" "mm" "mm"\n', (2, 3, 4), (10, 20, 30)),
        ('space units: "cm" "cm" "cm"\n', (20, 30, 40), (100, 200, 300)),
        ('space units: "um" "um" "um"\n', (0.002, 0.003, 0.004), (0.01, 0.02, 0.03)),
        ('space units: "mm" "mm" "cm"\n', (2, 3, 40), (10, 20, 300)),
        ('space units: "" "" ""\n', (2, 3, 4), (10, 20, 30)),
        ("measurement frame: (0,1,0) (1,0,0) (0,0,1)\n", (2, 3, 4), (10, 20, 30)),
    ],
)
def test_nrrd_space_units_are_scaled(units: str, spacing, origin, tmp_path: Path) -> None:
    geometry = read_volume(nrrd(tmp_path / "m.nrrd", units)).geometry
    assert geometry.spacing == pytest.approx(spacing) and geometry.origin == pytest.approx(origin)


def test_nrrd_axis_units_are_scaled(tmp_path: Path) -> None:
    path = nrrd(
        tmp_path / "m.nrrd", 'units: "cm" "mm" "um"\n', space="", directions="spacings: 2 3 4\n"
    )
    assert read_volume(path).geometry.spacing == pytest.approx((20, 3, 0.004))


@pytest.mark.parametrize(
    "space",
    [
        "right-anterior-superior",
        "RAS",
        "left-anterior-superior",
        "LAS",
        "LPS",
        "Left-Posterior-Superior",
    ],
)
def test_nrrd_spaces_agree_with_simpleitk(space: str, tmp_path: Path) -> None:
    path = nrrd(
        tmp_path / "m.nrrd",
        space=f"space: {space}\n",
        directions="space directions: (0,2,0.1) (3,0,0) (0,0.2,-4)\nspace origin: (10,20,30)\n",
    )
    read, itk = read_volume(path), sitk.ReadImage(str(path))
    for index in ((0, 0, 0), (1, 0, 0), (0, 2, 0), (1, 2, 3)):
        assert (read.geometry.affine @ [*index, 1])[:3] == pytest.approx(
            itk.TransformIndexToPhysicalPoint(index), abs=1e-9
        )
    assert not read.notes


REFUSED_NRRD = {
    "inches": ({"fields": 'space units: "in" "in" "in"\n'}, "in"),
    "two units": ({"fields": 'space units: "mm" "mm"\n'}, "spaceunits"),
    "units beside directions": ({"fields": 'units: "cm" "cm" "cm"\n'}, "'units'"),
    "scanner": ({"space": "space: scanner-xyz\n"}, "scanner-xyz"),
    "mirrored": ({"space": "space: 3D-left-handed\n"}, "3d-left-handed"),
    "time": ({"space": "space: left-posterior-superior-time\n"}, "time"),
    "both": ({"fields": "spacings: 1 1 1\n"}, "both"),
    "no grid": ({"directions": ""}, "does not state its voxel spacing"),
    "underscore": (
        {"directions": "space directions: (1_0,0,0) (0,1,0) (0,0,1)\n"},
        "states the spacedirections",
    ),
    "sizes twice": ({"fields": "sizes: 4 3 2\n"}, "'sizes' twice"),
    "unknown field": ({"fields": "data  fyle: x.raw\n"}, "not an NRRD field: line 10"),
    "line skip": ({"fields": "line skip: 1\n"}, "skips lines"),
    "byte skip": ({"fields": "byte skip: -7\n"}, "-7 bytes"),
    "too far": ({"fields": "byte skip: 10\n"}, "it has 14 of 24 bytes"),
    "carriage return": ({"fields": "# x\rdata file: m.raw\n"}, "control character"),
    "no order": ({"kind": "int16", "endian": "middle", "data": bytes(48)}, "byte order"),
    "colours": ({"fields": "kinds: RGB-color domain domain\n"}, "kinds"),
    "short hex": ({"encoding": "hex", "data": b"00" * 23}, "is truncated"),
    "no hex": ({"encoding": "hex", "data": b"zz" * 24}, "not hexadecimal"),
    "short text": ({"encoding": "ascii", "data": b"100 " * 12}, "is truncated"),
    "text too large": ({"encoding": "ascii", "data": b"300 " * 24}, "cannot hold"),
    "short gzip": ({"encoding": "gzip", "data": gzip.compress(bytes(23))}, "is truncated"),
    "cut gzip": (
        {"encoding": "gzip", "data": gzip.compress(bytes(range(24)))[:-3]},
        "truncated or damaged",
    ),
    "no gzip": ({"encoding": "gzip", "data": bytes(80)}, "not gzip"),
}


@pytest.mark.parametrize("kind", REFUSED_NRRD)
def test_ambiguous_nrrd_is_refused(kind: str, tmp_path: Path) -> None:
    options, fact = REFUSED_NRRD[kind]
    with pytest.raises(InputError, match=fact) as refused:
        read_volume(nrrd(tmp_path / "m.nrrd", **options))
    assert refused.value.remedy and refused.value.file == tmp_path / "m.nrrd"


REFUSED_META = {
    "inches": ({"fields": "DistanceUnits = in\n"}, "DistanceUnits"),
    "list": ({"file": "LIST"}, "several files"),
    "list of 3-D": ({"file": "LIST 3D"}, "several files"),
    "pattern": ({"file": "m%03d.raw 1 4 1"}, "several files"),
    "colon": ({"fields": "ElementDataFile : m.raw\n"}, "not 'Key = value'"),
    "no separator": ({"fields": "hello\n"}, "not 'Key = value'"),
    "order twice": ({"fields": "DimSize = 1 1 1\n"}, "'dimsize' twice"),
    "two matrices": ({"fields": "Rotation = 1 0 0 0 1 0 0 0 1\n"}, "both"),
    "long matrix": (
        {"spacing": "ElementSpacing = 1 1 1\nTransformMatrix = 2 0 0 0 1 0 0 0 1\n"},
        "transformmatrix",
    ),
    "header size": ({"fields": "HeaderSize = -1\n"}, "HeaderSize"),
    "rescaled": ({"fields": "ElementToIntensityFunctionSlope = 2\n"}, "rescales"),
    "a mesh": ({"fields": "ObjectSubType = x\n", "kind": "MET_UCHAR_ARRAY"}, "of the type"),
    "short": ({"data": bytes(23)}, "it has 23 of 24 bytes"),
    "short zlib": (
        {"fields": "CompressedData = True\n", "data": zlib.compress(bytes(23))},
        "is truncated",
    ),
    "cut zlib": (
        {"fields": "CompressedData = True\n", "data": zlib.compress(bytes(range(24)))[:-3]},
        "truncated or damaged",
    ),
    "flipped zlib": (
        {
            "fields": "CompressedData = True\n",
            "data": zlib.compress(bytes(range(24)))[:-1] + b"\x07",
        },
        "truncated or damaged",
    ),
    "short text": ({"fields": "BinaryData = False\n", "data": b"100 " * 12}, "is truncated"),
}


@pytest.mark.parametrize("kind", REFUSED_META)
def test_ambiguous_metaimage_is_refused(kind: str, tmp_path: Path) -> None:
    options, fact = REFUSED_META[kind]
    for name in ("LIST", "LIST 3D", "m.raw"):
        (tmp_path / name).write_bytes(bytes(24))
    with pytest.raises(InputError, match=fact):
        read_volume(meta(tmp_path / "m.mha", **options))


@pytest.mark.parametrize(("unit", "mm"), [("um", 0.001), ("mm", 1.0), ("cm", 10.0)])
def test_metaimage_distance_units_are_scaled(unit: str, mm: float, tmp_path: Path) -> None:
    geometry = read_volume(meta(tmp_path / "m.mha", f"DistanceUnits = {unit}\n")).geometry
    assert geometry.spacing == pytest.approx(
        (2 * mm, 3 * mm, 4 * mm)
    ) and geometry.origin == pytest.approx((10 * mm, 20 * mm, 30 * mm))


NRRD_TYPES = dict(
    zip(
        ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"),
        (
            "int8",
            "uchar",
            "short",
            "unsigned short",
            "int",
            "uint32_t",
            "int64",
            "ulonglong",
            "float",
            "double",
        ),
        strict=True,
    )
)
META_TYPES = dict(
    zip(
        NRRD_TYPES,
        (
            "CHAR",
            "UCHAR",
            "SHORT",
            "USHORT",
            "INT",
            "UINT",
            "LONG_LONG",
            "ULONG_LONG",
            "FLOAT",
            "DOUBLE",
        ),
        strict=True,
    )
)


@pytest.mark.parametrize(("code", "order"), [*itertools.product(NRRD_TYPES, "<>")])
def test_volume_types_orders_encodings_are_read(code: str, order: str, tmp_path: Path) -> None:
    values = (
        (np.arange(24).reshape(4, 3, 2) * 5).astype(code).astype(np.dtype(code).newbyteorder(order))
    )
    plain, text = values.tobytes(), (" ".join(map(repr, values.ravel().tolist())) + "\n").encode()
    endian, big = ("little", "False") if order == "<" else ("big", "True")
    for encoding, data in (
        ("raw", plain),
        ("gzip", gzip.compress(plain)),
        ("ascii", text),
        ("hex", plain.hex().encode()),
    ):
        read = read_volume(
            nrrd(
                tmp_path / "m.nrrd",
                data=data,
                encoding=encoding,
                kind=NRRD_TYPES[code],
                endian=endian,
            )
        )
        assert read.values.dtype == code and np.array_equal(read.values, values), encoding
        assert np.array_equal(
            read.values, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "m.nrrd")))
        ), encoding
    for fields, data in (
        ("", plain),
        ("CompressedData = True\n", zlib.compress(plain)),
        ("CompressedData = True\n", gzip.compress(plain)),
        ("BinaryData = False\n", text),
    ):
        read = read_volume(
            meta(
                tmp_path / "m.mha",
                f"BinaryDataByteOrderMSB = {big}\n{fields}",
                data=data,
                kind=f"MET_{META_TYPES[code]}",
            )
        )
        assert read.values.dtype == code and np.array_equal(read.values, values), fields
        assert read.geometry.spacing == (2, 3, 4) and read.geometry.origin == (10, 20, 30)


@pytest.mark.parametrize("path", ["m.nrrd", "m.nhdr", "m.mha", "m.mhd", "m.nii", "m.nii.gz"])
def test_volume_grid_bits_equal_simpleitk(path: str, tmp_path: Path) -> None:
    """They key every random number of a result, so that results stay what they were."""
    for angles in ((0, 0, 0), (3, -5, 178), (90, 0.01, 0)):
        write_mask(
            tmp_path / path,
            spacing=(0.71, 0.83, 2.5),
            origin=(-101.37, 12.11, 777.7),
            direction=rotation(angles),
        )
        itk, affine = sitk.ReadImage(str(tmp_path / path)), np.eye(4)
        affine[:3, :3], affine[:3, 3] = (
            np.reshape(itk.GetDirection(), (3, 3)) * itk.GetSpacing(),
            itk.GetOrigin(),
        )
        assert np.array_equal(read_volume(tmp_path / path).geometry.affine, affine)


OUTSIDE = {
    "nrrd absolute": (".nrrd", "data file: {secret}\n\n"),
    "nrrd twice": (".nrrd", "data file: {secret}\ndata file: ln.raw\n\n"),
    "nrrd key for field": (".nrrd", "data file: {secret}\ndata file:=LOCAL\n\n"),
    "nrrd link": (".nhdr", "data file: ln.raw\n"),
    "nrrd up": (".nhdr", "data file: ../secret.bin\n"),
    "nrrd list": (".nhdr", "data file: LIST\n{secret}\n"),
    "nrrd long comment": (".nrrd", "# " + "x" * 4094 + "data file: LOCAL\ndata file: {secret}\n\n"),
    "meta absolute": (".mhd", "ElementDataFile = {secret}\n"),
    "meta blank": (".mhd", "ElementDataFile = {secret} \n"),
    "meta colon": (".mha", "ElementDataFile : {secret}\nElementDataFile = LOCAL\n"),
    "meta link": (".mhd", "ElementDataFile = ./ln.raw\n"),
    "meta list": (".mhd", "ElementDataFile = LIST\n{secret}\n"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_detached_voxels_elsewhere_are_never_read(kind: str, tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret.bin", tmp_path / "in"
    secret.write_bytes(bytes(range(65, 89)))
    folder.mkdir()
    (folder / "ln.raw").symlink_to(secret)
    suffix, text = OUTSIDE[kind]
    head = (
        (nrrd if suffix in (".nrrd", ".nhdr") else meta)(folder / "m", data=b"")
        .read_text()
        .rstrip("\n")
    )
    head = "\n".join(line for line in head.split("\n") if not line.startswith("ElementDataFile"))
    path = folder / f"m{suffix}"
    path.write_bytes((head + "\n" + text.format(secret=secret)).encode() + bytes(24))
    with pytest.raises(UnreadableVolume) as refused:
        read_volume(path)
    assert "ABCD" not in str(refused.value) and "65" not in refused.value.fact


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_detached_file_byte_offsets_are_read(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "v.raw").write_bytes(bytes(100) + bytes(range(24)))
    for offset in (100, -1):
        if suffix == ".nhdr":
            path = nrrd(tmp_path / "m.nhdr", f"byte skip: {offset}\ndata file: ./v.raw\n", data=b"")
        else:
            path = meta(tmp_path / "m.mhd", f"HeaderSize = {offset}\n", file="./v.raw", data=b"")
        assert read_volume(path).values.ravel().tolist() == list(range(24))
        assert volume_files(path) == (path, tmp_path / "v.raw")


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_resume_sees_changed_detached_voxels(suffix: str, tmp_path: Path, fake_model: Path) -> None:
    path, out = tmp_path / f"m{suffix}", tmp_path / "out"
    write_mask(path)
    (case,) = find_cases([path])
    assert len(case.files) == 2 and case.files[0] == path
    assert synth(fake_model, out, path) == 0
    first = (out / "m_ct.nii.gz").read_bytes()
    assert (
        synth(fake_model, out, path, "--resume") == 0
        and (out / "m_ct.nii.gz").read_bytes() == first
    )
    header = path.read_bytes()
    write_mask(path, blobs()[::-1])
    assert path.read_bytes() == header
    assert synth(fake_model, out, path, "--resume") == 0
    again = (out / "m_ct.nii.gz").read_bytes()
    assert again != first
    assert (
        synth(fake_model, tmp_path / "fresh", path) == 0
        and (tmp_path / "fresh" / "m_ct.nii.gz").read_bytes() == again
    )


def test_detached_header_in_zip_is_read(tmp_path: Path, fake_model: Path) -> None:
    """A detached header in a zip counts as its two files."""
    write_mask(tmp_path / "m.mhd")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("m.mhd", "m.raw"):
            archive.write(tmp_path / name, f"a/{name}")
    (case,) = find_cases([tmp_path / "z.zip"])
    assert [file.name for file in case.files] == ["m.mhd", "m.raw"]
    assert (
        synth(fake_model, tmp_path / "zip", tmp_path / "z.zip")
        == 0
        == synth(fake_model, tmp_path / "plain", tmp_path / "m.mhd")
    )
    assert (tmp_path / "zip" / "m_ct.nii.gz").read_bytes() == (
        tmp_path / "plain" / "m_ct.nii.gz"
    ).read_bytes()


def test_watch_keeps_equal_headers_apart(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two patients whose headers are equal, as an exporter writes them: none gets the other's
    CT.
    """
    inbox, out = tmp_path / "inbox", tmp_path / "out"
    line = [
        "watch",
        str(inbox),
        "--model",
        str(fake_model),
        "--output",
        str(out),
        "--backend",
        "fake",
        "--once",
        "--stable",
        "0",
        "--poll",
        "0.01",
    ]
    for patient, code in (("p1", 0), ("p2", 1)):
        (inbox / patient).mkdir(parents=True)
        write_mask(inbox / patient / "m.mhd", blobs() if patient == "p1" else blobs()[::-1])
        assert run(main, line) == code, capsys.readouterr().err
    assert "made of another mask" in (inbox / "failed" / "p2.reason.txt").read_text()
    assert synth(fake_model, tmp_path / "first", inbox / "done" / "p1") == 0
    assert (out / "m_ct.nii.gz").read_bytes() == (tmp_path / "first" / "m_ct.nii.gz").read_bytes()


def flat(folder: Path) -> list[Path]:
    """One slice of 6 x 5 voxels of 2 x 3 mm in every format."""
    values = np.zeros((5, 6), np.uint8)
    values[1:3, 2:5] = 205
    affine = np.diag([-2.0, -3.0, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(values.T, affine), folder / "a.nii.gz")
    empty = affine.copy()
    empty[2, 2] = 0
    made = nibabel.Nifti1Image(values.T, affine)
    data = bytearray(made.header.binaryblock + bytes(4) + values.tobytes())
    struct.pack_into("<f", data, 108, 352.0)
    struct.pack_into("<h", data, 254, 2)
    struct.pack_into("<12f", data, 280, *empty[:3].ravel())
    struct.pack_into("<f", data, 88, 0.0)  # pixdim[3]
    (folder / "b.nii").write_bytes(data)
    picture = sitk.GetImageFromArray(values)
    picture.SetSpacing((2.0, 3.0))
    for name in ("c.nrrd", "d.mha"):
        sitk.WriteImage(picture, str(folder / name))
    return [folder / name for name in ("a.nii.gz", "b.nii", "c.nrrd", "d.mha")]


def test_flat_label_map_is_one_slice(tmp_path: Path, fake_model: Path) -> None:
    (tmp_path / "in").mkdir()
    paths = flat(tmp_path / "in")
    for path in paths:
        read = read_volume(path)
        assert (
            read.values.shape == (1, 5, 6)
            and (read.values[0, 1:3, 2:5] == 205).all()
            and read.values.sum() == 6 * 205
        )
        assert read.geometry.spacing == (2, 3, 1)
        assert path.name == "a.nii.gz" or any(
            "one slice that states no thickness" in note for note in read.notes
        )
    assert synth(fake_model, tmp_path / "out", *paths) == 0
    for name in "abcd":
        made = sitk.ReadImage(str(tmp_path / "out" / f"{name}_ct.nii.gz"))
        assert made.GetSize() == (6, 5, 1) and made.GetSpacing() == (2, 3, 1)


@pytest.mark.parametrize("gap", [40 << 20, 3 << 30])
def test_gap_before_voxels_costs_no_memory(gap: int, tmp_path: Path) -> None:
    """What is small enough to lie there is passed over; of the other nothing is unpacked."""
    data = nifti(tmp_path / "m.nii").read_bytes()
    head, path = bytearray(data[:352]), tmp_path / "g.nii.gz"
    struct.pack_into("<f", head, 108, 352.0 + gap)
    path.write_bytes(gzip.compress(bytes(head) + bytes(min(gap, 40 << 20)) + data[352:], 1))
    tracemalloc.start()
    try:
        if gap < 1 << 30:
            assert np.array_equal(read_volume(path).values, read_volume(tmp_path / "m.nii").values)
        else:
            with pytest.raises(UnreadableVolume, match="bytes behind its header"):
                read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_volume_labels_are_read_by_plane(tmp_path: Path) -> None:
    """The labels of every format are read plane by plane."""
    values = blobs((70, 160, 150)).astype(np.int32)
    expected = None
    for name in ("m.nii.gz", "m.nrrd", "m.mha", "m.mhd"):
        sitk.WriteImage(
            image(values, (1.0, 1.0, 2.0)), str(tmp_path / name), useCompression=name != "m.mhd"
        )
        tracemalloc.start()
        try:
            read = read_labels(tmp_path / name, MM_WHS)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < values.size + (14 << 20), name
        expected = expected or read
        assert np.array_equal(read.labels, expected.labels)
        assert read.digest == LabelVolume(read.labels, read.geometry).digest


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="asks the system for its memory")
def test_labels_beyond_all_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file, or a few MB of gzip, holds what no machine does."""
    path = nifti(tmp_path / "m.nii")
    monkeypatch.setattr(
        os, "sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 5 * 6 * 7 - 1}.__getitem__
    )
    with pytest.raises(
        UnreadableVolume, match="7 x 6 x 5 voxels, more than this run has memory for"
    ):
        read_labels(path, MM_WHS)
    monkeypatch.undo()
    assert read_labels(path, MM_WHS).labels.shape == (5, 6, 7)


def test_large_file_is_refused_unread(tmp_path: Path, fake_model: Path) -> None:
    """A header is refused before a sparse file of 4 GB is read for its digest."""
    mask = tmp_path / "m.nii"
    head = bytearray(352)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, 3, 1024, 1024, 512, 1, 1, 1, 1)
    struct.pack_into("<2h", head, 70, 32, 64)  # complex numbers
    struct.pack_into("<8f", head, 76, *[1] * 8)
    struct.pack_into("<f", head, 108, 352)
    head[344:348] = b"n+1\0"
    mask.write_bytes(head)
    os.truncate(mask, 352 + 1024 * 1024 * 512 * 8)
    before = _bytes_read()
    assert synth(fake_model, tmp_path / "out", mask) == 1
    assert _bytes_read() - before < 1 << 30


def _bytes_read() -> int:
    """What this process has read so far, from files and caches (proc(5))."""
    statistics = Path("/proc/self/io")
    if not statistics.exists():
        pytest.skip("the system does not count what a process reads")
    return int(statistics.read_text().split("rchar:")[1].split()[0])
