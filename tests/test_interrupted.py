"""A run that is stopped or killed leaves whole files only, and the next one makes the rest, bit for bit."""

from __future__ import annotations

import gzip
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from samples import blobs, write_mask

# Prints each case as soon as it is on disk, so that the test knows where the run is without waiting.
CHILD = """
import sys
from runtime.console import run
from runtime.synthesizer import Synthesizer
def main(argv):
    with Synthesizer.open(sys.argv[1], backend="fake") as synth:
        for result in synth.stream(sys.argv[3:], sys.argv[2]):
            print(result.case, flush=True)
    return 0
sys.exit(run(main, []))
"""


def start(root: Path, model: Path, out: Path, masks: list[Path]) -> subprocess.Popen[str]:
    """In a terminal's place: whoever starts the tests in the background has Ctrl-C ignored, and children inherit that."""
    command = [sys.executable, "-c", CHILD, model, out, *masks]
    return subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def complete(root: Path, model: Path, out: Path, masks: list[Path]) -> None:
    with start(root, model, out, masks) as child:
        _, error = child.communicate()
    assert child.returncode == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_what_has_its_final_name_is_whole_and_a_second_run_completes_the_set(
    how: signal.Signals, after: int, root: Path, tmp_path: Path, fake_model: Path
) -> None:
    masks = [write_mask(tmp_path / f"case{n}.nii.gz", blobs((40, 160, 160), seed=n), spacing=(1.0, 1.0, 2.0)) for n in range(12)]
    whole, out = tmp_path / "whole", tmp_path / "out"
    complete(root, fake_model, whole, masks)
    with start(root, fake_model, out, masks) as child:
        assert child.stdout is not None
        for _ in range(after):
            child.stdout.readline()
        child.send_signal(how)
        _, error = child.communicate()
    assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in error
    done = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    assert after <= len(done) < 12
    for name in done:
        assert gzip.decompress((out / name).read_bytes()) == gzip.decompress((whole / name).read_bytes())
    if how == signal.SIGINT:
        assert not [p for p in out.iterdir() if p.name.startswith(".")]  # nothing half-written is left behind
    complete(root, fake_model, out, masks)
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


# Ctrl-C as soon as the script begins to import numpy: nobody waits for a command to be ready before giving up on it.
IMPORTING = """
import os, runpy, signal, sys
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train/run.py", "export/build_engine.py"])
def test_ctrl_c_during_the_imports_is_no_traceback(script: str, root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING, script, "--help"], cwd=root, capture_output=True, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert done.returncode == -signal.SIGINT and done.stdout == done.stderr == ""
