"""One suite for every engine: whatever runs the graph, the synthesizer may rely on this."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import install
from hand_made import write_model

from runtime import Synthesizer
from runtime.core.errors import InputError
from runtime.core.manifest import Manifest
from runtime.core.volume import Geometry, LabelVolume
from runtime.engines.base import Engine, EngineError
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.engines.memory import HOST_STREAM, Stream
from runtime.engines.registry import BACKENDS, open_engine

GPU = ("tensorrt", "onnx-cuda")
WorkerModel = tuple[Engine, Manifest]


def open_backend(name: str, folder: Path) -> WorkerModel:
    manifest = Manifest.load(folder)
    return open_engine(name, manifest, folder)[0], manifest


ABSENT = {b.name: why for b in BACKENDS if b.name in GPU and (why := b.uninstalled())}
ENGINES = [
    "fake",
    *(b.name for b in BACKENDS if b.name not in ABSENT),
    *(f"{name} on a fake GPU" for name in GPU),
]


@pytest.mark.parametrize("name", GPU)
def test_real_gpu_keeps_engine_contract(name: str) -> None:
    if name in ABSENT:
        pytest.skip(f"{name}: {ABSENT[name]}")
    assert name in ENGINES


@pytest.fixture(scope="session")
def hand_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hand") / "model")


@pytest.fixture(params=ENGINES)
def opener(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], WorkerModel]]:
    """Opens the engine, again and again if need be; what was opened is closed."""
    opened: list[Engine] = []
    name = request.param
    backend = next((b for b in BACKENDS if b.name == name), None)
    folder = None
    if name.endswith("fake GPU"):
        install(monkeypatch)
        folder, name = request.getfixturevalue("hand_made"), name.split()[0]
    elif backend is not None:
        folder = request.getfixturevalue("model")
        why = backend.uninstalled() or backend.absent(Manifest.load(folder))
        if why is not None:
            pytest.skip(f"{name}: {why}")

    def open_one() -> WorkerModel:
        manifest = fake_manifest()
        made = (FakeEngine(manifest), manifest) if folder is None else open_backend(name, folder)
        opened.append(made[0])
        return made

    yield open_one
    for engine in opened:
        engine.close()


@pytest.fixture
def opened(opener: Callable[[], WorkerModel]) -> WorkerModel:
    return opener()


def tensors(engine: Engine, manifest: Manifest, rows: int = 1, seed: int = 0):
    """Random inputs for one call, H = rows x the canvas, and an output buffer."""
    rng = np.random.default_rng(seed)
    n, (h, w) = engine.spec.batch, manifest.grid.canvas
    h *= rows
    inputs = {
        "labels": rng.integers(0, len(manifest.labels), (n, manifest.grid.slices, h, w), np.uint8)
    }
    if manifest.style:
        inputs["style"] = np.tile(
            rng.standard_normal((1, manifest.style)).astype(np.float32), (n, 1)
        )
    if manifest.noise:
        inputs["noise"] = rng.integers(0, 256, (n, h, w), np.uint8)
    return inputs, np.full((n, h, w, 2), 0xAB, np.uint8)


def hu(out: np.ndarray) -> np.ndarray:
    return out.view("<i2")[..., 0].copy()


def test_engine_implements_the_protocol(opened) -> None:
    engine, _ = opened
    assert isinstance(engine, Engine) and engine.name


def test_result_fills_buffer_within_range(opened) -> None:
    """The result fills the buffer with values within the model's range."""
    engine, manifest = opened
    inputs, out = tensors(engine, manifest)
    engine.run(inputs, out, stream=HOST_STREAM)
    values = hu(out)
    assert values.min() >= manifest.intensity.low and values.max() <= manifest.intensity.high
    assert len(np.unique(values)) > 8


def test_equal_inputs_give_equal_bytes(opened) -> None:
    """The engine leaves its inputs as they are."""
    engine, manifest = opened
    inputs, out = tensors(engine, manifest)
    before = {name: array.copy() for name, array in inputs.items()}
    engine.run(inputs, out, stream=HOST_STREAM)
    first = hu(out)
    engine.run(*tensors(engine, manifest, seed=9), stream=HOST_STREAM)
    engine.run(inputs, out, stream=HOST_STREAM)
    assert np.array_equal(hu(out), first)
    assert all(np.array_equal(inputs[name], before[name]) for name in inputs)


