"""Bad masks: one screen that says fact, expectation, remedy and file; the stated exit code; no
debris.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs, image, results, synth, write_mask


def nifti(path: Path, values: np.ndarray, **fields: object) -> None:
    made = nibabel.Nifti1Image(np.asfortranarray(values.T), np.eye(4))
    for name, value in fields.items():
        made.header[name] = value
    nibabel.save(made, path)


def patched(path: Path, fmt: str, offset: int, *values: object) -> None:
    """A good uncompressed NIfTI with some header bytes replaced."""
    nifti(path, blobs().astype(np.int16))
    data = bytearray(path.read_bytes())
    struct.pack_into(fmt, data, offset, *values)
    path.write_bytes(data)


def truncated(path: Path) -> None:
    write_mask(path)
    path.write_bytes(path.read_bytes()[:-40])


def cut_in_the_header(path: Path) -> None:
    write_mask(path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:200]))


def flipped_bit(path: Path) -> None:
    write_mask(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def with_value(path: Path, value: float) -> None:
    values = blobs().astype(np.float32)
    values[2, 3, 4] = value
    write_mask(path, values)


def rgb(path: Path) -> None:
    colours = np.zeros((4, 5, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), path)


def vector(path: Path) -> None:
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(path)
    )


def unknown_labels(path: Path) -> None:
    values = blobs()
    values[0, 0, :2] = (3, 999)
    write_mask(path, values)


def escaping_mhd(path: Path) -> None:
    path.write_text(
        "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementSpacing = 1 1"
        " 1\nElementDataFile = ../secret.raw\n"
    )


def last_is_nan(path: Path) -> None:
    values = np.zeros((3, 3, 3), np.float32)
    values[2, 2, 2] = np.nan
    write_mask(path, values)


def raw_nrrd_cut(path: Path) -> None:
    sitk.WriteImage(image(blobs()), str(path))
    path.write_bytes(path.read_bytes()[:-40])


def nan_nrrd(path: Path) -> None:
    path.write_bytes(
        b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nspacings: nan nan nan\nencoding:"
        b" raw\n\n" + bytes(8)
    )


def two_places(path: Path) -> None:
    patched(path, "<2h", 252, 1, 1)  # qform and sform count, and agree ...
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, 292, 7.0)  # ... until the sform is moved by 7 mm
    path.write_bytes(data)


def bomb(path: Path) -> None:
    """Two kilobytes that claim 16 GB."""
    head = (
        b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2500 2500 2500\nspacings: 1 1 1\nencoding:"
        b" gzip\n\n"
    )
    path.write_bytes(head + gzip.compress(bytes(2 << 20)))


def endless_gzip_name(path: Path) -> None:
    """The name that a gzip file may state of what it holds (RFC 1952, FNAME) has no bound."""
    packed = write_mask(path).read_bytes()
    path.write_bytes(packed[:3] + b"\x08" + packed[4:10] + b"A" * (1 << 20) + b"\0" + packed[10:])


def short_raw(path: Path) -> None:
    write_mask(path)
    data = path.with_suffix(".raw")
    data.write_bytes(data.read_bytes()[:-1])


def complex_mask(path: Path) -> None:
    write_mask(path.with_suffix(".tmp.mha"))
    sitk.WriteImage(
        sitk.Cast(sitk.ReadImage(str(path.with_suffix(".tmp.mha"))), sitk.sitkComplexFloat32),
        str(path),
    )
    path.with_suffix(".tmp.mha").unlink()


def far_apart(path: Path) -> None:
    values = np.zeros((2, 60, 60), np.uint16)
    values[0, 1, 1] = values[0, 58, 58] = 500
    write_mask(path, values, spacing=(1000.0, 1000.0, 3.0))


BAD_MASKS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "text": ("m.nii.gz", lambda p: p.write_text("these are not voxels\n"), "not gzip-compressed"),
    "text nii": (
        "m.nii",
        lambda p: p.write_text("these are not voxels\n" * 40),
        "not a NIfTI file",
    ),
    "empty file": ("m.nii.gz", lambda p: p.write_bytes(b""), "not gzip-compressed"),
    "missing": ("m.nii.gz", lambda p: None, "does not exist"),
    "folder": ("m.nii.gz", lambda p: p.mkdir(), "holds no masks"),
    "truncated": ("m.nii.gz", truncated, "truncated"),
    "truncated nii": ("m.nii", truncated, "truncated"),
    "cut in the header": ("m.nii.gz", cut_in_the_header, "inside its header"),
    "flipped bit": ("m.nii.gz", flipped_bit, "truncated or damaged"),
    "endless gzip name": ("m.nii.gz", endless_gzip_name, "truncated or damaged"),
    "4-D": ("m.nii.gz", lambda p: nifti(p, np.zeros((2, 3, 4, 5), np.int16)), "4-D"),
    "5-D": ("m.nii.gz", lambda p: nifti(p, np.zeros((2, 2, 3, 4, 5), np.int16)), "5-D"),
    "1-D": ("m.nii.gz", lambda p: nifti(p, np.zeros(4, np.int16)), "1-D"),
    "8 dimensions": ("m.nii", lambda p: patched(p, "<h", 40, 8), "claims 8 dimensions"),
    "huge": ("m.nii", lambda p: patched(p, "<4h", 40, 3, 32767, 32767, 32767), "claims the size"),
    "more than is there": ("m.nii", lambda p: patched(p, "<4h", 40, 3, 512, 512, 512), "truncated"),
    "negative size": ("m.nii", lambda p: patched(p, "<h", 42, -5), "claims the size"),
    "spacing 0": ("m.nii", lambda p: patched(p, "<3f", 80, 1, 0, 1), "voxel spacing"),
    "spacing NaN": ("m.nii", lambda p: patched(p, "<3f", 80, 1, 1, float("nan")), "voxel spacing"),
    "a bomb": ("m.nrrd", bomb, "of 15625000000 bytes of voxels"),
    "too few voxels beside it": ("m.mhd", short_raw, "it has 5759 of 5760 bytes"),
    "two places": ("m.nii", two_places, "its qform (code 1) and its sform (code 1) are 7 mm apart"),
    "far away": ("m.mha", lambda p: write_mask(p, origin=(1e30, 0.0, 0.0)), "states the offset"),
    "a matrix that ITK never returns from": (
        "m.mha",
        lambda p: p.write_bytes(
            write_mask(p).read_bytes().replace(b"Matrix = 1 0 0 0", b"Matrix = 1 0 0 1e308")
        ),
        "states the transformmatrix",
    ),
    "nowhere": ("m.nii", lambda p: patched(p, "<f", 292, float("nan")), "states a place beyond"),
    "no such type": ("m.nii", lambda p: patched(p, "<h", 70, 77), "unknown type 77"),
    "RGB": ("m.nii.gz", rgb, "RGB colours"),
    "vector": ("m.mha", vector, "3 channels"),
    "vector nrrd": ("m.nrrd", vector, "4-D"),
    "0.5": ("m.nii.gz", lambda p: with_value(p, 0.5), "holds 0.5, which is not a label"),
    "NaN": ("m.nii.gz", lambda p: with_value(p, float("nan")), "holds nan, which is not a label"),
    "infinite": ("m.mha", lambda p: with_value(p, float("inf")), "holds inf, which is not a label"),
    "unknown labels": ("m.nii.gz", unknown_labels, "3, 999"),
    "no spacing": (
        "m.mha",
        lambda p: p.write_text(
            "NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n12345678"
        ),
        "does not state its voxel spacing",
    ),
    "voxels elsewhere": ("m.mhd", escaping_mhd, "../secret.raw"),
    "odd count with NaN last": ("m.nii", last_is_nan, "holds nan, which is not a label"),
    "too long an axis": (
        "m.mha",
        lambda p: write_mask(p, np.zeros((1, 2, 40000), np.uint8)),
        "40000 voxels along one axis",
    ),
    "truncated mha": ("m.mha", truncated, "truncated"),
    "truncated nrrd": ("m.nrrd", raw_nrrd_cut, "truncated"),
    "NaN spacing nrrd": ("m.nrrd", nan_nrrd, "does not state its voxel spacing"),
    "complex": ("m.mha", complex_mask, "2 channels"),
    "labels a hundred metres apart": ("m.mha", far_apart, "its labels span"),
    "a name too long": ("n" * 235 + ".nii.gz", write_mask, "too long"),
    "a name no disk takes": ("n" * 300 + ".nii.gz", lambda p: None, "too long"),
    "not a volume": (
        "m.png",
        lambda p: p.write_bytes(b"\x89PNG"),
        "does not have a supported format",
    ),
    "text nrrd": ("m.nrrd", lambda p: p.write_text("hello\n"), "not an NRRD"),
    "text mha": (
        "m.mha",
        lambda p: p.write_text("hello\n"),
        "does not start as its suffix promises",
    ),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_bad_mask_fails_alone(
    kind: str, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bad mask is named, and the others are synthesized."""
    name, make, fact = BAD_MASKS[kind]
    bad, good, out = tmp_path / name, write_mask(tmp_path / "good.nii.gz"), tmp_path / "out"
    make(bad)
    code = synth(fake_model, out, bad, good)
    error = capsys.readouterr().err
    assert fact in error and str(bad) in error
    assert (
        "expected" in error
        and "remedy" in error
        and "Traceback" not in error
        and len(error.splitlines()) <= 12
    )
    if kind == "folder":  # the command is wrong: nothing is started
        assert code == 2 and not out.exists()
    else:
        assert code == 1
        assert list(results(out)) == ["good_ct.nii.gz"]


