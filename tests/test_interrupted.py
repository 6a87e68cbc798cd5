"""A run that is stopped, killed or runs out of disk leaves whole files only; `--resume` makes
the rest, bit for bit, and no more.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from samples import blobs, is_tidy, mask2ct, results, write_mask

from runtime.__main__ import main
from runtime.batch.completion_log import JOURNAL
from runtime.core.console import run
from runtime.core.stopping import GRACE

KILLS = 50
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, fake_model: Path
) -> Callable[..., multiprocessing.process.BaseProcess]:
    """Start `synth --resume` on the same twelve masks, two variants each, in a process forked
    from one that has imported everything.
    """
    folder = tmp_path_factory.mktemp("masks")
    for n in range(12):
        write_mask(folder / f"case{n}.nii.gz", blobs((16, 96, 96), seed=n), spacing=(1.0, 1.0, 2.0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["samples", "isal.igzip_threaded", "runtime.io.readers.volume"])

    def start(out: Path, *more: Path) -> multiprocessing.process.BaseProcess:
        arguments = [
            "synth",
            str(folder),
            *map(str, more),
            "--model",
            str(fake_model),
            "--backend",
            "fake",
            "--variants",
            "2",
            "--resume",
            "--quiet",
        ]
        process = context.Process(target=mask2ct, args=([*arguments, "--output", str(out)],))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def whole(start: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole")
    assert finish(start(out)) == 0
    made = results(out)
    assert len(made) == 12 * 2 * 2
    return made


def finish(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join()
    return process.exitcode


def is_part_of(out: Path, whole: dict[str, bytes]) -> bool:
    """Whether every file with a result's name is whole."""
    return all(
        whole[name] == data
        for name, data in results(out).items()
        if not Path(name).name.startswith(".")
    )


def complete(start: Callable, out: Path, whole: dict[str, bytes]) -> None:
    assert finish(start(out)) == 0
    assert results(out) == whole  # with names beginning with a dot: nothing half-written is left


def stopped(
    start: Callable, out: Path, send: Callable, when: random.Random, *, begun: bool = False
) -> int | None:
    """The exit code of a run that was sent a signal at some moment, `begun`: of its work, or
    None when it was done before.
    """
    process = start(out)
    while begun and process.is_alive() and not (out / JOURNAL).exists():
        process.join(0.001)
    process.join(when.uniform(0.0, 0.8))
    if not process.is_alive():
        assert finish(process) == 0
        return None
    send(process)
    return finish(process) or None  # 0: it was done before the signal came


