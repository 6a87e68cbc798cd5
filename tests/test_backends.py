"""Which backend runs a model: validated ones by themselves, INT8 for who asks, and nothing that
phones home.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.core.errors import MissingComponent, ModelError, UsageError
from runtime.core.manifest import Manifest
from runtime.engines import registry
from runtime.engines.registry import BACKENDS, CHOICES, may_use_gpu, open_engine

AUTOMATIC = [b.name for b in BACKENDS if b.automatic]


def with_parity(model: Path, backends: set[str]) -> Manifest:
    """The model's manifest, as it would be had export found these backends only."""
    data = json.loads((model / "manifest.json").read_text())
    data["parity"] = {
        file: {b: p for b, p in proofs.items() if b in backends}
        for file, proofs in data["parity"].items()
    }
    return Manifest.from_json(data)


def test_auto_takes_first_validated_backend(model: Path) -> None:
    """`auto` takes the first validated backend and says why it does not take the others."""
    engine, reason, file = open_engine("auto", with_parity(model, {"onnx", "openvino-int8"}), model)
    assert engine.name.startswith("onnxruntime") and file == "model.onnx"
    assert (
        "openvino: not validated when this model was exported" in reason
        and "--backend openvino-int8" in reason
    )
    engine, reason, file = open_engine("auto", Manifest.load(model), model)
    assert (
        engine.name.startswith("openvino")
        and file == "model.onnx"
        and "fastest that is installed and validated" in reason
    )


def test_auto_skips_backends_not_installed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry, "find_spec", lambda module: None if module == "openvino" else object()
    )
    engine, reason, _ = open_engine("auto", Manifest.load(model), model)
    assert (
        engine.name.startswith("onnxruntime")
        and "openvino: openvino is not installed (pip install" in reason
    )


def test_cpu_reason_names_no_gpu_backend(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a healthy CPU machine `auto` does not speak of GPUs, and no remedy asks for one."""
    monkeypatch.setattr(registry, "why_no_gpu", lambda: "the NVIDIA driver is not installed")
    _, reason, _ = open_engine("auto", Manifest.load(model), model)
    assert not any(word in reason for word in ("tensorrt", "cuda", "NVIDIA", "GPU"))
    monkeypatch.setattr(registry, "find_spec", lambda module: None)
    with pytest.raises(MissingComponent) as caught:
        open_engine("auto", Manifest.load(model), model)
    assert caught.value.remedy == 'pip install "mask2ct[openvino]"'
    with pytest.raises(MissingComponent) as caught:
        open_engine("onnx-cuda", Manifest.load(model), model)
    assert caught.value.remedy.startswith('pip install "mask2ct[openvino]"; or run on a machine')


def test_unproven_model_has_no_auto_backend(model: Path) -> None:
    """Without a proof `auto` chooses no backend, and INT8 is refused as well."""
    bare = with_parity(model, set())
    with pytest.raises(MissingComponent, match="onnx: not validated") as caught:
        open_engine("auto", bare, model)
    assert all(name in str(caught.value) for name in AUTOMATIC)
    assert caught.value.remedy.startswith("name --backend openvino")
    _, reason, _ = open_engine("onnx", bare, model)
    assert "not validated" in reason
    with pytest.raises(ModelError, match="INT8 file was not validated in openvino"):
        open_engine("openvino-int8", bare, model)


def test_gpu_engines_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name in CHOICES if may_use_gpu(name)] == [
        "auto",
        "tensorrt",
        "tensorrt-rtx",
        "onnx-cuda",
        "tensorrt-int8",
        "tensorrt-rtx-int8",
    ]
    on_cpu = tuple(backend for backend in BACKENDS if not backend.gpu)
    monkeypatch.setattr(registry, "BACKENDS", on_cpu)
    assert not may_use_gpu("auto")
    monkeypatch.setattr(registry, "BACKENDS", (*on_cpu, replace(on_cpu[0], name="new", gpu=True)))
    assert may_use_gpu("new") and may_use_gpu("auto")


def test_int8_is_opted_into_by_name(model: Path) -> None:
    for name in ("openvino-int8", "onnx-int8"):
        assert name not in AUTOMATIC
        _, reason, file = open_engine(name, Manifest.load(model), model)
        assert (reason, file) == ("asked for", "model.int8.onnx")
    with pytest.raises(UsageError):
        open_engine("openvino-int4", Manifest.load(model), model)


@pytest.mark.parametrize("backend", ["onnx", "openvino", "openvino-int8"])
def test_file_without_graph_is_refused(backend: str, model: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(model)
    chosen = next(b for b in BACKENDS if b.name == backend)
    path = tmp_path / "model.onnx"
    for content in (b"", b"no graph", (model / "model.onnx").read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is not a graph"):
            chosen.open(path, manifest)


CLOSINGS = {
    "in the order of opening": "engines.pop(0).close(); engines.pop(0).close()",
    "in another thread": """
import threading
def close():
    while engines:
        engines.pop().close()
thread = threading.Thread(target=close); thread.start(); thread.join()""",
}


@pytest.mark.parametrize("close", CLOSINGS.values(), ids=CLOSINGS)
def test_signals_survive_closed_openvino(close: str, model: Path, root: Path) -> None:
    """OpenVINO's CPU plugin takes the signal stack of a thread away when it ends."""
    code = f"""
import gc, os, signal
from pathlib import Path
from runtime.core.manifest import Manifest
from runtime.engines.registry import open_engine
model = Path({str(model)!r})
manifest = Manifest.load(model)
engines = [open_engine("openvino", manifest, model)[0] for _ in range(2)]
{close}
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
print("goes on")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["handled", "goes on"])


def test_openvino_reports_nothing_to_its_makers(model: Path, root: Path, tmp_path: Path) -> None:
    """Its package sends an event when it is imported.

    Ours must reach no network, start no process and leave no trace of it.
    """
    code = f"""
import sys
seen = []
def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.client.")) or event in ("subprocess.Popen", "os.posix_spawn", "os.fork"):
        seen.append(event)
sys.addaudithook(watch)
from pathlib import Path
from runtime.core.manifest import Manifest
from runtime.engines.registry import open_engine
model = Path({str(model)!r})
engine, _, _ = open_engine("openvino", Manifest.load(model), model)
engine.close()
print(seen, [m for m in sys.modules if m.startswith("openvino_telemetry")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []" and list(tmp_path.iterdir()) == []


def test_backend_respects_cpu_affinity(model: Path, root: Path) -> None:
    """A backend uses no more cores than the process may use."""
    if not shutil.which("taskset"):
        pytest.skip("no taskset here")
    code = f"""
from pathlib import Path
from runtime.core.manifest import Manifest
from runtime.engines.registry import open_engine
model = Path({str(model)!r})
for name in ("onnx", "openvino"):
    print(open_engine(name, Manifest.load(model), model)[0].workers)
"""
    first = min(os.sched_getaffinity(0))
    done = subprocess.run(
        ["taskset", "-c", str(first), sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.split() == ["1", "1"], done.stdout + done.stderr
