"""The engine of TensorRT for RTX on a fake device: same bytes as the CPU, the GPUs that it runs
on, and the folder of compiled kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import install
from fake_world import World
from hand_made import write_model
from test_gpu_engines import on_cpu, volume

from runtime import Synthesizer
from runtime.core.errors import MissingComponent, ModelError
from runtime.core.manifest import Manifest
from runtime.engines.base import EngineError
from runtime.engines.gpu.jit_cache import VARIABLE, JitCache, jit_folder
from runtime.engines.registry import BACKENDS, open_engine

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def rtx_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("rtx") / "model")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of compiled kernels."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch, kernels: Path) -> World:
    return install(monkeypatch, capability=(8, 9))


def test_rtx_bytes_equal_cpu_bytes(ada: World, rtx_model: Path) -> None:
    """The bytes are those of the CPU, and closing frees everything."""
    volumes = [volume(), volume(20, seed=1)]
    expected = on_cpu(rtx_model, *volumes)
    with Synthesizer.open(rtx_model, backend=RTX) as synth:
        for one, ct in zip(volumes, expected, strict=True):
            assert np.array_equal(synth.synthesize(one), ct)
        assert "tensorrt_rtx 1.7.1.116, CUDA graphs, JIT cache new" in synth.backend
        assert ada.calls["cuGraphLaunch"] > 0
    assert ada.left() == {}


def test_kernels_are_kept_for_next_process(ada: World, rtx_model: Path, kernels: Path) -> None:
    """Kernels are written when the engine is closed, for their owner alone, and read again."""
    Synthesizer.open(rtx_model, backend=RTX).close()
    (file,) = kernels.iterdir()
    assert file.read_bytes() == ada.kernels
    assert kernels.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600
    with Synthesizer.open(rtx_model, backend=RTX) as synth:
        assert "JIT cache 0.0 MB" in synth.backend and str(kernels) not in synth.backend
    ada.kernels = b"kernels of another driver"
    with Synthesizer.open(rtx_model, backend=RTX) as synth:
        assert "JIT cache new (the kept one is of another driver)" in synth.backend
    assert file.read_bytes() == ada.kernels


def test_unsafe_kernel_folder_is_not_used(ada: World, rtx_model: Path, kernels: Path) -> None:
    """Kernels run on the GPU: a folder that others can write to is neither read nor written."""
    kernels.mkdir()
    kernels.chmod(0o777)
    with Synthesizer.open(rtx_model, backend=RTX) as synth:
        assert "JIT cache off (others can write to its folder)" in synth.backend
    assert list(kernels.iterdir()) == []


def test_kernel_folder_can_be_switched_off(
    ada: World, rtx_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    with Synthesizer.open(rtx_model, backend=RTX) as synth:
        assert "JIT cache off" in synth.backend
    assert not (tmp_path / "caches").exists()
    monkeypatch.delenv(VARIABLE)
    assert jit_folder() == tmp_path / "caches" / "mask2ct"


def test_kernel_folder_stays_within_cap(tmp_path: Path) -> None:
    """The oldest files go first, other files stay, and what is larger than the cap is not kept."""
    folder = tmp_path / "kernels"
    for number in range(5):
        JitCache(f"{number}", folder, most=300).write(bytes(100))
        os.utime(folder / f"{number}.jit", (number, number))
    (folder / "notes.txt").write_text("not ours")
    JitCache("5", folder, most=300).write(bytes(100))
    assert sorted(f.name for f in folder.iterdir()) == ["3.jit", "4.jit", "5.jit", "notes.txt"]
    JitCache("6", folder, most=300).write(bytes(301))
    assert not (folder / "6.jit").exists()


def test_kernels_without_disk_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where the folder should be")
    cache = JitCache("k", tmp_path / "file" / "kernels")
    cache.write(b"kernels")
    assert cache.read() == b""


@pytest.mark.parametrize("place", ["deserialize_cuda_engine", "set_runtime_cache"])
def test_failed_rtx_open_frees_memory(ada: World, rtx_model: Path, place: str) -> None:
    ada.fail(place)
    with pytest.raises((ModelError, EngineError)):
        Synthesizer.open(rtx_model, backend=RTX)
    assert ada.left() == {}


def test_gpu_that_rtx_does_not_know(monkeypatch: pytest.MonkeyPatch, rtx_model: Path) -> None:
    """On a data centre GPU the remedy is the engine that runs there, not a driver."""
    install(monkeypatch, capability=(9, 0))
    with pytest.raises(MissingComponent, match="does not run on Fake GPU") as caught:
        Synthesizer.open(rtx_model, backend=RTX)
    assert caught.value.remedy == 'pip install "mask2ct[gpu]"'


def test_gpu_that_engine_was_not_built_for(
    monkeypatch: pytest.MonkeyPatch, rtx_model: Path, kernels: Path
) -> None:
    """A GPU that the file does not list: `absent` says so, and opening it is refused as well."""
    world = install(monkeypatch, capability=(12, 0))
    manifest = Manifest.load(rtx_model)
    backend = next(b for b in BACKENDS if b.name == RTX)
    assert "built for other GPUs than compute capability 12.0" in str(backend.absent(manifest))
    with pytest.raises(MissingComponent, match="other GPUs"):
        open_engine(RTX, manifest, rtx_model)
    with pytest.raises(ModelError, match="does not run on this GPU"):
        backend.open(rtx_model / "model.rtx.engine", manifest)
    assert world.left() == {}
