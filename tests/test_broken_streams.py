"""Streams that are closed or full, journals that were written by nobody, files that cannot be
read: one screen each.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from samples import results, synth, write_fake_model, write_mask

from runtime.batch.completion_log import JOURNAL, line_of
from runtime.core.atomic_files import sha256_of
from runtime.engines.fake import fake_manifest

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`line` with "$@" as mask2ct and its arguments."""
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", line, "x", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def synthesis(model: Path, mask: Path, out: Path) -> list[object]:
    return ["synth", mask, "--model", model, "--backend", "fake", "--output", out]


@posix
@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_change_no_result(closed: str, fake_model: Path, tmp_path: Path) -> None:
    """Nor does a file get the number of a stream that is closed, and what is written to that
    one.
    """
    mask = write_mask(tmp_path / "case.nii.gz")
    assert synth(fake_model, tmp_path / "expected", mask) == 0
    done = shell(f'"$@" {closed}', *synthesis(fake_model, mask, tmp_path / "out"))
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert results(tmp_path / "out") == results(tmp_path / "expected")


@posix
@pytest.mark.parametrize("arguments", [["describe", "MODEL"], ["--version"], ["synth", "--help"]])
def test_full_disk_behind_stdout_is_reported(arguments: list[str], fake_model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = shell(
        '"$@" > /dev/full', *[fake_model if word == "MODEL" else word for word in arguments]
    )
    assert done.returncode == 4 and done.stderr.startswith(
        "error: the system refused: No space left"
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@posix
def test_a_full_disk_behind_both_streams(fake_model: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = shell('"$@" > /dev/full 2>&1', "describe", tmp_path / "absent")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.fixture(params=["a reader that left", "a full disk"])
def nowhere(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor that takes nothing."""
    if request.param == "a full disk":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    yield descriptor
    os.close(descriptor)


def saying(stream: str, descriptor: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command with `stream` ("stdout", "stderr") led to `descriptor`."""
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    streams: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        stream: descriptor,
    }
    return subprocess.run(command, cwd=ROOT, text=True, check=False, timeout=120, **streams)


@posix
def test_unread_messages_stop_no_work(nowhere: int, fake_model: Path, tmp_path: Path) -> None:
    """They are not the output: a log that has no room, or no reader, is no reason to end with
    masks left.
    """
    mask = write_mask(tmp_path / "case.nii.gz")
    assert synth(fake_model, tmp_path / "expected", mask) == 0
    done = saying("stderr", nowhere, *synthesis(fake_model, mask, tmp_path / "out"))
    assert done.returncode == 0 and done.stdout.startswith("1 done, 0 failed")
    assert results(tmp_path / "out") == results(tmp_path / "expected")


@posix
def test_an_unread_error_keeps_its_code(nowhere: int, fake_model: Path, tmp_path: Path) -> None:
    assert saying("stderr", nowhere, "describe", tmp_path / "absent").returncode == 2
    absent = synthesis(fake_model, tmp_path / "absent.nii", tmp_path / "out")
    assert saying("stderr", nowhere, *absent).returncode == 1


@posix
def test_unread_summary_keeps_exit_code(fake_model: Path, tmp_path: Path) -> None:
    reader, nowhere = os.pipe()
    os.close(reader)
    try:
        absent = synthesis(fake_model, tmp_path / "absent.nii", tmp_path / "out")
        done = saying("stdout", nowhere, *absent)
        assert (
            done.returncode == 1
            and "does not exist" in done.stderr
            and "Exception ignored" not in done.stderr
        )
        assert saying("stdout", nowhere, "describe", fake_model).returncode == 0
    finally:
        os.close(nowhere)


@posix
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_watch_continues_with_unread_output(
    stream: str, nowhere: int, fake_model: Path, tmp_path: Path
) -> None:
    (inbox := tmp_path / "inbox").mkdir()
    for name in ("a", "b", "c"):
        write_mask(inbox / f"{name}.nii.gz")
    done = saying(
        stream,
        nowhere,
        "watch",
        inbox,
        "--model",
        fake_model,
        "--backend",
        "fake",
        "--output",
        tmp_path / "out",
        "--once",
        "--stable",
        0,
        "--poll",
        0.05,
    )
    assert sorted(path.name for path in (inbox / "done").iterdir()) == [
        "a.nii.gz",
        "b.nii.gz",
        "c.nii.gz",
    ]
    assert len(results(tmp_path / "out")) == 3
    # as of every command: the lines on standard output are asked for, and a full disk behind them
    # is told
    assert done.returncode == (
        4 if stream == "stdout" and stat.S_ISCHR(os.fstat(nowhere).st_mode) else 0
    )


def lines(*facts: dict[str, Any]) -> bytes:
    return b"".join(map(line_of, facts))


JOURNALS: dict[str, Any] = {
    "files that are a list": lambda f: lines({**f, "files": ["a"]}),
    "files that are none": lambda f: lines({**f, "files": None}),
    "no file": lambda f: lines({**f, "files": {}}),
    "a number for a digest": lambda f: lines({**f, "files": {"case_ct.nii.gz": 5}}),
    "a result that is a list": lambda f: lines({**f, "result": ["a"]}),
    "a key that is a list": lambda f: lines({**f, "key": ["a"]}),
    "slices that are a word": lambda f: lines({**f, "slices": "x"}),
    "warnings that are numbers": lambda f: lines({**f, "warnings": [1, None]}),
    "a file elsewhere": lambda f: lines(
        {**f, "files": {"/etc/hostname": sha256_of(Path("/etc/hostname"))}}
    ),
    "a file above": lambda f: lines({**f, "files": {"../case.nii.gz": "0" * 64}}),
    "lists in lists": lambda f: b"%08x %s\n" % (zlib.crc32(b"[" * 100_000), b"[" * 100_000),
}


@pytest.mark.parametrize("name", JOURNALS)
def test_journal_line_of_other_form(name: str, fake_model: Path, tmp_path: Path) -> None:
    """A journal line of another form does not prove that a result is complete.

    Its checksum is right: anybody can count one.
    """
    mask, out = write_mask(tmp_path / "case.nii.gz"), tmp_path / "out"
    assert synth(fake_model, out, mask) == 0
    expected = results(out)
    fact = json.loads((out / JOURNAL).read_bytes().split(b" ", 1)[1])
    (out / JOURNAL).write_bytes(JOURNALS[name](fact))
    (out / "case_ct.nii.gz").unlink()
    assert synth(fake_model, out, mask, "--resume") == 0
    assert results(out) == expected


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_fake_model(tmp_path / "model", fake_manifest())
    (model / "manifest.json").chmod(0)
    assert synth(model, tmp_path / "out", write_mask(tmp_path / "m.nii.gz")) == 2
    assert "permission denied" in capsys.readouterr().err


def test_unreadable_result_is_exit_4(
    fake_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result whose digest cannot be computed leaves nothing behind.

    The disk fails while a result is digested, as `read` would say it.
    """
    from runtime.core.atomic_files import HashingWriter

    def fail(self: HashingWriter) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(HashingWriter, "finish", fail)
    assert synth(fake_model, tmp_path / "out", write_mask(tmp_path / "m.nii.gz")) == 4
    assert not results(tmp_path / "out")
