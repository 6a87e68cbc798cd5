"""A DICOM node, an archive and senders of one's own on the loopback interface, each ended with
its test.
"""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dicom_masks import segmentation, slices
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from samples import MM_WHS_VALUES, blobs

from runtime.__main__ import main
from runtime.core.console import run

ROOT = Path(__file__).resolve().parent.parent
SEGMENTS = [("left ventricle", "87878005"), ("right atrium", "73829009")]
SECRETS = (
    "Doe",
    "Roe",
    "PLANTED",
    "Planted",
    "19440102",
    "20190817",
    "101112",
    "1.2.826.",
    "Traceback",
)  # no line may hold one
DEADLINE = 60.0  # s that anything may take here


def until(reached: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Wait for a condition, and fail when it is not reached in time."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not (value := reached()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        pause.wait(0.02)
    return value


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def write_study(folder: Path, seed: int = 0, shape: tuple[int, int, int] = (5, 16, 16)) -> Path:
    """A SEG of two structures, of a patient who must not come out again. Returns its file."""
    values = blobs(shape, MM_WHS_VALUES, seed)
    masks = ((values == 500) + 2 * (values == 550)).astype("uint8")
    return segmentation(
        folder / "Doe_John_Planted.dcm", slices(values, Modality="CT"), masks, SEGMENTS
    )


# pynetdicom leaves the sockets of rejected associations to the collector, which says so.
QUIETLY = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("collected"),
]


def serve(model: Path, spool: Path, *options: str) -> int:
    """The exit code of `mask2ct serve`, run in this process: of one that does not begin to
    listen.
    """
    return run(
        main,
        [
            "serve",
            "--model",
            str(model),
            "--backend",
            "fake",
            "--spool",
            str(spool),
            "--port",
            "0",
            *options,
        ],
    )


class Serving:
    """`mask2ct serve` as a process of its own."""

    def __init__(
        self,
        model: Path,
        spool: Path,
        *options: object,
        quiet: float = 0.2,
        allow: str | None = "SENDER",
        backend: str = "fake",
        traced: Sequence[str] = (),
    ):
        who = ["--allow-any"] if allow is None else ["--allow", allow]
        line = [
            *traced,
            sys.executable,
            "-m",
            "runtime",
            "serve",
            "--model",
            model,
            "--backend",
            backend,
            "--spool",
            spool,
            "--port",
            0,
            "--http-port",
            0,
            "--quiet-period",
            quiet,
            *who,
            *options,
        ]
        self.process = subprocess.Popen(
            [*map(str, line)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        first = until(
            lambda: self.said("listening") or self.process.poll() is not None, "the node listens"
        )
        assert first is not True, self.log
        found = dict(re.findall(r"(\w+)=(\S+)", first))
        self.port, self.http = int(found["dicom"]), int(found["http"])

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def said(self, *words: str) -> str:
        """The first line that holds all the words."""
        return next(
            (line for line in [*self.lines] if all(f" {word}" in f"{line} " for word in words)), ""
        )

    def count(self, word: str) -> int:
        return sum(f" {word} " in f"{line} " for line in [*self.lines])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=10) as reply:
            return reply.read().decode()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """The exit code, and the seconds it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE)
        took = time.monotonic() - started
        self._reader.join(DEADLINE)
        return code, took

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        log = re.sub(
            r"\b[0-9a-f]{64}\b", "", self.log
        )  # of 4,000 digests one holds any six digits by chance
        assert not any(word in log for word in SECRETS), log


def associate(
    port: int,
    sop_classes: Iterable[str],
    *,
    calling: str = "SENDER",
    display_name: str = "MASK2CT",
    tls: Any = None,
) -> Any:
    """An association that was asked for, established or not."""
    ae = AE(ae_title=calling)
    for sop_class in sop_classes:
        ae.add_requested_context(sop_class)
    return ae.associate("127.0.0.1", port, ae_title=display_name, tls_args=tls)


def push(port: int, *files: Path | Dataset, calling: str = "SENDER", tls: Any = None) -> list[int]:
    """C-STORE in one association: each file's status."""
    datasets = [dcmread(file) if isinstance(file, Path) else file for file in files]
    association = associate(port, {ds.SOPClassUID for ds in datasets}, calling=calling, tls=tls)
    assert association.is_established
    try:
        return [association.send_c_store(ds).Status for ds in datasets]
    finally:
        association.release()


@contextmanager
def archive(
    folder: Path, port: int = 0, *, status: Callable[[str], int] = lambda uid: 0
) -> Iterator[tuple[int, list[str]]]:
    """A PACS that keeps what it is sent as UID.dcm and lists each C-STORE's UID; `status` is
    what it answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen: list[str] = []

    def store(event: Any) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        seen.append(uid)
        answer = status(uid)
        if answer == 0:
            (folder / f"{uid}.dcm").write_bytes(event.encoded_dataset())
        return answer

    ae = AE(ae_title="PACS")
    for sop_class in (
        "1.2.840.10008.5.1.4.1.1.2",
        "1.2.840.10008.5.1.4.1.1.2.1",
        "1.2.840.10008.5.1.4.1.1.66.4",
        "1.2.840.10008.5.1.4.1.1.66.7",
    ):
        ae.add_supported_context(sop_class)
    server = ae.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)]
    )
    assert server is not None
    try:
        yield server.server_address[1], seen
    finally:
        server.shutdown()
        ae.shutdown()


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def read_all(folder: Path) -> dict[str, Dataset]:
    """The DICOM files below a folder by their UID, read whole."""
    found = [dcmread(io.BytesIO(path.read_bytes())) for path in sorted(folder.rglob("*.dcm"))]
    return {str(ds.SOPInstanceUID): ds for ds in found}


def settled(node: Serving, studies: int = 1, seconds: float = DEADLINE) -> None:
    until(lambda: node.count("settled") >= studies, "all is sent", seconds)


def spooled(spool: Path) -> list[Path]:
    return list(spool.rglob("*.dcm"))