def test_slice_is_independent_of_batch(opened) -> None:
    """A slice depends neither on its place in the batch nor on its neighbours."""
    engine, manifest = opened
    a, out = tensors(engine, manifest, seed=1)
    b, _ = tensors(engine, manifest, seed=2)

    def infer(*slices: dict) -> list[np.ndarray]:
        """Slices in this order, in as many calls as the engine's batch takes, padded with zeros."""
        generated = []
        for start in range(0, len(slices), engine.spec.batch):
            part = slices[start : start + engine.spec.batch]
            inputs = {name: np.zeros_like(array) for name, array in a.items()}
            for n, one in enumerate(part):
                for name in inputs:
                    inputs[name][n] = one[name]
            engine.run(inputs, out, stream=HOST_STREAM)
            generated += list(hu(out)[: len(part)])
        return generated

    first, second = ({name: array[0] for name, array in inputs.items()} for inputs in (a, b))
    alone = infer(first)[0]
    for order in ((first, second), (second, first), (second, second, first)):
        places = [n for n, one in enumerate(order) if one is first]
        assert all(np.array_equal(infer(*order)[n], alone) for n in places)
    assert not np.array_equal(infer(second)[0], alone)


def test_input_shape_may_change(opened) -> None:
    engine, manifest = opened
    for rows in (1, 2, 1):
        inputs, out = tensors(engine, manifest, rows)
        engine.run(inputs, out, stream=HOST_STREAM)
        assert not (out == 0xAB).all(-1).any()


def test_every_input_changes_the_image(opened) -> None:
    engine, manifest = opened
    inputs, out = tensors(engine, manifest)
    engine.run(inputs, out, stream=HOST_STREAM)
    first = hu(out)
    for name in inputs:
        changed = {
            **inputs,
            name: (
                -inputs[name] if name == "style" else np.ascontiguousarray(inputs[name][..., ::-1])
            ),
        }
        engine.run(changed, out, stream=HOST_STREAM)
        assert not np.array_equal(hu(out), first), name


@pytest.mark.parametrize(
    "broken",
    [
        lambda i, o: (i, o[:, :-1]),  # output of another size
        lambda i, o: (i, o.astype(np.int16)),
        lambda i, o: ({**i, "labels": i["labels"].astype(np.int64)}, o),
        lambda i, o: ({**i, "labels": i["labels"][:0]}, o[:0]),  # empty batch
        lambda i, o: ({**i, "labels": i["labels"][..., ::2]}, o),  # not contiguous, other width
        lambda i, o: ({k: v for k, v in i.items() if k != "labels"}, o),
        lambda i, o: ({**i, "contrast": np.zeros((1, 4), np.float32)}, o),
    ],
)
def test_tensors_against_contract_are_refused(opened, broken) -> None:
    engine, manifest = opened
    inputs, out = broken(*tensors(engine, manifest))
    with pytest.raises(EngineError):
        engine.run(inputs, out, stream=HOST_STREAM)


def test_closed_engine_refuses_use(opened) -> None:
    """An engine may be closed twice."""
    engine, manifest = opened
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(*tensors(engine, manifest), stream=HOST_STREAM)
    with pytest.raises(EngineError, match="closed"):
        engine.open_stream()


def pooled(
    engine: Engine, manifest: Manifest, stream: Stream, seed: int, rows: int = 1
) -> tuple[dict, np.ndarray, list]:
    """The same as `tensors`, in the engine's own memory, and what gives it back."""
    inputs, out = tensors(engine, manifest, rows, seed)
    buffers, copies = [], {}
    for name, array in (*inputs.items(), ("ct", out)):
        buffers.append(engine.pool.tag(name).allocate(array.nbytes, stream=stream))
        copies[name] = buffers[-1].array(array.shape, array.dtype)
        copies[name][...] = array
    return copies, copies.pop("ct"), buffers


