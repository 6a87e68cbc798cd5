"""Damaged files beside DICOM masks: they are counted with the reason, hide nothing that is
whole, and no series lacks a slice silently.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_masks import save, segmentation, slices, structure_set
from pydicom.dataset import Dataset
from samples import blobs, synth, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import UnreadableVolume, UsageError
from runtime.core.labels import MM_WHS
from runtime.io.case_finding import find_cases
from runtime.io.cases import PassedOver, read_case, read_mask

HEART = [("left ventricle", "87878005")]
PLANTED = ("Doe", "John", "Planted", "PLANTED", "4711")


def cut_to(size: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def cut_by(size: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:-size])


def web_page(file: Path) -> None:
    file.write_bytes(b"\n<!DOCTYPE html><html>403</html>" * 40)


def without_preamble(file: Path) -> None:
    file.write_bytes(file.read_bytes()[132:])


def broken_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere.dcm")


def unfinished(file: Path) -> None:
    file.rename(file.with_name(f"{file.name}.part"))


DAMAGE = {
    "empty": (cut_to(0), "1 empty"),
    "web page": (web_page, "1 web page"),
    "text": (lambda file: file.write_text("no such study"), "1 text"),
    "no preamble": (without_preamble, "1 without the DICOM prefix"),
    "half a prefix": (cut_to(100), "1 without the DICOM prefix"),
    "prefix alone": (cut_to(132), "1 with an incomplete header"),
    "cut in the header": (cut_to(500), "1 cut short"),
    "cut before the pixels": (cut_by(960 + 12), "1 cut short"),
    "cut in the pixels": (cut_by(2), "1 cut short"),
    "broken link": (broken_link, "1 broken link"),
    "unfinished copy": (unfinished, "1 unfinished copy"),
}


@pytest.mark.parametrize("where", [0, 3, 5], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_series_beside_damaged_file_is_refused(kind: str, where: int, tmp_path: Path) -> None:
    damage, reason = DAMAGE[kind]
    series = slices(blobs((6, 20, 24)))
    folder = tmp_path / "s"
    save(folder, series)
    damage(sorted(folder.iterdir(), key=lambda file: file.name[-7:])[where])
    (case,) = find_cases([folder])
    assert case.kind == "series" and not case.whole
    with pytest.raises(UnreadableVolume) as caught:
        read_case(case, MM_WHS)
    assert reason in caught.value.fact and not [
        word for word in PLANTED if word in str(caught.value)
    ]
    (given_singly,) = find_cases(sorted(folder.iterdir()))
    with pytest.raises(UnreadableVolume, match=reason.replace("(", ".").replace(")", ".")):
        read_case(given_singly, MM_WHS)


@pytest.mark.skipif(os.name != "posix", reason="needs modes of files")
def test_an_unreadable_file_refuses_the_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For root every file can be read: the system call itself is made to refuse."""
    folder = save(tmp_path / "s", slices(blobs((6, 20, 24))))
    locked = sorted(folder.iterdir())[-1]
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        really = os.open

        def refusing(path: object, *more: int) -> int:
            if Path(str(path)) == locked:
                raise PermissionError(13, "Permission denied", str(path))
            return really(path, *more)  # type: ignore[call-overload]

        monkeypatch.setattr(os, "open", refusing)
    (case,) = find_cases([folder])
    with pytest.raises(UnreadableVolume, match=r"1 unreadable \(permission denied\)"):
        read_mask(case)


def test_several_kinds_of_damage_are_counted(tmp_path: Path) -> None:
    folder = save(tmp_path / "s", slices(blobs((6, 20, 24))))
    first, second, third, *_ = sorted(folder.iterdir())
    cut_to(0)(first)
    cut_to(0)(second)
    web_page(third)
    with pytest.raises(UnreadableVolume, match=r"3 cannot be read \(2 empty, 1 web page\)"):
        read_mask(find_cases([folder])[0])