def test_unknown_labels_name_the_remedy(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message lists the mask's labels, the model's labels and the remedy."""
    unknown_labels(tmp_path / "m.nii.gz")
    assert synth(fake_model, tmp_path / "out", tmp_path / "m.nii.gz") == 1
    error = capsys.readouterr().err
    assert "3, 999" in error and "0, 3, 205, 420, 500, 550, 600, 820, 850, 999" in error
    assert "820 ascending aorta" in error and "--labels MAP.json" in error


def test_empty_mask_is_synthesized_with_warning(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(tmp_path / "m.nii.gz", np.zeros((4, 10, 10), np.uint8))
    assert synth(fake_model, tmp_path / "out", tmp_path / "m.nii.gz") == 0
    assert "m.nii.gz is empty" in capsys.readouterr().err
    assert (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "m_ct.nii.gz"))) == -1024
    ).all()


def test_integral_floats_are_labels(tmp_path: Path, fake_model: Path) -> None:
    write_mask(tmp_path / "a.nii.gz", blobs().astype(np.float64))
    write_mask(tmp_path / "b.nii.gz", blobs())
    assert synth(fake_model, tmp_path / "out", tmp_path) == 0
    a, b = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"{n}_ct.nii.gz")))
        for n in "ab"
    )
    assert np.array_equal(a, b)


def test_file_name_outside_utf8_is_refused(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SimpleITK ends the process on such a name; it is never given one."""
    good = write_mask(tmp_path / "good.nii.gz")
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.nii.gz"))
    shutil.copy(good, bad)
    assert synth(fake_model, tmp_path / "out", bad, good) == 1
    assert "not valid UTF-8" in capsys.readouterr().err
    assert list(results(tmp_path / "out")) == ["good_ct.nii.gz"]


def test_foreign_output_file_is_never_replaced(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that mask2ct did not write is never replaced."""
    write_mask(tmp_path / "b.nii.gz")
    precious = write_mask(tmp_path / "b_ct.nii.gz", np.full((6, 20, 24), 77, np.int16))
    before = precious.read_bytes()
    assert synth(fake_model, tmp_path, tmp_path / "b.nii.gz") == 2
    assert (
        "b_ct.nii.gz is in the way" in capsys.readouterr().err and precious.read_bytes() == before
    )


def test_rerun_in_mask_folder_works(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output folder may be the folder of the masks, also for a second run."""
    write_mask(tmp_path / "b.nii.gz")
    for _ in range(2):
        assert synth(fake_model, tmp_path, tmp_path) == 0
    assert "b_ct.nii.gz was written by mask2ct" in capsys.readouterr().err
    assert sorted(results(tmp_path)) == ["b.nii.gz", "b_ct.nii.gz"]


def test_missing_orientation_is_a_warning(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nifti(tmp_path / "m.nii.gz", blobs().astype(np.int16))  # nibabel states an sform ...
    assert synth(fake_model, tmp_path / "out", tmp_path / "m.nii.gz") == 0
    assert "states no orientation" not in capsys.readouterr().err
    patched(tmp_path / "n.nii", "<2h", 252, 0, 0)  # ... which is taken away
    assert synth(fake_model, tmp_path / "out", tmp_path / "n.nii") == 0
    assert "states no orientation" in capsys.readouterr().err


def test_next_run_sweeps_killed_runs_files(tmp_path: Path, fake_model: Path) -> None:
    """A killed run leaves no unfinished file behind the next one."""
    from runtime.core.atomic_files import temporary_name

    out = tmp_path / "out"
    out.mkdir()
    mine = temporary_name(
        out / "x_ct.nii.gz"
    )  # process numbers come back: in containers, the same one always
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        orphan = out / mine.name.replace(str(os.getpid()), str(child.pid))
    mine.touch()
    orphan.touch()
    assert synth(fake_model, out, write_mask(tmp_path / "m.nii.gz")) == 0
    assert list(results(out)) == [
        "m_ct.nii.gz"
    ]  # the folder is locked: nobody else can be writing there


def test_report_of_failed_run_is_written(tmp_path: Path, fake_model: Path) -> None:
    """The report's place is checked first, and a run that fails writes its report too."""
    mask = write_mask(tmp_path / "m.nii.gz")
    assert synth(fake_model, tmp_path / "out", mask, "--report", "/proc/x.json") == 4
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").write_text("")
    assert synth(fake_model, tmp_path / "taken", mask, "--report", tmp_path / "r.json") == 4
    assert json.loads((tmp_path / "r.json").read_text())["cases"] == []


def test_python_api_refuses_as_command_does(tmp_path: Path, fake_model: Path) -> None:
    """The Python API refuses what the command refuses."""
    from runtime import Synthesizer, UnknownLabels, UsageError
    from runtime.core.volume import Geometry, LabelVolume

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_mask(tmp_path / folder / "x.nii.gz")
    with Synthesizer.open(fake_model, backend="fake") as opened:
        with pytest.raises(UsageError, match="would both be written"):
            opened.stream(
                [tmp_path / "a" / "x.nii.gz", tmp_path / "b" / "x.nii.gz"], tmp_path / "o"
            )
        with pytest.raises(UsageError, match="0 variants"):
            opened.stream([tmp_path / "a"], tmp_path / "o", variants=0)
        (result,) = opened.stream(str(tmp_path / "a"), tmp_path / "o")
        assert result.error is None
        with pytest.raises(UsageError, match="leads to 99"):
            opened(image(blobs((4, 8, 8), (0, 500))), labels={0: 0, 500: 99})
        with pytest.raises(UnknownLabels, match="index 200"):
            opened.synthesize(LabelVolume(np.full((2, 8, 8), 200, np.uint8), Geometry(np.eye(4))))


def test_simpleitk_image_kind_is_checked(fake_model: Path) -> None:
    """A SimpleITK image of another kind is refused.

    GetArrayFromImage of a label-map object would end the process.
    """
    from runtime import Synthesizer, UnreadableVolume

    with Synthesizer.open(fake_model, backend="fake") as opened:
        for kind in (sitk.sitkLabelUInt16, sitk.sitkComplexFloat32):
            with pytest.raises(UnreadableVolume):
                opened(sitk.Cast(image(blobs()), kind))


def test_unknown_encoding_gives_no_traceback(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encoding that no library reads gives an error and not a traceback."""
    sitk.WriteImage(image(blobs()), str(tmp_path / "m.nrrd"))
    text = (tmp_path / "m.nrrd").read_bytes()
    (tmp_path / "m.nrrd").write_bytes(
        text.replace(b"encoding: gzip", b"encoding: zork").replace(
            b"encoding: raw", b"encoding: zip"
        )
    )
    assert synth(fake_model, tmp_path / "out", tmp_path / "m.nrrd") == 1
    error = capsys.readouterr().err
    assert (
        "m.nrrd" in error and "encoding" in error and "remedy" in error and "Traceback" not in error
    )