def test_streams_equal_single_calls(opened) -> None:
    """Streams that are in flight give what one call gives.

    Several batches at once on two streams, shapes changing in the middle, tensors of the
    engine's own and others.
    """
    engine, manifest = opened
    streams = [engine.open_stream(), engine.open_stream()]
    work = [(seed, 1 + (seed in (4, 5)), streams[seed % 2]) for seed in range(8)]
    expected = []
    for seed, rows, _ in work:
        inputs, out = tensors(engine, manifest, rows, seed)
        engine.run(inputs, out, stream=HOST_STREAM)
        expected.append(hu(out))
    held = [pooled(engine, manifest, stream, seed, rows) for seed, rows, stream in work[:6]]
    held += [(*tensors(engine, manifest, rows, seed), []) for seed, rows, _ in work[6:]]
    for pair in range(0, 8, 2):
        for n in (pair, pair + 1):
            engine.run(held[n][0], held[n][1], stream=work[n][2])
        for stream in streams:
            stream.synchronize()
    for (_, out, buffers), want in zip(held, expected, strict=True):
        assert np.array_equal(hu(out), want)
        for buffer in buffers:
            buffer.close()
    for stream in streams:
        stream.close()
        stream.close()


def test_reused_tensors_are_read_anew(opened) -> None:
    """Tensors given again are read anew, and others are checked.

    As a slot gives them, slice after slice; then others in their place, of which one is
    wrong.
    """
    engine, manifest = opened
    stream = engine.open_stream()
    inputs, out, buffers = pooled(engine, manifest, stream, 0)

    def generated(given: dict, made: np.ndarray) -> np.ndarray:
        made[...] = 0xAB
        engine.run(given, made, stream=stream)
        stream.synchronize()
        return hu(made)

    def expected(given: dict) -> np.ndarray:
        made = np.empty(out.shape, np.uint8)
        engine.run({name: array.copy() for name, array in given.items()}, made, stream=HOST_STREAM)
        return hu(made)

    for seed in (1, 2, 1):
        for name, array in tensors(engine, manifest, seed=seed)[0].items():
            inputs[name][...] = array
        assert np.array_equal(generated(inputs, out), expected(inputs))
    others = tensors(engine, manifest, seed=3)
    assert np.array_equal(generated(*others), expected(others[0]))
    assert np.array_equal(generated(inputs, out), expected(inputs))
    inputs["labels"] = others[0]["labels"]
    assert np.array_equal(generated(inputs, out), expected(inputs))
    inputs["labels"] = np.ascontiguousarray(others[0]["labels"][..., :-1])
    with pytest.raises(EngineError, match="of shape"):
        generated(inputs, out)
    stream.close()
    for buffer in buffers:
        buffer.close()


