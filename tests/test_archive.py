"""What a zip may claim: bounded before it is read, unpacked to disk, nothing left behind."""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from samples import blobs, listed, write_mask

from runtime.core.errors import UnreadableVolume, UsageError
from runtime.core.labels import MM_WHS
from runtime.io import archive
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case

REFUSING = """
import sys
from pathlib import Path
from runtime.core.errors import UsageError
from runtime.io.case_finding import find_cases

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
try:
    find_cases([Path(sys.argv[1])])
except UsageError as exc:
    print(peak() - before, exc.fact)
"""


def pack(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(name.replace("_", "."), content)
    return path


def repeat_directory(path: Path, times: int) -> Path:
    """Let the list of members name the first one `times` times."""
    whole = path.read_bytes()
    end = whole.rindex(b"PK\5\6")
    size, offset = struct.unpack_from("<2L", whole, end + 12)
    directory = whole[offset : offset + size] * times
    tail = bytearray(whole[end:])
    struct.pack_into("<2H2L", tail, 8, times % 65535, times % 65535, len(directory), offset)
    path.write_bytes(whole[:offset] + directory + tail)
    return path


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """As in zips that unpack to themselves, or to petabytes: many entries for the same bytes."""
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for n in range(3):
            zipped.writestr(f"{n}.nii", bytes(5000))
        zipped.filelist[1].header_offset = zipped.filelist[0].header_offset + 1
    with pytest.raises(UsageError, match=r"z\.zip holds files that overlap each other"):
        find_cases([tmp_path / "z.zip"])


def test_equal_names_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as zipped:
        zipped.writestr("a.nii", b"1")
        zipped.writestr("b.nii", b"2")
        zipped.filelist[1].filename = "a.nii"
    with pytest.raises(UsageError, match="two files of one name"):
        find_cases([tmp_path / "z.zip"])


def test_folders_within_folders_are_bounded(tmp_path: Path) -> None:
    """A name of 18 kB costs the square of its folders for each file of that zip."""
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("d/" * (archive.MAX_DEPTH - 1) + "a.nii", b"1")
    assert len(archive.members(path)) == 1
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("d/" * 9000 + "b.nii", b"2")
    with pytest.raises(UsageError, match=r"z\.zip holds a file in too many folders"):
        find_cases([path])


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(method: int, tmp_path: Path) -> None:
    """45 bytes of bzip2 become 45 MB at once, whatever is asked of it."""
    with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as zipped:
        zipped.writestr("a.nii", bytes(1 << 20))
    with pytest.raises(UsageError, match="another method than deflate"):
        find_cases([tmp_path / "z.zip"])


def test_endless_directory_is_refused_unread(tmp_path: Path) -> None:
    path = repeat_directory(pack(tmp_path / "z.zip", a_nii=b"1"), 300_000)
    with pytest.raises(
        UsageError, match=f"list of members is longer than {archive.MAX_DIRECTORY} bytes"
    ):
        find_cases([path])


def test_nested_zips_stay_packed(tmp_path: Path) -> None:
    inner = pack(tmp_path / "inner.zip", a_nii=bytes(1000))
    outer = pack(tmp_path / "outer.zip", inner_zip=inner.read_bytes())
    with pytest.raises(UsageError, match="holds no masks"):
        find_cases([outer])


def test_member_beyond_free_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is its case's failure: no other mask waits for a disk that a zip would have filled."""
    mask = write_mask(tmp_path / "a.nii").read_bytes()
    path = pack(tmp_path / "z.zip", a_nii=mask)
    monkeypatch.setattr(archive, "RESERVE", 1 << 60)
    (case,) = find_cases([path])
    with pytest.raises(UnreadableVolume, match="for temporary files"):
        read_case(case, MM_WHS)


def test_large_zip_members_unpack_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large members are unpacked to the disk and removed afterwards."""
    monkeypatch.setattr(archive, "HELD", 100)
    mask = write_mask(tmp_path / "a.nii", blobs(seed=3))
    (case,) = find_cases([pack(tmp_path / "z.zip", a_nii=mask.read_bytes())])
    with archive.opened(case.files[0]) as handle:
        assert handle.read() == mask.read_bytes()
        assert not isinstance(getattr(handle, "raw", None), zipfile.ZipExtFile)
        handle.seek(348)  # readers go back and forth
        assert handle.read(4) == mask.read_bytes()[348:352]
    (plain,) = find_cases([mask])
    assert np.array_equal(read_case(case, MM_WHS).labels, read_case(plain, MM_WHS).labels)
    private = archive.private_folder()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert listed(private) == {".mask2ct.lock"}


def test_zip_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "z.zip", a_nii=write_mask(tmp_path / "a.nii", blobs(seed=1)).read_bytes()
    )
    find_cases([path])
    pack(path, b_nii=write_mask(tmp_path / "b.nii", blobs(seed=2)).read_bytes())
    (case,) = find_cases([path])
    assert case.name == "b" and read_case(case, MM_WHS).labels.any()


KILLED = """
import os, signal, sys
from pathlib import Path
from runtime.io import archive
with archive.on_disk(Path(sys.argv[1])) as path:
    assert path.stat().st_size
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_runs_zip_copies_are_swept(fake_model: Path, tmp_path: Path, command) -> None:
    """The next run sweeps the unpacked copies of a killed run.

    Those of a run that is alive and what others call alike stay.
    """
    temporary = tmp_path / "tmp"
    (temporary / "mask2ct-copies-mine").mkdir(parents=True)
    (temporary / "mask2ct-copies-mine" / "notes.txt").write_text("precious")
    mask = write_mask(tmp_path / "a.nii")
    zipped, environment = (
        pack(tmp_path / "z.zip", a_nii=mask.read_bytes()),
        {"TMPDIR": str(temporary)},
    )
    assert command("-c", KILLED, zipped / "a.nii", env=environment).returncode == -signal.SIGKILL
    (left,) = listed(temporary) - {"mask2ct-copies-mine"}
    assert [*(temporary / left).rglob("a.nii")]
    line = [
        "-m",
        "runtime",
        "synth",
        mask,
        "--model",
        fake_model,
        "--backend",
        "fake",
        "--output",
        tmp_path / "out",
        "--quiet",
    ]
    assert command(*line, env=environment).returncode == 0
    assert listed(temporary) == {"mask2ct-copies-mine"}
    assert (temporary / "mask2ct-copies-mine" / "notes.txt").read_text() == "precious"


def test_copies_of_a_living_run_stay(tmp_path: Path, command) -> None:
    environment = {"TMPDIR": str(tmp_path)}
    holding = (
        "from runtime.core.workspace import private_folder; print(private_folder(), flush=True);"
        " input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as living:
        assert living.stdout is not None
        folder = Path(living.stdout.readline().strip())
        command(
            "-c",
            "from runtime.core.workspace import remove_abandoned; remove_abandoned()",
            env=environment,
        )
        assert folder.is_dir()
        living.communicate("\n")
    assert not folder.exists()


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="where Linux states the peak of memory"
)
def test_refusals_of_bombs_take_little_memory(tmp_path: Path, command) -> None:
    """At most 200 MB over what the process has when it is idle: a long directory, and a member
    that claims 3.9 GB.
    """
    many = repeat_directory(pack(tmp_path / "many.zip", a_nii=b"1"), 240_000)
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a.nii", bytes(1 << 20))
        zipped.filelist[0].file_size = 3900 << 20
    for path in (many, tmp_path / "large.zip"):
        done = command("-c", REFUSING, path)
        kilobytes, _, fact = done.stdout.partition(" ")
        assert done.returncode == 0 and int(kilobytes) < 200_000, done.stdout + done.stderr
        assert "240000 files" in fact or "claims to become" in fact
