"""TensorRT and ONNX Runtime on a GPU: slots, pools, graphs and failures, on a fake device whose
results are the CPU's to the bit.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import install
from fake_world import World
from hand_made import write_model
from samples import blobs

from runtime import Synthesizer
from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.errors import (
    GeometryError,
    Mask2CTError,
    MemoryCapExceeded,
    MissingComponent,
    ModelError,
)
from runtime.core.labels import MM_WHS, to_indices
from runtime.core.manifest import Manifest
from runtime.core.volume import Geometry, LabelVolume
from runtime.engines.base import EngineError, EngineOptions
from runtime.engines.memory import HOST_STREAM
from runtime.engines.registry import open_engine

BACKENDS = ("tensorrt", "onnx-cuda")
PROVIDERS = ("cuda-core", "pycuda")


@pytest.fixture(scope="session")
def gpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpu") / "model")


def volume(depth: int = 9, side: int = 30, seed: int = 0) -> LabelVolume:
    values = blobs((depth, side, side), seed=seed)
    return LabelVolume(to_indices(values, MM_WHS), Geometry(np.diag([3.0, 3.0, 3.0, 1.0])))


@pytest.fixture(params=PROVIDERS)
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    return install(monkeypatch, request.param)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> World:
    return install(monkeypatch)


def on_cpu(model: Path, *volumes: LabelVolume) -> list[np.ndarray]:
    with Synthesizer.open(model, backend="onnx") as synth:
        return [synth.synthesize(one) for one in volumes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_bytes_equal_cpu_bytes(world: World, gpu_model: Path, backend: str) -> None:
    """The bytes are those of the CPU, whatever the batch."""
    volumes = [volume(), volume(5, seed=1), volume(1, seed=2)]
    expected = on_cpu(gpu_model, *volumes)
    for batch in (1, 4, 16):
        with Synthesizer.open(gpu_model, backend=backend, batch=batch) as synth:
            assert all(
                np.array_equal(synth.synthesize(one), ct)
                for one, ct in zip(volumes, expected, strict=True)
            )
        assert world.left() == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_steady_state_calls_no_allocator(world: World, gpu_model: Path, backend: str) -> None:
    allocating = ("cuMemAllocAsync", "cuMemAllocHost", "cuMemAlloc", "cuMemHostAlloc")
    with Synthesizer.open(gpu_model, backend=backend) as synth:
        for batches in (2, 1):  # two batches of the shape, one in each slot
            synth.synthesize(volume(synth._engine.spec.batch * batches))
        memory, calls = synth.memory(), [world.calls[name] for name in allocating]
        for seed in range(3):
            synth.synthesize(volume(20, seed=seed))
        assert synth.memory() == memory and [world.calls[name] for name in allocating] == calls
        assert (
            world.in_use("device") <= memory["device"].held
            and world.in_use("pinned") == memory["page-locked"].held
        )
        assert {"labels", "noise", "ct"} <= set(memory["device"].tags)
    assert (
        all(stats.in_use == stats.held == 0 for stats in synth.memory().values())
        and world.left() == {}
    )


def test_graph_capture_follows_shape(core: World, gpu_model: Path) -> None:
    """A shape is captured once, and again when it changes."""
    with Synthesizer.open(gpu_model, backend="tensorrt") as synth:
        batch = synth._engine.spec.batch
        assert "CUDA graphs" in synth.backend and "no CUDA graphs" not in synth.backend
        synth.synthesize(volume(2 * batch))  # the first batch of each slot
        assert core.calls["cuGraphInstantiate"] == 0
        synth.synthesize(volume(6 * batch))
        assert (
            core.calls["cuGraphInstantiate"] == 2
            and core.calls["cuGraphLaunch"] == 6
            and core.calls["execute_async_v3"] == 4
        )
        synth.synthesize(volume(6 * batch, side=80))  # a larger canvas: new slots
        synth.synthesize(volume(6 * batch))
        assert core.calls["cuGraphInstantiate"] == 6


def test_contexts_share_activation_memory(core: World, gpu_model: Path) -> None:
    """Contexts that never run at the same time share the memory of their activations.

    A second volume in work, the first one's batches still on the device: two blocks for four
    contexts, bytes as on the CPU.
    """
    volumes = [volume(30), volume(30, seed=1), volume(20, side=80)]
    expected = on_cpu(gpu_model, *volumes)
    with Synthesizer.open(gpu_model, backend="tensorrt", batch=1) as synth:
        assert np.array_equal(synth.synthesize(volumes[0]), expected[0])
        alone = synth.memory()["device"].tags["activations"].peak
        slabs = synth.slabs(volumes[0])
        first = next(slabs)
        for _ in range(2):
            assert np.array_equal(synth.synthesize(volumes[1]), expected[1])
        assert (
            synth.memory()["device"].tags["activations"].peak == alone
            and core.calls["create_execution_context"] == 4
        )
        waited = core.calls["cuStreamWaitEvent"]
        assert waited
        larger = synth.synthesize(
            volumes[2]
        )  # blocks for another canvas are its own, and go when the first canvas returns
        rest = [next(slabs).hu for _ in range(29)]
        assert np.array_equal(larger, expected[2]) and np.array_equal(
            np.concatenate([first.hu, *rest]), expected[0]
        )
        slabs.close()
        synth.synthesize(volumes[1])
        assert synth.memory()["device"].tags["activations"].in_use == alone
    assert core.left() == {}


def test_short_memory_slots_share_one_block(core: World, gpu_model: Path) -> None:
    """Where memory is short, both slots take turns on one block."""
    engine, *_ = open_engine("tensorrt", Manifest.load(gpu_model), gpu_model)
    blocks = engine.activations  # type: ignore[attr-defined]
    stream = engine.open_stream()
    size = engine.device_pool.stats.cap - engine.device_pool.stats.in_use - 4096  # type: ignore[attr-defined]
    with pytest.raises(MemoryCapExceeded):
        blocks.acquire(2 * size, stream=stream)
    with engine.cuda.current():  # type: ignore[attr-defined]
        first, second = (blocks.acquire(size, stream=stream) for _ in range(2))
        assert first is second and engine.memory()["device"].tags["activations"].in_use >= size
        for block in (first, second):
            blocks.release(block, None)
    assert engine.memory()["device"].tags["activations"].in_use == 0
    engine.close()
    assert core.left() == {}


def test_graph_follows_tensor_addresses(core: World, gpu_model: Path) -> None:
    """Two sets of page-locked tensors in turn through one stream: a graph of the first would
    synthesize into the first.
    """
    manifest = Manifest.load(gpu_model)
    engine, *_ = open_engine("tensorrt", manifest, gpu_model)
    stream, (h, w), n = engine.open_stream(), manifest.grid.canvas, engine.spec.batch
    sets = []
    for seed in range(2):
        arrays = {}
        for tensor in (*engine.spec.inputs, engine.spec.output):
            shape = tuple({"N": n, "H": h, "W": w}.get(str(d), d) for d in tensor.shape)
            buffer = engine.pool.allocate(
                int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize, stream=stream
            )
            arrays[tensor.name] = buffer.array(shape, tensor.dtype)
            arrays[tensor.name][...] = np.random.default_rng(seed).integers(0, 8, shape)
            sets.append(buffer)
        sets.append(arrays)
    first, second = sets[len(sets) // 2 - 1], sets[-1]
    results = []
    for arrays in (first, first, first, second, second, second, first):
        inputs = {name: array for name, array in arrays.items() if name != "ct"}
        arrays["ct"][...] = 0
        engine.run(inputs, arrays["ct"], stream=stream)
        stream.synchronize()
        results.append(arrays["ct"].copy())
    assert all(np.array_equal(results[n], results[0]) for n in (1, 2, 6)) and all(
        np.array_equal(results[n], results[3]) for n in (4, 5)
    )
    assert not np.array_equal(results[0], results[3]) and core.calls["cuGraphInstantiate"] == 2
    for one in sets:
        if not isinstance(one, dict):
            one.close()
    engine.close()
    assert core.left() == {}


def test_engine_without_cuda_graphs(core: World, gpu_model: Path) -> None:
    """The engine works without CUDA graphs and says so."""
    expected = on_cpu(gpu_model, volume(20))[0]
    with Synthesizer.open(gpu_model, backend="tensorrt") as synth:
        core.fail("cuGraphInstantiate")
        assert np.array_equal(synth.synthesize(volume(20)), expected)
        assert "no CUDA graphs" in synth.backend and core.calls["cuGraphLaunch"] == 0
    assert core.left() == {}


# Where a failure is put, and the how-manieth call of that name it is, counted from the open
# synthesizer.
PLACES = [
    ("cuStreamCreate", 1),
    ("cuEventCreate", 2),
    ("cuMemAllocHost", 2),
    ("cuMemAllocAsync", 1),
    ("cuMemAllocAsync", 3),
    ("cuMemcpyHtoDAsync", 1),
    ("cuMemcpyHtoDAsync", 3),
    ("cuMemcpyDtoHAsync", 2),
    ("cuEventRecord", 2),
    ("cuEventSynchronize", 3),
]
TENSORRT = [
    ("create_execution_context", 2),
    ("set_input_shape", 2),
    ("set_tensor_address", 3),
    ("execute_async_v3", 2),
    ("cuGraphLaunch", 1),
]


@pytest.mark.parametrize(("place", "at"), [*PLACES, *TENSORRT])
def test_tensorrt_failure_frees_memory(core: World, gpu_model: Path, place: str, at: int) -> None:
    """A failure at any place frees every byte."""
    expected = on_cpu(gpu_model, volume(30))[0]
    with Synthesizer.open(gpu_model, backend="tensorrt") as synth:
        start = {kind: stats.in_use for kind, stats in synth.memory().items()}
        core.fail(place, at)
        with pytest.raises(Mask2CTError):
            synth.synthesize(volume(30))
        assert {kind: stats.in_use for kind, stats in synth.memory().items()} == start
        assert np.array_equal(
            synth.synthesize(volume(30)), expected
        )  # the device was not lost: the next volume is synthesized
    assert (
        all(stats.in_use == stats.held == 0 for stats in synth.memory().values())
        and core.left() == {}
    )


@pytest.mark.parametrize(
    ("place", "at"),
    [
        *PLACES[:3],
        ("cuMemAllocAsync", 2),
        ("cuMemcpyDtoHAsync", 2),
        ("run_with_iobinding", 3),
        ("cuEventRecord", 4),
    ],
)
def test_onnx_runtime_failure_frees_memory(
    core: World, gpu_model: Path, place: str, at: int
) -> None:
    with Synthesizer.open(gpu_model, backend="onnx-cuda") as synth:
        start = {kind: stats.in_use for kind, stats in synth.memory().items()}
        core.fail(place, at)
        with pytest.raises(Mask2CTError):
            synth.synthesize(volume(30))
        assert {kind: stats.in_use for kind, stats in synth.memory().items()} == start
    assert core.left() == {}


@pytest.mark.parametrize("place", ["cuMemAlloc", "cuMemHostAlloc"])
def test_pycuda_pool_failure_frees_memory(
    monkeypatch: pytest.MonkeyPatch, gpu_model: Path, place: str
) -> None:
    world = install(monkeypatch, "pycuda")
    with Synthesizer.open(gpu_model, backend="tensorrt") as synth:
        assert "PyCUDA" in synth.backend
        world.fail(place, 2)
        with pytest.raises(MemoryCapExceeded, match="the system refused"):
            synth.synthesize(volume())
    assert world.left() == {}


@pytest.mark.parametrize(
    "place",
    [
        "cuDevicePrimaryCtxRetain",
        "cuStreamCreate",
        "deserialize_cuda_engine",
        "create_execution_context",
    ],
)
def test_failed_engine_open_frees_memory(core: World, gpu_model: Path, place: str) -> None:
    """An engine that cannot be opened leaves nothing behind."""
    core.fail(place)
    with pytest.raises(Mask2CTError):
        Synthesizer.open(gpu_model, backend="tensorrt", max_memory="512MiB")
    assert core.left() == {}


def test_lost_device_settles_memory_accounting(core: World, gpu_model: Path) -> None:
    synth = Synthesizer.open(gpu_model, backend="tensorrt")
    synth.synthesize(volume())
    core.broken = True
    with pytest.raises(EngineError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        synth.synthesize(volume())
    synth.close()
    assert all(stats.in_use == 0 for stats in synth.memory().values())


def test_memory_cap_chooses_batch(core: World, gpu_model: Path) -> None:
    """The cap chooses the batch where that is asked for; otherwise too large a batch is refused."""
    expected = on_cpu(gpu_model, volume())[0]
    batches = []
    for cap in ("64MiB", "2MiB", "1.1MiB"):
        with Synthesizer.open(gpu_model, backend="tensorrt", batch="auto", max_memory=cap) as synth:
            assert np.array_equal(synth.synthesize(volume()), expected)
            stats = synth.memory()["device"]
            assert stats.peak <= stats.held <= stats.cap
            batches.append((synth._engine.spec.batch, synth._engine.spec.streams))
    assert (
        batches[0] == (8, 2) and batches == sorted(batches, reverse=True) and len(set(batches)) == 3
    )
    with pytest.raises(MemoryCapExceeded, match="would pass the pool's cap") as caught:
        Synthesizer.open(gpu_model, backend="tensorrt", max_memory="512KiB")
    assert (
        caught.value.cap == 512 << 10
        and caught.value.requested > caught.value.cap
        and caught.value.free is not None
    )
    assert core.left() == {}


def test_larger_canvas_uses_one_slot(core: World, gpu_model: Path) -> None:
    """A larger canvas that fits only once is synthesized through one slot."""
    large = volume(20, side=80)
    expected = on_cpu(gpu_model, large, volume(20))
    with Synthesizer.open(gpu_model, backend="tensorrt", max_memory="4MiB") as synth:
        assert synth._engine.spec.streams == 2
        assert np.array_equal(synth.synthesize(large), expected[0]) and np.array_equal(
            synth.synthesize(volume(20)), expected[1]
        )
        stats = synth.memory()["device"]
        assert 2 * max(u.peak for u in stats.tags.values()) > stats.cap >= stats.peak
    assert core.left() == {}


def test_full_device_differs_from_full_cap(
    monkeypatch: pytest.MonkeyPatch, gpu_model: Path
) -> None:
    """The error tells a full device from a cap that is reached."""
    world = install(monkeypatch, memory=1 << 19)
    with Synthesizer.open(gpu_model, backend="tensorrt") as synth:
        with pytest.raises(MemoryCapExceeded, match="the system refused") as caught:
            synth.synthesize(volume())
        error = caught.value
        assert isinstance(error, MemoryError) and error.exit_code == 4
        assert (
            error.in_use + error.requested <= error.cap
            and 0 <= error.free < error.requested
            and f"{error.free} bytes free" in str(error)
        )
    assert world.left() == {}


def test_onnx_runtime_arena_is_capped(core: World, gpu_model: Path) -> None:
    """The arena of ONNX Runtime is capped, and a batch that fits is chosen."""
    with (
        Synthesizer.open(gpu_model, backend="onnx-cuda", max_memory="3MiB") as synth,
        pytest.raises(MemoryCapExceeded),
    ):
        synth.synthesize(volume())
    with Synthesizer.open(gpu_model, backend="onnx-cuda", max_memory="3MiB", batch="auto") as synth:
        assert 1 <= synth._engine.spec.batch < 8 and np.array_equal(
            synth.synthesize(volume()), on_cpu(gpu_model, volume())[0]
        )
        assert synth.memory()["device"].tags["arena"].in_use > 1 << 19
    assert core.left() == {}


def test_oversized_labels_fail_one_case(core: World, gpu_model: Path) -> None:
    """Labels past the canvas of the engine fail that case alone."""
    expected = on_cpu(gpu_model, volume())[0]
    with Synthesizer.open(gpu_model, backend="tensorrt") as synth:
        with pytest.raises(GeometryError, match="need a canvas of"):
            synth.synthesize(volume(4, side=300))
        assert np.array_equal(synth.synthesize(volume()), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_and_synthesizers_share_process(
    world: World, gpu_model: Path, backend: str
) -> None:
    volumes = [volume(7, seed=seed) for seed in range(4)]
    expected = on_cpu(gpu_model, *volumes)
    synths = [Synthesizer.open(gpu_model, backend=backend, max_memory="512MiB") for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        generated = list(threads.map(lambda n: synths[n % 2].synthesize(volumes[n]), range(4)))
    assert all(np.array_equal(a, b) for a, b in zip(generated, expected, strict=True))
    synths[0].close()
    assert np.array_equal(synths[1].synthesize(volumes[0]), expected[0])
    synths[1].close()
    assert world.left() == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_waits_for_queued_work(world: World, gpu_model: Path, backend: str) -> None:
    """Closing waits for queued work and then frees the memory."""
    synth = Synthesizer.open(gpu_model, backend=backend, batch=1)
    slabs = synth.slabs(volume(30))
    next(slabs)
    closing = threading.Thread(target=synth.close)
    closing.start()
    closing.join()
    assert world.left() == {}
    with pytest.raises(EngineError, match="closed"):
        list(slabs)


def test_pageable_memory_gives_same_bytes(core: World, gpu_model: Path) -> None:
    """A caller without page-locked memory gets the same bytes."""
    manifest = Manifest.load(gpu_model)
    outs = []
    for backend in BACKENDS:
        engine, *_ = open_engine(backend, manifest, gpu_model)
        n, (h, w), rng = engine.spec.batch, manifest.grid.canvas, np.random.default_rng(3)
        inputs = {
            "labels": rng.integers(0, 8, (n, manifest.grid.slices, h, w), np.uint8),
            "noise": rng.integers(0, 256, (n, h, w), np.uint8),
            "style": np.ones((n, manifest.style), np.float32),
        }
        out = np.zeros((n, h, w, 2), np.uint8)
        for _ in range(3):
            engine.run(inputs, out, stream=HOST_STREAM)
        outs.append(out[:4])
        engine.close()
    assert core.calls["cuGraphLaunch"] == 0 and core.left() == {}


def test_missing_gpu_parts_exit_3(
    monkeypatch: pytest.MonkeyPatch,
    gpu_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No driver, no provider of memory, no CUDA in onnxruntime: each with its remedy, and never
    a silent run on the CPU.
    """
    arguments = [
        "synth",
        str(tmp_path / "m.nii.gz"),
        "--model",
        str(gpu_model),
        "--output",
        str(tmp_path / "out"),
        "--backend",
    ]
    monkeypatch.setattr("runtime.engines.registry.why_no_gpu", lambda: None)
    assert run(main, [*arguments, "onnx-cuda"]) == 3
    assert "built without CUDA" in capsys.readouterr().err
    install(monkeypatch)
    monkeypatch.setattr(
        "runtime.engines.registry.why_no_gpu", lambda: "the NVIDIA driver is not installed"
    )
    for backend in ("tensorrt", "tensorrt-rtx", "onnx-cuda"):
        assert run(main, [*arguments, backend]) == 3
        said = capsys.readouterr().err
        assert "driver is not installed" in said
        # what this machine can use comes first
        assert "remedy    name --backend openvino" in said and "NVIDIA GPU and its driver" in said
    world = install(monkeypatch)
    import sys

    monkeypatch.delattr(sys.modules["cuda"], "core")
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingComponent, match="no provider of GPU memory"):
        Synthesizer.open(gpu_model, backend="tensorrt")
    assert world.left() == {}


