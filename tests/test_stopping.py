"""SIGTERM ends a service within seconds, whatever hangs in it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from nodes import ROOT, push, until, write_study
from samples import write_mask

# The engine hangs as a library does that waits for a network share: no signal ends its thread.
HANGS = """
import sys, threading
import runtime.core.stopping
from runtime.__main__ import main
from runtime.core.console import run
from runtime.engines.fake import FakeEngine

def infer(self, inputs, out):
    print("hanging", file=sys.stderr, flush=True)
    threading.Event().wait()

FakeEngine._infer = infer
runtime.core.stopping.GRACE = 1.0
sys.exit(run(main))
"""


class Hanging:
    """A command whose engine never answers, as a process."""

    def __init__(self, *words: object):
        line = [sys.executable, "-c", HANGS, *map(str, words), "--backend", "fake"]
        self.process = subprocess.Popen(
            line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def said(self, word: str) -> str:
        return next((line for line in [*self.lines] if word in line), "")

    def stop(self) -> tuple[int, float]:
        """The exit code, and the seconds from SIGTERM to the end."""
        until(lambda: self.said("hanging"), "the engine hangs")
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(20)
        finally:
            self.process.kill()
            self._reader.join(10)
        return code, time.monotonic() - started

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)


def test_hanging_watcher_ends(fake_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_mask(tmp_path / "in" / "case.nii.gz")
    hanging = Hanging(
        "watch",
        tmp_path / "in",
        "--model",
        fake_model,
        "--output",
        tmp_path / "out",
        "--stable",
        0,
        "--poll",
        0.01,
    )
    code, seconds = hanging.stop()
    assert code == 130 and 0.5 < seconds < 6 and hanging.said("does not end")


def test_hanging_node_ends(fake_model: Path, tmp_path: Path) -> None:
    hanging = Hanging(
        "serve",
        "--model",
        fake_model,
        "--spool",
        tmp_path / "spool",
        "--port",
        0,
        "--allow-any",
        "--keep",
        "--quiet-period",
        0.1,
    )
    line = until(lambda: hanging.said("listening"), "the node listens")
    assert push(int(line.split("dicom=")[1].split()[0]), write_study(tmp_path / "study")) == [0]
    code, seconds = hanging.stop()
    assert code == 0 and 0.5 < seconds < 8 and hanging.said("does not end")


GOES_ON = """
import os, signal, threading
import runtime.core.stopping
runtime.core.stopping.GRACE = 0.3
signal.signal(signal.SIGTERM, lambda *_: None)
threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
with runtime.core.stopping.command_line(), runtime.core.stopping.ends_when_told(3):
    os.kill(os.getpid(), signal.SIGTERM)
assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) == files
threading.Event().wait(0.9)  # three times as long as it would have
"""


def test_normal_exit_is_not_forced() -> None:
    """Also in a program of somebody else's, which goes on after the work within: no thread is left,
    nor a descriptor.

    In a process of its own: another test's thread may begin in this one at any time.
    """
    done = subprocess.run(
        [sys.executable, "-c", GOES_ON], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


EMBEDS = """
import os, signal, sys, threading
import runtime.core.stopping
from runtime.core.console import run
runtime.core.stopping.GRACE = 0.3
over = threading.Event()

def main(argv):
    threading.Thread(target=over.wait).start()  # the host's own, begun meanwhile
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait()
    except KeyboardInterrupt:
        over.wait(0.1)  # whoever listens for the signal has it by then
        raise

assert run(main, ["synth"]) == 130
over.wait(0.9)  # three times as long as a command line has
print("the host goes on")
over.set()
"""


def test_embedding_program_is_not_forced_out() -> None:
    """A program that calls a command in its own process keeps its threads and itself."""
    done = subprocess.run(
        [sys.executable, "-c", EMBEDS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "the host goes on\n"), done.stderr