def test_fifty_kills_then_same_dataset(
    start: Callable, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """After fifty kills at random moments the data set is that of an uninterrupted run."""
    when, kills, halfway, out = random.Random(0), 0, 0, tmp_path / "out"
    while kills < KILLS:
        code = stopped(start, out, lambda process: process.kill(), when)
        if code is None:
            assert results(out) == whole
            shutil.rmtree(out)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        halfway += bool(results(out)) and len(results(out)) < len(whole)
        assert is_part_of(out, whole)
    complete(start, out, whole)
    assert halfway >= 10  # or the moments were not in the run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_exits_130(
    number: signal.Signals, start: Callable, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A stopped run leaves nothing half-written."""
    when, stops, out = random.Random(1), 0, tmp_path / "out"
    while stops < 6:
        code = stopped(start, out, lambda process: os.kill(process.pid, number), when, begun=True)
        if code is not None:
            assert code == 130 and is_part_of(out, whole)
            assert not [name for name in results(out) if Path(name).name.startswith(".")]
            stops += 1
        (
            shutil.rmtree(
                out
                # every other one goes on from where it was stopped
            )
            if code is None or stops % 2
            else None
        )
    complete(start, out, whole)


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True
    ).returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_full_disk_then_resume(start: Callable, whole: dict[str, bytes], tmp_path: Path) -> None:
    """After a full disk the finished results stay, and the rest follows."""
    half = sum(map(len, whole.values())) // 2048
    with disk(tmp_path / "disk", f"size={half}k") as mounted:
        assert finish(start(mounted / "out")) == 4
        assert results(mounted / "out") and is_part_of(mounted / "out", whole)
        assert not [name for name in results(mounted / "out") if Path(name).name.startswith(".")]
        subprocess.run(["mount", "-o", "remount,size=64m", mounted], check=True)
        complete(start, mounted / "out", whole)


def test_read_only_disk_exits_4(start: Callable, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The run goes on when the disk can be written again."""
    with disk(tmp_path / "disk", "size=64m") as mounted:
        when = random.Random(2)
        while stopped(start, mounted / "out", lambda process: process.kill(), when) is None:
            shutil.rmtree(mounted / "out")
        subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        assert finish(start(mounted / "out")) == 4
        subprocess.run(["mount", "-o", "remount,rw", mounted], check=True)
        complete(start, mounted / "out", whole)


def test_unreadable_input_is_named(
    start: Callable, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """An input that cannot be read is named and stops no other."""
    loop = tmp_path / "loop.nii.gz"
    loop.symlink_to(loop)
    assert finish(start(tmp_path / "out", loop)) == 1
    assert results(tmp_path / "out") == whole


# Ctrl-C as soon as the script begins to import numpy: nobody waits for a command to be ready before
# giving up on it.
IMPORTING = """
import os, runpy, signal, sys
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
sys.argv = sys.argv[1:]
if sys.argv[0] == "runtime":  # python -m runtime
    runpy.run_module("runtime", run_name="__main__")
elif sys.argv[0] == "mask2ct":  # what pip makes of it
    from runtime.__main__ import entry
    sys.exit(entry())
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train/run.py", "export/build_engine.py", "runtime", "mask2ct"])
def test_ctrl_c_during_imports(script: str, root: Path) -> None:
    """Ctrl-C during the imports gives no traceback."""
    words = ["synth", "--help"] if script in ("runtime", "mask2ct") else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, script, *words],
        cwd=root,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    if script in ("runtime", "mask2ct"):  # it has taken over already, and says so
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    else:
        assert done.returncode == -signal.SIGINT and done.stdout == done.stderr == ""


STUCK = """
import ctypes, sys
from runtime.__main__ import main
from runtime.core.console import run

def wait_for_ever(*_):
    "As a library does that holds out against a file server that went away: no signal handler of Python's comes to its turn."
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    print("stuck", flush=True)
    lock(mutex)
    lock(mutex)

import runtime.batch.runner, runtime.service.watch_folder
setattr({where}, wait_for_ever)
sys.exit(run(main))
"""


@pytest.mark.parametrize(
    "where", ["runtime.batch.runner, 'read_case'", "runtime.service.watch_folder, 'check_header'"]
)
def test_sigterm_ends_a_stuck_reader(where: str, fake_model: Path, tmp_path: Path) -> None:
    """In the thread that reads ahead, and in the main one. The next start goes on with the mask."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    write_mask(inbox / "a.nii.gz")
    line = [
        "watch",
        inbox,
        "--model",
        fake_model,
        "--backend",
        "fake",
        "--output",
        out,
        "--stable",
        0,
        "--poll",
        0.01,
        "--once",
    ]
    arguments = [*map(str, line)]
    with subprocess.Popen(
        [sys.executable, "-c", STUCK.format(where=where), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        next(row for row in process.stdout if row == "stuck\n")
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(GRACE + 10) == 130
        finally:
            process.kill()
    assert run(main, arguments) == 0
    assert [*results(out)] == ["a_ct.nii.gz"] and is_tidy(inbox)


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_sigterm_of_forked_child(tmp_path: Path, command) -> None:
    """A process that a command forks, as Ray's and PyTorch's do, ends without ending the
    command.
    """
    forking = """
import os, signal, sys, time
from runtime.core import console, stopping
stopping.GRACE = 0.2

def main(argv):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    _, status = os.waitpid(child, 0)
    time.sleep(0.6)  # three times as long as it would have
    print(os.waitstatus_to_exitcode(status))
    return 0

sys.exit(console.run(main, []))
"""
    done = command("-c", forking, timeout=60)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
