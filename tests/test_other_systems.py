"""Windows and macOS, as far as they can be simulated here: what they lack is taken away.

docs/reference/systems.md says what was simulated only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from samples import blobs, write_mask

from runtime.core import atomic_files

# Takes away what Windows lacks, before anything else is imported. Its locks are a file's own.
WINDOWS = """
import builtins, io, os, signal, sys, types
import highdicom, numpy, pydicom, SimpleITK  # their builds are for this system
import fcntl
msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_NBLCK = 2
def locking(handle, mode, count):
    assert mode == msvcrt.LK_NBLCK and os.lseek(handle, 0, os.SEEK_CUR) == 2**31 - 2
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
msvcrt.locking = locking
HIDDEN = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog")
for name in HIDDEN:
    sys.modules[name] = None
sys.modules["msvcrt"] = msvcrt
for name in (
    "O_CLOEXEC O_DIRECTORY O_DSYNC O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC chown chroot"
    " fchdir fchmod fchown fdatasync fork forkpty getegid geteuid getgid getgroups getloadavg"
    " getpgid getpgrp getpriority getresuid getsid getuid initgroups killpg lchown lockf mkfifo"
    " mknod nice pathconf pipe2 posix_fadvise posix_fallocate pread preadv pwrite pwritev"
    " register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid"
    " setpgid setpriority setsid setuid statvfs sync sysconf uname wait3 wait4 memfd_create"
).split():
    if hasattr(os, name):
        delattr(os, name)
for name in (
    "SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGTTIN"
    " SIGTTOU SIGUSR1 SIGUSR2 alarm getitimer setitimer pause pthread_kill pthread_sigmask"
    " sigpending sigtimedwait sigwait sigwaitinfo siginterrupt"
).split():
    if hasattr(signal, name):
        delattr(signal, name)
def no_kill(process, number):
    raise AssertionError("os.kill sends Ctrl-C on Windows")
os.kill = no_kill
real_open = io.open
def without_proc(path, *arguments, **options):
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(path)
    return real_open(path, *arguments, **options)
io.open = builtins.open = without_proc
import runtime.core.atomic_files
runtime.core.atomic_files.WINDOWS = True
"""
# macOS has no such call; its locks and signals are Linux's.
MACOS = """
import os
for name in (
    "sched_getaffinity sched_setaffinity posix_fadvise memfd_create O_DSYNC O_NOATIME pipe2"
    " getresuid"
).split():
    if hasattr(os, name):
        delattr(os, name)
"""
SYSTEMS = {"windows": WINDOWS, "macos": MACOS}
# Commands in one process, because each start takes as long as all of them.
RUN = """
import contextlib, io, json, sys
from runtime.__main__ import main
from runtime.core.console import run
answers = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        answers.append([run(main, words), out.getvalue()])
print(json.dumps(answers))
"""


def mask2ct(system: str, root: Path, commands: list[list[object]]) -> list[tuple[int, str]]:
    """Run commands on a system; the exit code and the standard output of each."""
    done = subprocess.run(
        [sys.executable, "-c", SYSTEMS.get(system, "") + RUN],
        input=json.dumps([[*map(str, words)] for words in commands]),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [(code, printed) for code, printed in json.loads(done.stdout)]
    assert "Traceback" not in done.stderr and {code for code, _ in answers} == {0}, done.stderr
    return answers


def results_of(folder: Path) -> dict[str, bytes]:
    """The files in a folder but for the journal and the audit file, which state times."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.suffix != ".jsonl"
    }


def test_commands_run_without_posix(root: Path, fake_model: Path, tmp_path: Path) -> None:
    """`describe`, `labels`, `synth` and `watch` end as here, with the same bytes; a run is resumed."""
    mask = write_mask(tmp_path / "m.nii.gz", blobs())
    printed, results = {}, {}
    for system in ("", *SYSTEMS):
        out, inbox = tmp_path / f"out {system}", tmp_path / f"in {system}"
        inbox.mkdir()
        shutil.copy(mask, inbox)
        model = ["--model", fake_model, "--backend", "fake"]
        plain = ["synth", mask, *model, "--variants", 2, "--output", out / "nifti"]
        dicom = ["synth", mask, *model, "--output", out / "dicom", "--format", "dicom"]
        watch = ["watch", inbox, *model, "--output", out / "watched", "--stable", 0, "--once"]
        answers = mask2ct(
            system,
            root,
            [
                ["describe", fake_model],
                ["labels", mask],
                ["labels", mask, "--json"],
                plain,
                [*plain, "--resume"],
                dicom,
                [*watch, "--poll", 0.01],
            ],
        )
        printed[system] = answers[:3]
        assert "2 done (2 of them before)" in answers[4][1]
        assert (inbox / "done" / "m.nii.gz").is_file()
        results[system] = results_of(out)
    assert {"nifti/m_v1_ct.nii.gz", "dicom/m/0001.dcm", "watched/m_ct.nii.gz"} <= {*results[""]}
    for system in SYSTEMS:
        assert printed[system] == printed[""] and results[system] == results[""]


def test_old_terminal_prints_escapes(root: Path, fake_model: Path, tmp_path: Path) -> None:
    """A console in cp1252 has no arrow, and no Greek."""
    mask = write_mask(tmp_path / "καρδιά.nii.gz", blobs())
    words = ["--model", fake_model, "--backend", "fake", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "synth", mask, *words],
        cwd=root,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"\\u2192" in done.stdout


def test_rename_waits_for_scanner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses a rename over a file that somebody reads; here for the first two times."""
    refusals, rename = iter([True, True, False]), os.replace

    def busy(old: Path, new: Path) -> None:
        if next(refusals):
            raise PermissionError(13, "used by another process")
        rename(old, new)

    monkeypatch.setattr(atomic_files, "WINDOWS", True)
    monkeypatch.setattr(atomic_files, "RENAME_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(atomic_files.os, "replace", busy)
    atomic_files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and next(refusals, None) is None


def test_lost_rename_is_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import OutputError

    def refuse(old: Path, new: Path) -> None:
        raise PermissionError(13, "used by another process")

    monkeypatch.setattr(atomic_files, "WINDOWS", True)
    monkeypatch.setattr(atomic_files, "RENAME_PAUSES", (0.0,))
    monkeypatch.setattr(atomic_files.os, "replace", refuse)
    with pytest.raises(OutputError):
        atomic_files.write_text(tmp_path / "a.txt", "text")
    assert [*tmp_path.iterdir()] == []


def test_no_posix_call_is_unguarded(root: Path) -> None:
    """A call that Windows lacks stands beside `hasattr`, `getattr` or an ImportError."""
    calls = re.compile(
        r"os\.(sched_getaffinity|geteuid|getuid|getgid|fork|killpg|setsid|statvfs|uname|O_DIRECTORY"
        r"|O_NOFOLLOW|O_NONBLOCK|sysconf|register_at_fork|mkfifo|pread|posix_\w+)\b"
        r"|signal\.(SIGHUP|SIGKILL|SIGUSR\d|SIGALRM|SIGCHLD|setitimer|pthread_\w+)"
        r"|import (fcntl|resource|pwd|grp|termios)\b"
    )
    guard = re.compile(r"hasattr|getattr|ImportError|WINDOWS|_getuid")
    for package in ("runtime", "train", "export", "tools"):
        for file in (root / package).rglob("*.py"):
            lines = file.read_text(encoding="utf-8").splitlines()
            for n, line in enumerate(lines):
                if calls.search(line):
                    near = "\n".join(lines[max(0, n - 8) : n + 8])
                    assert guard.search(near), f"{file.relative_to(root)}:{n + 1}: {line.strip()}"
