"""A mask whose synthesis ends the whole process, as for want of memory: it stops no other, and
after some starts it is put aside.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from dicom_masks import segmentation, slices
from nodes import Serving, push, until, write_study
from samples import is_tidy, listed, write_mask

from runtime.service.attempts import MAX_ATTEMPTS, attempts, count_attempt, reset_attempts
from runtime.service.study_spool import ATTEMPTS
from runtime.service.work_queue import DONE, FAILED, WORK

POISON = 850  # of MM-WHS, index 7: what holds it cannot be synthesized
KILLED = f"""
import os, signal, sys
from runtime.__main__ import main
from runtime.core.console import run
from runtime.engines.fake import FakeEngine

def infer(self, inputs, out, really=FakeEngine._infer):
    if (inputs["labels"] == 7).any():
        os.kill(os.getpid(), signal.{signal.SIGKILL.name})
    really(self, inputs, out)

FakeEngine._infer = infer
sys.exit(run(main, sys.argv[1:]))
"""


def block(value: int) -> np.ndarray:
    values = np.zeros((6, 16, 16), np.uint16)
    values[1:5, 4:12, 4:12] = value
    return values


def test_watch_poison_mask_ends_in_failed(fake_model: Path, tmp_path: Path, command) -> None:
    """A mask that kills the watcher ends in failed/ after the other masks are done."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    inbox.mkdir()
    for n, value in enumerate((500, POISON, 550, 600)):
        write_mask(inbox / f"{n}.nii.gz", block(value))
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
    codes = [command("-c", KILLED, *line).returncode for _ in range(3)]
    assert codes == [-signal.SIGKILL] * 3 and listed(inbox / DONE) == {
        "0.nii.gz",
        "2.nii.gz",
        "3.nii.gz",
    }
    assert (
        attempts(next((inbox / WORK).glob(f"*/{ATTEMPTS}"))) == 2
    )  # the first time it was in work with the others: nobody's fault is known
    write_mask(inbox / "4.nii.gz", block(420))
    assert command("-c", KILLED, *line).returncode == -signal.SIGKILL and "4.nii.gz" in listed(
        inbox / DONE
    )
    for _ in range(MAX_ATTEMPTS - 3):
        assert command("-c", KILLED, *line).returncode == -signal.SIGKILL
    last = command("-c", KILLED, *line)
    assert (
        last.returncode == 1
        and f"each of the last {MAX_ATTEMPTS} starts" in last.stderr
        and "1.nii.gz" in last.stderr
    )
    assert listed(inbox / FAILED) == {"1.nii.gz", "1.nii.gz.reason.txt"} and is_tidy(inbox)
    assert "out of memory" in (inbox / FAILED / "1.nii.gz.reason.txt").read_text()
    assert listed(out) >= {f"{n}_ct.nii.gz" for n in (0, 2, 3, 4)} and "1_ct.nii.gz" not in listed(
        out
    )
    os.rename(inbox / FAILED / "1.nii.gz", inbox / "1.nii.gz")  # with more memory, say
    assert command("-m", "runtime", *line).returncode == 0 and (out / "1_ct.nii.gz").is_file()


@pytest.mark.slow
def test_node_poison_study_ends_in_failed(fake_model: Path, tmp_path: Path) -> None:
    """A study that kills the node ends in failed/ after the others are synthesized."""
    spool = tmp_path / "spool"
    uids = (f"1.2.826.{n}" for n in range(1 << 20))
    first = next(
        uid for uid in uids if hashlib.sha256(uid.encode()).hexdigest().startswith("000")
    )  # of those that wait
    sources = slices(np.zeros((6, 16, 16), np.int16), Modality="CT", StudyInstanceUID=first)
    poison = segmentation(
        tmp_path / "p.dcm",
        sources,
        (block(1) > 0).astype(np.uint8),
        [("pulmonary artery", "81040000")],
    )
    with Serving(fake_model, spool, "--keep", quiet=3600) as node:
        assert (
            push(node.port, poison, *(write_study(tmp_path / str(n), n) for n in range(3)))
            == [0] * 4
        )
        node.stop(signal.SIGKILL)
    for n in range(1, MAX_ATTEMPTS + 1):
        with serving(fake_model, spool) as child:
            assert child.wait(60) == -signal.SIGKILL
        assert [attempts(path / ATTEMPTS) for path in spool.glob("studies/*")] == [n] and len(
            listed(spool / "done")
        ) == (3 if n > 1 else 0)
    with serving(fake_model, spool) as child:
        until(lambda: listed(spool / "failed"), "it is put aside")
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    (failed,) = (spool / "failed").iterdir()
    assert f"each of the last {MAX_ATTEMPTS} starts" in (
        failed / "reason.txt"
    ).read_text() and listed(failed) == {
        "objects",
        "results",
        "reason.txt",
        ATTEMPTS,  # or it would be tried again when more of its study arrives
    }
    assert not listed(spool / "studies") and not listed(spool / "outbox")


@contextmanager
def serving(model: Path, spool: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`mask2ct serve` whose process ends when it synthesizes what is poisonous."""
    line = [
        "serve",
        "--model",
        model,
        "--backend",
        "fake",
        "--spool",
        spool,
        "--port",
        0,
        "--allow-any",
        "--keep",
        "--quiet-period",
        0.1,
    ]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, line)], stderr=subprocess.DEVNULL
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def test_surviving_work_counts_no_failed_attempt(tmp_path: Path) -> None:
    """Work that leaves the process alive does not count as a start that it ended."""
    file = tmp_path / ATTEMPTS
    for _ in range(3):
        with suppress(KeyboardInterrupt), count_attempt(file):
            assert attempts(file) == 1
            raise KeyboardInterrupt
    file.write_bytes(b"..")
    with count_attempt(file):
        assert attempts(file) == 3
        reset_attempts(file)
        assert attempts(file) == 1  # should it be killed now, that is the first time
    assert attempts(file) == 0
    with count_attempt(file):
        file.unlink()
    assert attempts(file) == 0 and not file.exists()