@pytest.mark.parametrize(
    "name", ["LICENSE", "README", "notes.txt", "report.pdf", "DICOMDIR.bak", "list.csv"]
)
def test_damaged_non_slice_is_ignored(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for n, ds in enumerate(slices(blobs((4, 20, 24)))):
        ds.save_as(folder / f"IM{n:06d}", enforce_file_format=True)
    (folder / name).write_bytes(
        b"" if name.endswith((".txt", ".csv")) else b"Permission is hereby granted\n" * 40
    )
    (case,) = find_cases([folder])
    assert read_mask(case).values.shape == (4, 20, 24) and case.whole


def test_damaged_slices_without_suffix(tmp_path: Path) -> None:
    """Files without a suffix are recognized by the pattern of their names."""
    folder = tmp_path / "s"
    folder.mkdir()
    for n, ds in enumerate(slices(blobs((4, 20, 24)))):
        ds.save_as(folder / f"IM{n:06d}", enforce_file_format=True)
    (folder / "IM000004").touch()
    with pytest.raises(UnreadableVolume, match="1 empty"):
        read_mask(find_cases([folder])[0])


def test_a_damaged_file_hides_no_mask(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = slices(blobs((4, 12, 14)).astype(np.uint16), Modality="CT")
    folder = tmp_path / "in"
    save(folder / "ct", series)
    segmentation(
        folder / "Doe_seg.dcm", series, (blobs((4, 12, 14), (0, 1))).astype(np.uint8), HEART
    )
    (folder / "Doe_torn.dcm").write_bytes(bytes(128) + b"DICM" + bytes(20))
    (folder / "Doe_empty.dcm").touch()
    assert synth(fake_model, tmp_path / "out", folder) == 1
    error = capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("seg-*.nii.gz"))) == 1
    assert "2 files of a folder cannot be read as DICOM" in error and "1 empty" in error
    assert not [word for word in PLANTED if word in error]


def test_damaged_file_elsewhere_hides_no_series(tmp_path: Path) -> None:
    save(tmp_path / "in" / "masks", slices(blobs((4, 20, 24))))
    (tmp_path / "in" / "other.dcm").write_bytes(bytes(128) + b"DICM" + bytes(20))
    series, damaged = find_cases([tmp_path / "in"])
    assert read_mask(series).values.shape == (4, 20, 24)
    with pytest.raises(UnreadableVolume, match="1 file cannot be read as DICOM"):
        read_mask(damaged)


def test_damaged_slice_in_separate_folder(tmp_path: Path) -> None:
    """A damaged slice refuses the series also where each slice has a folder of its own."""
    for n, ds in enumerate(slices(blobs((4, 20, 24)))):
        save(tmp_path / "in" / str(n), [ds])
    next((tmp_path / "in" / "3").iterdir()).write_bytes(b"")
    case = find_cases([tmp_path / "in"])[0]
    with pytest.raises(UnreadableVolume, match="1 empty"):
        read_mask(case)


