"""Files of strangers are opened only if they are files; half-written ones are swept only if they
are ours.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import listed, synth, write_mask

import runtime.core.atomic_files
from runtime.__main__ import main
from runtime.core.atomic_files import (
    MAX_TEXT,
    belongs_to,
    open_input,
    remove_orphans,
    temporary_name,
    write_text,
)
from runtime.core.console import run
from runtime.core.errors import OutputError, UnreadableVolume, UsageError
from runtime.io.case_finding import find_cases
from runtime.io.cases import PassedOver
from runtime.io.dicom.files import is_dicom
from runtime.io.marks import written_by_mask2ct
from runtime.io.volume_files import check_header

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and devices with names")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def link_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # 1 TiB without a block on the disk


SPECIAL = [make_pipe, make_socket, link_device]


@pytest.mark.parametrize("make", SPECIAL)
def test_special_files_are_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    make(path)
    with pytest.raises(OSError, match="a pipe, a socket or a device"):
        open_input(path)
    assert not is_dicom(path) and not written_by_mask2ct(path)


@pytest.mark.parametrize("option", ["--labels", "--rules"])
@pytest.mark.parametrize("make", [*SPECIAL, make_large])
def test_text_from_pipe_is_not_awaited(
    make: Callable[[Path], None], option: str, fake_model: Path, tmp_path: Path
) -> None:
    """Neither a pipe that nobody writes into nor a text without an end holds the command, or its
    memory.
    """
    make(tmp_path / "map.json")
    write_mask(tmp_path / "m.nii")
    more = (
        ["--model", f"a={fake_model}", "--model", f"b={fake_model}"]
        if option == "--rules"
        else ["--model", fake_model]
    )
    line = [
        "synth",
        tmp_path / "m.nii",
        *more,
        option,
        tmp_path / "map.json",
        "--backend",
        "fake",
        "--output",
        tmp_path / "out",
    ]
    with pytest.raises(
        UsageError, match=rf"a pipe, a socket or a device|more than {MAX_TEXT} bytes"
    ):
        main([str(word) for word in line])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", SPECIAL[:2])
def test_a_report_replaces_no_device(make: Callable[[Path], None], tmp_path: Path) -> None:
    """`--report /dev/null`, by root, must not take that device from everybody."""
    path = tmp_path / "report.json"
    make(path)
    before = os.lstat(path)
    with pytest.raises(
        OutputError,
        match=r"report\.json cannot be written: a pipe, a socket or a device has that name",
    ):
        write_text(path, "{}")
    assert os.path.samestat(os.lstat(path), before)
    assert listed(tmp_path) == {"report.json"}


def test_pipe_swapped_in_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the name and the opening somebody replaces the file."""
    path = tmp_path / "a.nii"
    path.write_bytes(b"1")
    really, states = os.stat, [os.stat(path)]
    path.unlink()
    make_pipe(path)
    monkeypatch.setattr(
        runtime.core.atomic_files.os,
        "stat",
        lambda *a, **k: states.pop() if states else really(*a, **k),
    )
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(OSError, match="a pipe"):
        open_input(path)
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_links_out_of_folder_are_skipped(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, secret = tmp_path / "in", write_mask(tmp_path / "secret.nii.gz")
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write_mask(folder / "a.nii.gz")
    (folder / "b.nii.gz").symlink_to("a.nii.gz")  # of the folder itself: it is in it
    (folder / "c.nii.gz").symlink_to(secret)
    (folder / "d.nii.gz").symlink_to("nowhere")
    (folder / "e.nii.gz").symlink_to("e.nii.gz")
    (folder / "sub" / "f").symlink_to("../../secret.nii.gz")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    make_pipe(folder / "sub" / "g")
    skipped: list[PassedOver] = []
    assert [case.name for case in find_cases([folder], skipped)] == [
        "a",
        "b",
        "d",
        "e",
    ]  # broken ones fail by name
    assert {one.path.name for one in skipped} == {"c.nii.gz", "f", "g", "linked"}
    assert synth(fake_model, tmp_path / "out", folder) == 1
    error = capsys.readouterr().err
    assert "d.nii.gz" in error and "e.nii.gz" in error and "1 linked folder not read" in error
    assert "3 pipe, device or outward links not read" in error


def test_named_link_is_followed(fake_model: Path, tmp_path: Path) -> None:
    """A link that is given by its name is followed.

    Who types it chooses it: the file, or the folder.
    """
    (tmp_path / "in").mkdir()
    write_mask(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "b.nii.gz").symlink_to("in/a.nii.gz")
    (tmp_path / "folder").symlink_to("in")
    assert synth(fake_model, tmp_path / "out", tmp_path / "b.nii.gz", tmp_path / "folder") == 0
    assert listed(tmp_path / "out") >= {"a_ct.nii.gz", "b_ct.nii.gz"}


def test_folder_of_links_is_named(
    tmp_path: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii.gz").symlink_to(write_mask(tmp_path / "a.nii.gz"))
    assert synth(fake_model, tmp_path / "out", tmp_path / "in") == 2
    assert "1 pipe, device or outward link" in capsys.readouterr().err


def test_voxels_behind_link_are_refused(tmp_path: Path) -> None:
    """A header in a folder names a file beside it, which leads to one that its sender could not
    read.
    """
    header = write_mask(tmp_path / "in.mhd").read_text()
    name = header.rpartition("ElementDataFile = ")[2].strip()
    (tmp_path / name).rename(tmp_path / "secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "in.mhd").write_text(header)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UnreadableVolume, match="keeps its voxels in"):
        check_header(folder / "in.mhd")
    (folder / name).unlink()
    os.link(tmp_path / "secret", folder / name)
    check_header(folder / "in.mhd")


@pytest.mark.parametrize("locked", [True, False])
def test_only_our_unfinished_files_are_swept(locked: bool, tmp_path: Path) -> None:
    names = [
        ".part-notes.txt",
        ".part-of-my-thesis",
        ".mask2ct-part-notes.txt",
        ".mask2ct-part-a-1-x.nii",
        ".part-host-123456-0a1b2c-x.nii",
    ]
    for name in names:
        (tmp_path / name).write_text("precious")
    mine = temporary_name(tmp_path / "x_ct.nii.gz")
    gone = mine.with_name(
        mine.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    )  # no system has such a process
    elsewhere = mine.with_name(".mask2ct-part-elsewhere-1-0a1b2c-y.nii")
    for path in (mine, gone, elsewhere):
        path.write_bytes(b"half")
    folder = gone.with_name(gone.name + ".d")
    (folder / "sub").mkdir(parents=True)
    remove_orphans(tmp_path, locked=locked)
    assert listed(tmp_path) == {*names} | (set() if locked else {mine.name, elsewhere.name})


def test_unfinished_links_are_removed_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("1")
    temporary_name(tmp_path / "x").symlink_to("precious")
    remove_orphans(tmp_path, locked=True)
    assert listed(tmp_path) == {"precious"} and (tmp_path / "precious" / "a").read_text() == "1"


def test_symlink_target_belongs_to_folder(tmp_path: Path) -> None:
    """A link belongs to a folder when its target exists and is a file in it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in-2").mkdir()
    for name in ("in/a", "in-2/b"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "in" / "c").symlink_to("../in-2/b")  # a sister's name begins with the folder's
    (tmp_path / "in" / "d").symlink_to("../in/a")
    (tmp_path / "in" / "e").symlink_to(".")
    assert [belongs_to(tmp_path / "in", tmp_path / "in" / name) for name in "acdez"] == [
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("where", ["result", "data set", "journal"])
def test_output_folder_links_are_refused(where: str, fake_model: Path, tmp_path: Path) -> None:
    """What they lead to keeps its bytes."""
    out, victim, mask = tmp_path / "out", tmp_path / "victim", write_mask(tmp_path / "a.nii.gz")
    out.mkdir()
    more = {"result": ("--format", "dicom"), "data set": ("--format", "nnunet"), "journal": ()}[
        where
    ]
    if where == "journal":
        victim.write_text("precious\n")
        (out / ".mask2ct.journal").symlink_to(victim)
        assert synth(fake_model, out, mask, *more) == 4 and victim.read_text() == "precious\n"
        victim.unlink()
        assert synth(fake_model, out, mask, *more) == 4 and not victim.exists()
        return
    victim.mkdir()
    (out / {"result": "a", "data set": "imagesTr"}[where]).symlink_to(victim)
    assert synth(fake_model, out, mask, *more) == 2 and not listed(victim)
    assert listed(out) <= {"a", "imagesTr"}


def test_journal_pipe_is_not_awaited(fake_model: Path, tmp_path: Path) -> None:
    """The command does not wait for a writer when the journal is a pipe."""
    (tmp_path / "out").mkdir()
    make_pipe(tmp_path / "out" / ".mask2ct.journal")
    assert synth(fake_model, tmp_path / "out", write_mask(tmp_path / "a.nii.gz")) == 4


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "audit.jsonl"])
def test_special_files_are_named(
    name: str,
    make: Callable[[Path], None],
    fake_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a model folder and of an audit file: neither waited for nor called missing."""
    import json

    stated = json.loads((fake_model / "manifest.json").read_text())
    stated["files"]["model.onnx"] = {
        "kind": "onnx",
        "precision": "fp32",
        "bytes": 1,
        "sha256": "0" * 64,
    }
    if name != "manifest.json":
        (tmp_path / "manifest.json").write_text(json.dumps(stated))
    make(tmp_path / name)
    line = ["audit", str(tmp_path / name)] if name == "audit.jsonl" else ["describe", str(tmp_path)]
    assert run(main, line) == 2
    assert (
        f"{name} cannot be read: it is a pipe, a socket or a device, not a file"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "command_line",
    [
        ["train/run.py", "--dataset-path", "DATA", "--output", "OUT", "--config"],
        [
            "-m",
            "runtime",
            "serve",
            "--model",
            "MODEL",
            "--spool",
            "SPOOL",
            "--keep",
            "--allow",
            "A",
            "--tls-ca",
            "CERT",
            "--tls-cert",
            "CERT",
            "--tls-key",
        ],
        ["-m", "runtime", "synth", "MASK", "--model", "MODEL", "--output", "OUT", "--labels"],
    ],
    ids=["config", "tls key", "labels"],
)
def test_pipes_given_as_options_are_refused(
    command_line: list[str], fake_model: Path, tmp_path: Path, command
) -> None:
    """Nobody writes into the pipe: a program that opened it would wait for ever."""
    pipe, certificate = tmp_path / "pipe", tmp_path / "certificate.pem"
    os.mkfifo(pipe)
    certificate.write_text("")
    places = {
        "MODEL": fake_model,
        "CERT": certificate,
        "MASK": write_mask(tmp_path / "mask.nii.gz"),
    }
    line = [
        places.get(word, tmp_path / word if word.isupper() and len(word) > 1 else word)
        for word in command_line
    ]
    done = command(*line, pipe, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "a pipe, a socket or a device" in done.stderr
