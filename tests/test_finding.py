"""What lies in a folder, a zip, or beside a file: found, named without naming a patient, asked
about where there is a choice.
"""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_masks import save, segmentation, slices, structure_set
from samples import blobs, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import UsageError
from runtime.core.labels import MM_WHS
from runtime.io import archive
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case, read_mask

HEART = [("left ventricle", "87878005"), ("left atrium", "82471001")]
PLANTED = ("Doe", "John", "Planted", "PLANTED", "4711", "19440102", "20190817")


def hospital(folder: Path, segs: int = 3) -> list:
    """A CT, SEGs drawn on it and a structure set, in nested folders whose names name the
    patient.
    """
    values = (blobs((4, 12, 14), (0, 1, 2)) % 3).astype(np.uint8)
    sources = slices(values.astype(np.uint16) * 100, Modality="CT", SeriesDescription="Planted^CT")
    save(folder / "Doe_John" / "CT", sources)
    for n in range(segs):
        segmentation(
            folder / "Doe_John" / "SEG" / f"Doe_{n}.dcm", sources, np.roll(values, n, axis=1), HEART
        )
    square = np.array([[-10.0, 5, 42.5], [0, 5, 42.5], [0, 12, 42.5], [-10, 12, 42.5]])
    structure_set(folder / "Doe_John" / "RT" / "Doe.dcm", sources, {"left ventricle": [square]})
    return sources


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


def test_folder_segs_and_rtstructs_are_cases(
    tmp_path: Path,
) -> None:
    """Every SEG and structure set of a folder is a case, and their CT is none."""
    hospital(tmp_path / "in")
    write_mask(tmp_path / "in" / "mine.nii.gz")
    cases = find_cases([tmp_path / "in"])
    assert sorted(case.kind for case in cases) == ["rtstruct", "seg", "seg", "seg", "volume"]
    assert len({case.name for case in cases}) == 5 and "mine" in {case.name for case in cases}
    assert all(len(case.grid) == (4 if case.kind == "rtstruct" else 0) for case in cases)
    assert not any(
        name
        in f"{case.name} {case.display_name} {case!r}".replace(repr(case.files), "").replace(
            repr(case.grid), ""
        )
        for case in cases
        if case.kind != "volume"
        for name in PLANTED
    )
    again = find_cases(
        [tmp_path / "in", *(case.files[0] for case in cases)]
    )  # a file that lies in the folder is not found twice
    assert [case.name for case in again] == [case.name for case in cases]


def test_zip_equals_its_folder(tmp_path: Path) -> None:
    """A zip is read as the folder in it would be."""
    hospital(tmp_path / "in")
    write_mask(tmp_path / "in" / "mine.nii.gz")
    write_mask(tmp_path / "in" / "detached.mhd")
    packed = {case.name: read_case(case, MM_WHS) for case in find_cases([zipped(tmp_path / "in")])}
    plain = {case.name: read_case(case, MM_WHS) for case in find_cases([tmp_path / "in"])}
    assert packed.keys() == plain.keys() and len(plain) == 6
    for name, mask in plain.items():
        assert (
            np.array_equal(mask.labels, packed[name].labels)
            and mask.geometry == packed[name].geometry
        )


def member(path: Path, *names: str, content: bytes = b"x", link: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.filename = name
            if link:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            made.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../evil.nii.gz",
        "/etc/evil.nii.gz",
        "a/../../evil.nii.gz",
        "..\\evil.nii.gz",
        "C:/evil.nii.gz",
    ],
)
def test_zip_path_traversal_is_refused(name: str, tmp_path: Path) -> None:
    """A zip whose names lead outside is refused."""
    with pytest.raises(UsageError, match="leads outside"):
        find_cases([member(tmp_path / "z.zip", "good.nii.gz", name)])


def test_zip_bomb_is_refused_before_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "ALWAYS", 1 << 20)
    with pytest.raises(
        UsageError, match=r"holds a file of 2\d{3} bytes that claims to become 2097152"
    ):
        find_cases([member(tmp_path / "z.zip", "a.nii.gz", "b.nii.gz", content=bytes(2 << 20))])


def test_zip_links_are_not_followed(tmp_path: Path) -> None:
    """A text that is called like a zip is refused."""
    with pytest.raises(UsageError, match="holds no masks"):
        find_cases([member(tmp_path / "z.zip", "a.nii.gz", content=b"/etc/passwd", link=True)])
    with pytest.raises(UsageError, match="holds no masks"):
        find_cases([member(tmp_path / "nameless.zip", "")])
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UsageError, match=r"text\.zip cannot be read"):
        find_cases([tmp_path / "text.zip"])