def test_every_thread_may_have_a_stream(opened) -> None:
    engine, manifest = opened

    def infer(seed: int) -> list[np.ndarray]:
        stream, results = engine.open_stream(), []
        for n in range(3):
            inputs, out = tensors(engine, manifest, seed=10 * seed + n)
            engine.run(inputs, out, stream=stream if seed else HOST_STREAM)
            stream.synchronize()
            results.append(hu(out))
        stream.close()
        return results

    one_by_one = [infer(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        at_once = list(threads.map(infer, range(3)))
    assert all(
        np.array_equal(a, b)
        for x, y in zip(one_by_one, at_once, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_close_frees_queued_work(opened) -> None:
    """To close an engine with queued work ends this work and frees every byte."""
    engine, manifest = opened
    stream = engine.open_stream()
    held = [pooled(engine, manifest, stream, seed) for seed in range(3)]
    for inputs, out, _ in held:
        engine.run(inputs, out, stream=stream)
    engine.close()
    stream.close()
    for _, _, buffers in held:
        for buffer in buffers:
            buffer.close()
    assert all(stats.in_use == stats.held == 0 for stats in engine.memory().values())


def volume(manifest: Manifest, depth: int, seed: int = 0) -> LabelVolume:
    h, w = manifest.grid.canvas
    spacing = manifest.grid.pixel_spacing or (1.0, 1.0)
    labels = (
        np.random.default_rng(seed)
        .integers(0, len(manifest.labels), (depth, h // 8, w // 8), np.uint8)
        .repeat(8, 1)
        .repeat(8, 2)
    )
    return LabelVolume(labels, Geometry(np.diag([spacing[1], spacing[0], 3.0, 1.0])))


def test_volume_is_independent_of_batch_size(opener) -> None:
    """A volume is the same for any batch size and beside any other work.

    Two synthesizers in one process, each with an engine, synthesis at once; one given up
    half-way; whole batches and single slices.
    """
    synths = []
    for batch in (1, 5):
        engine, manifest = opener()
        synths.append(Synthesizer(manifest, engine, batch=batch))
    want = synths[0].synthesize(volume(manifest, 7))
    start = {kind: stats.in_use for kind, stats in synths[1].memory().items()}
    given_up = synths[1].slabs(volume(manifest, 9, seed=1))
    next(given_up)
    with ThreadPoolExecutor(2) as threads:
        generated = list(threads.map(lambda synth: synth.synthesize(volume(manifest, 7)), synths))
    given_up.close()
    assert all(np.array_equal(ct, want) for ct in generated)
    assert np.array_equal(synths[1].synthesize(volume(manifest, 7)), want)
    synths[0].close()
    assert np.array_equal(synths[1].synthesize(volume(manifest, 7)), want)
    synths[1].close()
    assert all(stats.in_use == 0 for synth in synths for stats in synth.memory().values()) and start


def test_stream_error_frees_all_memory(opened) -> None:
    """An error in the middle of a stream frees every byte."""
    engine, manifest = opened
    with Synthesizer(manifest, engine, batch=1) as synth:
        want = synth.synthesize(volume(manifest, 6))
        slabs = synth.slabs(volume(manifest, 30))
        next(slabs)
        with pytest.raises(InputError):
            slabs.throw(InputError("the receiver's disk is full"))
        assert np.array_equal(synth.synthesize(volume(manifest, 6)), want)
    assert all(stats.in_use == stats.held == 0 for stats in synth.memory().values())


def test_close_from_thread_ends_volume(opened) -> None:
    """A volume ends with an error when another thread closes the engine."""
    engine, manifest = opened
    synth = Synthesizer(manifest, engine, batch=1)
    slabs = synth.slabs(volume(manifest, 60))
    next(slabs)
    closing = threading.Thread(target=synth.close)
    closing.start()
    closing.join()
    with pytest.raises(EngineError, match="closed"):
        list(slabs)
    assert all(stats.in_use == 0 for stats in synth.memory().values())


@pytest.mark.parametrize("name", ["onnx", "openvino", *(f"{gpu} on a fake GPU" for gpu in GPU)])
def test_style_is_equal_across_engines(
    name: str, hand_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A style changes the image, in the same way in every engine."""
    backend = next(b for b in BACKENDS if b.name == name.split()[0])
    if "fake GPU" in name:
        install(monkeypatch)
    if why := backend.uninstalled():
        pytest.skip(f"{name}: {why}")
    engine, manifest = open_backend(backend.name, hand_made)
    inputs, out = tensors(engine, manifest)
    inputs["labels"][...] = 1
    inputs["noise"][...] = 128
    results = []
    for style in (0.0, 1.0):
        inputs["style"][...] = style
        engine.run(inputs, out, stream=HOST_STREAM)
        results.append(hu(out).astype(np.int32))
    engine.close()
    inside = results[0][0] > manifest.intensity.low
    assert inside.any() and (results[1] - results[0] == 160).all()  # four numbers of 1, 40 HU each


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_engine_survives_a_failing_graph(name: str, tmp_path: Path) -> None:
    """A graph that fails while it computes gives an error of mask2ct, and the engine goes on.

    A graph for 64 x 64 alone, as it says nowhere: another canvas fails in the library, on the
    caller's thread and on a stream.
    """
    if why := next(b for b in BACKENDS if b.name == name).uninstalled():
        pytest.skip(why)
    engine, manifest = open_backend(name, write_model(tmp_path / "model", size=64))
    inputs, out = tensors(engine, manifest)
    engine.run(inputs, out, stream=HOST_STREAM)
    generated = hu(out)
    with pytest.raises(EngineError, match="failed") as caught:
        engine.run(*tensors(engine, manifest, rows=2), stream=HOST_STREAM)
    assert (
        caught.value.expected
        and "export" in caught.value.remedy
        and caught.value.__cause__ is not None
    )
    stream = engine.open_stream()
    engine.run(*tensors(engine, manifest, rows=2), stream=stream)
    with pytest.raises(EngineError, match="failed"):
        stream.synchronize()
    engine.run(inputs, out, stream=stream)
    stream.synchronize()
    assert np.array_equal(hu(out), generated)
    engine.close()