def test_list_names_the_damaged_files(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "s", slices(blobs((6, 20, 24))))
    first, *_, last = sorted(folder.iterdir())
    cut_to(0)(first)
    cut_by(2)(last)
    run(
        main,
        [
            "synth",
            str(folder),
            "--model",
            str(fake_model),
            "--output",
            str(tmp_path / "out"),
            "--list",
        ],
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert len(lines) == 2
    assert any(first.name in line and "empty" in line for line in lines) and any(
        last.name in line and "cut short" in line for line in lines
    )


@pytest.mark.parametrize("size", range(1, 9))
def test_truncated_rtstruct_is_refused(size: int, tmp_path: Path) -> None:
    """pydicom reads what is there: a region would be missing without a word."""
    series = slices(np.zeros((4, 20, 24), np.uint16), Modality="CT")
    square = [
        np.array([[-10.0, 5, z], [0, 5, z], [0, 12, z], [-10, 12, z]]) for z in (40.0, 42.5, 45.0)
    ]
    save(tmp_path / "in" / "ct", series)
    path = structure_set(
        tmp_path / "in" / "rs.dcm", series, {"left ventricle": square, "left atrium": square}
    )
    content = path.read_bytes()
    start = content.index(
        b"\x06\x30\x39\x00"
    )  # ROIContourSequence: anywhere from here on a region is lost
    path.write_bytes(content[: start + (len(content) - start) * size // 9])
    cases = [case for case in find_cases([tmp_path / "in"]) if case.kind != "series"]
    assert cases
    with pytest.raises(UnreadableVolume):
        list(read_mask(cases[0]).pieces())  # type: ignore[union-attr]


def test_rtstruct_of_undefined_length_is_complete(tmp_path: Path) -> None:
    """Contours of undefined length are complete, with or without padding.

    Lengths may be left open and a file padded with zeros; cut, its last delimiter is missing.
    """
    import pydicom

    series = slices(np.zeros((4, 20, 24), np.uint16), Modality="CT")
    square = [np.array([[-10.0, 5, z], [0, 5, z], [0, 12, z], [-10, 12, z]]) for z in (40.0, 42.5)]
    save(tmp_path / "in" / "ct", series)
    path = structure_set(tmp_path / "in" / "rs.dcm", series, {"left ventricle": square})
    ds = pydicom.dcmread(path)
    for element in ds.iterall():
        if element.VR == "SQ":
            element.is_undefined_length = True
    ds.save_as(path)
    (case,) = (case for case in find_cases([tmp_path / "in"]) if case.kind == "rtstruct")
    whole = path.read_bytes()
    assert whole.endswith(b"\xfe\xff\xdd\xe0\0\0\0\0")
    path.write_bytes(whole + bytes(128))
    assert len(list(read_mask(case).pieces())) == 2  # type: ignore[union-attr]
    path.write_bytes(whole[:-40])
    with pytest.raises(UnreadableVolume):
        read_mask(case)


def test_truncated_compressed_slices_are_recognized(tmp_path: Path) -> None:
    """Compressed slices that were cut short are told from complete ones."""
    from pydicom.uid import RLELossless

    series = slices(blobs((4, 20, 24)))
    for ds in series:
        ds.compress(RLELossless, generate_instance_uid=False)
    folder = save(tmp_path / "s", series)
    (case,) = find_cases([folder])
    assert case.whole and read_mask(case).values.shape == (4, 20, 24)
    cut_by(8)(sorted(folder.iterdir())[0])
    (case,) = find_cases([folder])
    with pytest.raises(UnreadableVolume, match="1 cut short"):
        read_mask(case)


def test_doubly_compressed_slice_counts_once(tmp_path: Path) -> None:
    """A slice that is there in two compressions counts once."""
    from pydicom.uid import RLELossless

    values = blobs((4, 20, 24))
    series = slices(values)
    folder = save(tmp_path / "s", series)
    for ds in series:
        ds.compress(RLELossless, generate_instance_uid=False)
    save(folder, series, "again")
    volume = read_mask(find_cases([folder])[0])
    assert np.array_equal(volume.values, values)  # type: ignore[union-attr]


def test_series_warnings_reach_the_report(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = slices(blobs((6, 20, 24)))
    series[2].ImagePositionPatient[2] += 0.05
    save(tmp_path / "s", series[1:])
    report = tmp_path / "report.json"
    assert synth(fake_model, tmp_path / "out", tmp_path / "s", "--report", report) == 0
    (case,) = json.loads(report.read_text())["cases"]
    error = capsys.readouterr().err
    for words in (
        "may not be complete: its images are numbered from 2",
        "is uneven: slices lie up to",
    ):
        assert any(words in warning for warning in case["warnings"]) and words in error


def edited(ds: Dataset) -> None:
    ds.PixelData = bytes(ds.PixelData)[::-1]


@pytest.mark.parametrize(("change", "differ"), [(None, False), (edited, True)])
def test_two_segmentations_of_one_uid(
    change: Callable[[Dataset], None] | None, differ: bool, tmp_path: Path
) -> None:
    import pydicom

    series = slices(blobs((4, 12, 14)).astype(np.uint16), Modality="CT")
    path = segmentation(
        tmp_path / "in" / "a.dcm", series, (blobs((4, 12, 14), (0, 1))).astype(np.uint8), HEART
    )
    ds = pydicom.dcmread(path)
    ds.file_meta.ImplementationVersionName = "ANOTHER"
    if change is not None:
        change(ds)
    ds.save_as(tmp_path / "in" / "b.dcm")
    (case,) = find_cases([tmp_path / "in"])
    if not differ:
        assert case.files == (path,)
        return
    with pytest.raises(UnreadableVolume, match="2 files of one SOP Instance UID differ"):
        read_mask(case)


def test_rtstruct_names_missing_ct_images(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = slices(np.zeros((6, 20, 24), np.uint16), Modality="CT")
    square = np.array([[-10.0, 5, 45.0], [0, 5, 45.0], [0, 12, 45.0], [-10, 12, 45.0]])
    save(tmp_path / "in", series)
    structure_set(tmp_path / "in" / "rs.dcm", series, {"left ventricle": [square]})
    cut_to(0)(next((tmp_path / "in").glob("*_005.dcm")))
    assert synth(fake_model, tmp_path / "out", tmp_path / "in") == 1
    error = capsys.readouterr().err
    assert (
        "1 of the 6 images that it refers to is missing" in error
        and "cannot be read as DICOM (1 empty)" in error
    )
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_rtstruct_warns_of_uneven_ct(tmp_path: Path) -> None:
    """A structure set on a CT with uneven slices gives a warning or an error."""
    series = slices(np.zeros((6, 20, 24), np.uint16), Modality="CT")
    square = np.array([[-10.0, 5, 45.0], [0, 5, 45.0], [0, 12, 45.0], [-10, 12, 45.0]])
    series[4].ImagePositionPatient[2] += 0.04
    save(tmp_path / "in", series)
    structure_set(tmp_path / "in" / "rs.dcm", series, {"left ventricle": [square]})
    mask = read_mask(find_cases([tmp_path / "in"])[0])
    assert any(
        "the image series that rtstruct-" in note and "is uneven" in note for note in mask.notes
    )
    series[4].ImagePositionPatient[2] += 0.6
    save(tmp_path / "in", series)
    with pytest.raises(
        UnreadableVolume.__base__,
        match=r"the image series that rtstruct-\w+ was drawn on is uneven",
    ):  # type: ignore[arg-type]
        read_mask(find_cases([tmp_path / "in"])[0])


def test_links_and_odd_folders_are_reported(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "x.nii.gz").mkdir(parents=True)
    write_mask(folder / "a.nii.gz")
    save(tmp_path / "elsewhere", slices(blobs()))
    (folder / "Doe_link").symlink_to(tmp_path / "elsewhere")
    (folder / "Doe_dead").symlink_to(tmp_path / "nowhere")
    skipped: list[PassedOver] = []
    (case,) = find_cases([folder], skipped)
    assert case.name == "a"
    assert {(one.path.name, one.what) for one in skipped} == {
        ("x.nii.gz", "folder called like a volume"),
        ("Doe_link", "linked folder"),
        ("Doe_dead", "broken link"),
    }
    assert synth(fake_model, tmp_path / "out", folder) == 0
    error = capsys.readouterr().err
    assert (
        "1 linked folder not read" in error
        and "1 broken link not read" in error
        and "x.nii.gz" in error
        and "Doe" not in error
    )
    run(
        main,
        [
            "synth",
            str(folder),
            "--model",
            str(fake_model),
            "--output",
            str(tmp_path / "out"),
            "--list",
        ],
    )
    assert "Doe_link" in capsys.readouterr().err
    (folder / "a.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"holds no masks .*1 linked folder"):
        find_cases([folder])


def test_broken_link_fails_alone(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken link that is called like a volume fails, and the other masks do not."""
    (tmp_path / "in").mkdir()
    write_mask(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "b.nii.gz").symlink_to("nowhere.nii.gz")
    assert synth(fake_model, tmp_path / "out", tmp_path / "in") == 1
    assert "b.nii.gz does not exist" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["a_ct.nii.gz"]


@pytest.mark.parametrize("name", ["gone.nii.gz", "gone.dcm", "gone", "gone.xyz"])
def test_missing_input_file_is_named(
    name: str, tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says of a missing file that it does not exist."""
    assert synth(fake_model, tmp_path / "out", tmp_path / name) == 1
    error = capsys.readouterr().err
    assert f"{name} does not exist" in error and "format" not in error.splitlines()[0]


def test_many_failures_are_a_table(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_mask(tmp_path / "in" / "good.nii.gz")
    for n in range(12):
        write_mask(tmp_path / "in" / f"bad{n}.nii.gz", np.full((4, 8, 8), 1000 + n, np.uint16))
    for n in range(30):
        (tmp_path / "in" / f"torn{n}.nii.gz").write_bytes(b"\x1f\x8b")
    assert synth(fake_model, tmp_path / "short", tmp_path / "in") == 1
    short = capsys.readouterr().err
    assert synth(fake_model, tmp_path / "long", tmp_path / "in", "--verbose") == 1
    long = capsys.readouterr().err
    assert (
        long.count("error: ") == 42 and short.count("error: ") == 6 and len(short.splitlines()) < 45
    )
    table = short[short.index("42 cases failed") :].splitlines()[1:]
    assert (
        [line.split()[0] for line in table] == ["30", "12"]
        and "holds 1000" in table[1]
        and "torn" not in table[0]
    )
    assert sitk.ReadImage(str(tmp_path / "short" / "good_ct.nii.gz")).GetSize() == (24, 20, 6)


def test_superfluous_like_option_is_refused(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--like` is refused for a mask that has a grid."""
    like = write_mask(tmp_path / "like.nii.gz")
    series = slices(blobs((4, 12, 14)))
    masks = {
        "volume": write_mask(tmp_path / "mask.nii.gz"),
        "series": save(tmp_path / "series", series),
        "seg": segmentation(
            tmp_path / "seg.dcm", series, (blobs((4, 12, 14), (0, 1))).astype(np.uint8), HEART
        ),
    }
    for mask in masks.values():
        assert synth(fake_model, tmp_path / "out", mask, "--like", like) == 2
        error = capsys.readouterr().err
        assert "--like has no effect" in error and "resample" in error
    assert not (tmp_path / "out").exists()