def test_foreign_tensorrt_engine_is_refused(core: World, gpu_model: Path) -> None:
    """An engine of another TensorRT is refused, and the error repeats TensorRT's reason."""
    core.fail("deserialize_cuda_engine")
    with pytest.raises(ModelError, match="magicTag does not match"):
        Synthesizer.open(gpu_model, backend="tensorrt")


def test_altered_engine_never_reaches_tensorrt(
    core: World, gpu_model: Path, tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(gpu_model, tmp_path / "model"))
    data = bytearray((folder / "model.engine").read_bytes())
    data[-1] ^= 1
    (folder / "model.engine").write_bytes(bytes(data))
    with pytest.raises(ModelError, match="is not the file its manifest describes"):
        Synthesizer.open(folder, backend="tensorrt")
    assert core.calls["deserialize_cuda_engine"] == 0


def test_options_reach_the_engine(core: World, gpu_model: Path) -> None:
    engine, *_ = open_engine(
        "tensorrt", Manifest.load(gpu_model), gpu_model, EngineOptions(max_memory=50 << 20)
    )
    assert engine.memory()["device"].cap == 50 << 20
    engine.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_acceptance_runs_on_fake_gpu(
    core: World, gpu_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """What benchmarks/gpu_acceptance.py runs on a GPU, on the fake: parity to the bit, and no
    allocation in steady state.
    """
    from benchmarks.gpu import case as cases
    from benchmarks.gpu import engines

    monkeypatch.setattr(engines, "need_gpu", lambda: None)
    case = cases.Case(gpu_model, tmp_path, quick=True)
    assert "mean 0, p99.9 0, max 0 HU" in engines.runtime_parity(case, backend)
    assert "0 bytes in use after close" in engines.runtime_steady(case, backend)
    assert core.left() == {}
