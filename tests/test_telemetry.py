"""Nothing is reported: no file beside the results, and no address asked for but loopback's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nodes import Serving, push, settled, until, write_study
from samples import write_mask

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["runtime", "export.build_engine", "export.quantize", "train.run", "benchmarks.run"]
WATCHED = "connect,sendto,sendmsg,sendmmsg,open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2"
ADDRESS = re.compile(r'inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"')
# A call that failed has created nothing; one whose end strace wrote on another line counts as done.
CREATED = re.compile(
    r'\b(?:open|openat|openat2|creat)\((?:AT_FDCWD, )?"([^"]*)"(?!.* = -1 E).*(?:O_CREAT|creat\()'
)


@dataclass
class Observer:
    """Runs commands where a first report would show: `home` and `temporary` are new and empty, and
    no variable tells of CI, on whose machines ONNX Runtime reports nothing.
    """

    folder: Path
    home: Path
    temporary: Path
    strace: str

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
        }
        own = {"HOME": str(self.home), "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)}
        return {**kept, **own, "PYTHONDONTWRITEBYTECODE": "1"}

    @property
    def log(self) -> Path:
        return self.folder / "calls.txt"

    @property
    def traced(self) -> list[str]:
        return [
            self.strace,
            "-D",
            "-f",
            "-q",
            "-s",
            "300",
            "-e",
            f"trace={WATCHED}",
            "-o",
            str(self.log),
        ]

    def run(self, *arguments: object) -> None:
        line = [*self.traced, sys.executable, *map(str, arguments)]
        done = subprocess.run(
            line,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr

    def calls(self) -> str:
        """The log, when it is whole."""
        return str(
            until(
                lambda: (text := self.log.read_text(errors="replace")).endswith("+++\n") and text,
                "strace ends",
            )
        )

    def addresses(self) -> set[str]:
        """What was asked for over a network, loopback left out."""
        asked = {one or other for one, other in ADDRESS.findall(self.calls())}
        return {address for address in asked if not address.startswith("127.") and address != "::1"}

    def left(self) -> list[str]:
        """Files in the home and temporary folders, and what was created outside of `folder` and
        given up again.
        """
        files = [
            str(path)
            for place in (self.home, self.temporary)
            for path in place.rglob("*")
            if path.is_file()
        ]
        created = [(self.folder / path).resolve() for path in CREATED.findall(self.calls())]
        return files + [
            str(path)
            for path in created
            if not path.is_relative_to(self.folder) and path.parts[1] not in ("dev", "proc")
        ]


@pytest.fixture
def observer(tmp_path: Path) -> Observer:
    strace = shutil.which("strace")
    if (
        strace is None
        or subprocess.run([strace, "-qq", "true"], check=False, capture_output=True).returncode
    ):
        assert not os.environ.get("MASK2CT_REQUIRE_TOOLS"), (
            "strace is not installed, or may not trace"
        )
        pytest.skip("strace is not installed, or may not trace")
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    return Observer(tmp_path, home, temporary, strace)


def onnxruntime_reports() -> bool:
    from importlib.metadata import version

    return tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 32)


@pytest.mark.skipif(not onnxruntime_reports(), reason="this ONNX Runtime reports nothing")
def test_strace_observer_sees_a_report(observer: Observer) -> None:
    observer.run("-c", "import onnxruntime")
    assert any("onnxruntime" in path for path in observer.left())


@pytest.mark.parametrize("package", PACKAGES)
def test_telemetry_switches_come_before_libraries(package: str) -> None:
    """Also where the environment asks for reports."""
    code = f"""
import sys
class First:
    def find_spec(self, name, *_):
        if name in ("onnxruntime", "ray", "wandb", "openvino", "torch"):
            import os
            assert os.environ["ORT_DISABLE_TELEMETRY"] == "1" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0", name
sys.meta_path.insert(0, First())
import {package}
import os
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
"""
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "0", "RAY_USAGE_STATS_ENABLED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def synthesis(command: str, *options: str) -> Callable[[Path, Path], list[object]]:
    return lambda model, folder: [
        "-m",
        "runtime",
        command,
        folder / "in",
        "--model",
        model,
        "--output",
        folder / "out",
        *options,
    ]


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "describe": lambda model, folder: ["-m", "runtime", "describe", model],
    "synth": synthesis("synth", "--quiet"),
    "synth onnx": synthesis("synth", "--backend", "onnx", "--variants", "2", "--format", "dicom"),
    "synth openvino": synthesis("synth", "--backend", "openvino"),
    "watch": synthesis("watch", "--once", "--stable", "0", "--poll", "0.1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_sends_telemetry(name: str, observer: Observer, model: Path) -> None:
    (observer.folder / "in").mkdir()
    write_mask(observer.folder / "in" / "case.nii.gz")
    observer.run(*COMMANDS[name](model, observer.folder))
    assert observer.left() == [] and observer.addresses() == set()


def test_dicom_node_sends_no_telemetry(
    observer: Observer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*os.environ]:
        monkeypatch.delenv(name)
    for name, value in observer.environment.items():
        monkeypatch.setenv(name, value)
    study = write_study(observer.folder / "study")
    with Serving(
        model, observer.folder / "spool", "--keep", backend="auto", traced=observer.traced
    ) as node:
        assert push(node.port, study) == [0]
        settled(node)
        code, _ = node.stop()
    assert code == 0 and observer.left() == [] and observer.addresses() == set()


@pytest.mark.slow
def test_export_sends_no_telemetry(observer: Observer, trained: Path) -> None:
    observer.run(
        ROOT / "export" / "build_engine.py",
        trained,
        "-o",
        observer.folder / "model",
        "--onnx-only",
        "--quiet",
    )
    assert observer.left() == [] and observer.addresses() == set()