def test_two_image_series_need_choice(tmp_path: Path) -> None:
    """Of two image series one must be chosen."""
    first, second = slices(blobs(), SeriesNumber=4), slices(blobs((3, 20, 24)), SeriesNumber=5)
    save(tmp_path / "in" / "a", first)
    save(tmp_path / "in" / "b", second)
    with pytest.raises(
        UsageError,
        match=(
            r"2 image series, and each may be the mask.*series 4, 24 x 20 x 6.*series 5, 24 x"
            r" 20 x 3"
        ),
    ) as caught:
        find_cases([tmp_path / "in"])
    assert "--series" in caught.value.expected and "--list" in caught.value.remedy
    names = {case.number: case.name for case in find_cases([tmp_path / "in"], every=True)}
    for choice in ("5", second[0].SeriesInstanceUID, names["5"]):
        (case,) = find_cases([tmp_path / "in"], series=choice)
        assert read_mask(case).values.shape == (3, 20, 24)
    with pytest.raises(UsageError, match=r"no series in .* are called 6"):
        find_cases([tmp_path / "in"], series="6")


def test_list_maps_names_to_files(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`list` shows on the screen which file is which."""
    hospital(tmp_path / "in", segs=1)
    write_mask(tmp_path / "in" / "mine.nii.gz")
    assert (
        run(
            main,
            [
                "synth",
                str(tmp_path / "in"),
                "--model",
                str(fake_model),
                "--output",
                str(tmp_path / "out"),
                "--list",
            ],
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "out").exists()
    (seg,) = (line for line in lines if line.startswith("seg"))
    assert (
        "14 x 12 x" in seg and "Doe_0.dcm" in seg and "Planted series" in seg and "series 9" in seg
    )
    assert any("mine" in line and "24 x 20 x 6" in line for line in lines)
    assert any(
        line.startswith("series") and "4 files" in line and "Planted^CT" in line for line in lines
    )


def test_patient_data_reach_no_output(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of a patient reaches results, reports or messages."""
    sources = hospital(tmp_path / "in")
    segmentation(
        tmp_path / "in" / "Doe_John" / "SEG" / "Doe_unknown.dcm",
        sources,
        np.ones((4, 12, 14), np.uint8),
        [("liver", "10200004")],
    )
    (tmp_path / "in" / "Doe_John" / "Doe_John_torn.dcm").write_bytes(
        bytes(128) + b"DICM" + b"Doe^John^Planted" * 9
    )
    report = tmp_path / "report.json"
    code = run(
        main,
        [
            "synth",
            str(tmp_path / "in"),
            "--model",
            str(fake_model),
            "--backend",
            "fake",
            "--output",
            str(tmp_path / "out"),
            "--report",
            str(report),
        ],
    )
    said = capsys.readouterr()
    assert code == 1 and len(json.loads(report.read_text())["cases"]) == 6  # the torn file, too
    names = [str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")]
    everything = said.out + said.err + report.read_text() + " ".join(names)
    uids = [
        str(source[key].value)
        for source in sources
        for key in (
            "SOPInstanceUID",
            "SeriesInstanceUID",
            "StudyInstanceUID",
            "FrameOfReferenceUID",
        )
    ]
    assert not [planted for planted in (*PLANTED, *uids) if planted in everything]
    for path in (tmp_path / "out").glob("[!.]*"):  # the journal is hidden
        content = sitk.ReadImage(str(path))
        assert not any(
            name in content.GetMetaData(key)
            for key in content.GetMetaDataKeys()
            for name in PLANTED
        )


def test_dicom_without_pydicom_is_exit_3(root: Path, tmp_path: Path, fake_model: Path) -> None:
    """The message has the command that installs pydicom."""
    hospital(tmp_path / "in", segs=1)
    hide = (
        "import sys; sys.modules['pydicom'] = None\nfrom runtime.__main__ import main\nfrom"
        " runtime.core.console import run\nsys.exit(run(main))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            hide,
            "synth",
            tmp_path / "in",
            "--model",
            fake_model,
            "--backend",
            "fake",
            "--output",
            tmp_path / "o",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert 'pip install "mask2ct[dicom]"' in done.stderr and "Traceback" not in done.stderr
