"""One suite for every engine: whatever runs the graph, the synthesizer may rely on this."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.contract import Manifest
from runtime.engines.base import Engine, EngineError
from runtime.engines.fake import FakeEngine, fake_manifest
from runtime.engines.registry import BACKENDS, open_engine
from runtime.memory import HOST_STREAM


def open_fake(model: Path) -> tuple[Engine, Manifest]:
    manifest = fake_manifest()
    return FakeEngine(manifest), manifest


def opener(name: str) -> Callable[[Path], tuple[Engine, Manifest]]:
    def open_backend(model: Path) -> tuple[Engine, Manifest]:
        manifest = Manifest.load(model)
        return open_engine(name, manifest, model)[0], manifest

    return open_backend


ENGINES = {"fake": open_fake, **{backend.name: opener(backend.name) for backend in BACKENDS}}


@pytest.fixture(params=ENGINES)
def opened(request: pytest.FixtureRequest, model: Path):
    engine, manifest = ENGINES[request.param](model)
    yield engine, manifest
    engine.close()


def tensors(engine: Engine, manifest: Manifest, rows: int = 1, seed: int = 0):
    """Random inputs for one call, H = rows x the canvas, and an output buffer."""
    rng = np.random.default_rng(seed)
    n, (h, w) = engine.spec.batch, manifest.grid.canvas
    h *= rows
    inputs = {"labels": rng.integers(0, len(manifest.labels), (n, manifest.grid.slices, h, w), np.uint8)}
    if manifest.noise:
        inputs["noise"] = rng.integers(0, 256, (n, h, w), np.uint8)
    return inputs, np.full((n, h, w, 2), 0xAB, np.uint8)


def hu(out: np.ndarray) -> np.ndarray:
    return out.view("<i2")[..., 0].copy()


def test_it_is_an_engine(opened) -> None:
    engine, _ = opened
    assert isinstance(engine, Engine) and engine.name


def test_the_result_fills_the_buffer_within_the_models_range(opened) -> None:
    engine, manifest = opened
    inputs, out = tensors(engine, manifest)
    engine.run(inputs, out, stream=HOST_STREAM)
    values = hu(out)
    assert values.min() >= manifest.intensity.low and values.max() <= manifest.intensity.high
    assert len(np.unique(values)) > 8


def test_same_inputs_same_bytes_and_inputs_are_left_alone(opened) -> None:
    engine, manifest = opened
    inputs, out = tensors(engine, manifest)
    before = {name: array.copy() for name, array in inputs.items()}
    engine.run(inputs, out, stream=HOST_STREAM)
    first = hu(out)
    engine.run(*tensors(engine, manifest, seed=9), stream=HOST_STREAM)
    engine.run(inputs, out, stream=HOST_STREAM)
    assert np.array_equal(hu(out), first)
    assert all(np.array_equal(inputs[name], before[name]) for name in inputs)


def test_a_slice_does_not_depend_on_its_place_in_the_batch_nor_on_its_neighbours(opened) -> None:
    engine, manifest = opened
    a, out = tensors(engine, manifest, seed=1)
    b, _ = tensors(engine, manifest, seed=2)

    def paint(*slices: dict) -> list[np.ndarray]:
        """Slices in this order, in as many calls as the engine's batch takes, padded with zeros."""
        painted = []
        for start in range(0, len(slices), engine.spec.batch):
            part = slices[start : start + engine.spec.batch]
            inputs = {name: np.zeros_like(array) for name, array in a.items()}
            for n, one in enumerate(part):
                for name in inputs:
                    inputs[name][n] = one[name]
            engine.run(inputs, out, stream=HOST_STREAM)
            painted += list(hu(out)[: len(part)])
        return painted

    first, second = ({name: array[0] for name, array in inputs.items()} for inputs in (a, b))
    alone = paint(first)[0]
    for order in ((first, second), (second, first), (second, second, first)):
        places = [n for n, one in enumerate(order) if one is first]
        assert all(np.array_equal(paint(*order)[n], alone) for n in places)
    assert not np.array_equal(paint(second)[0], alone)


def test_the_shape_may_change_from_call_to_call(opened) -> None:
    engine, manifest = opened
    for rows in (1, 2, 1):
        inputs, out = tensors(engine, manifest, rows)
        engine.run(inputs, out, stream=HOST_STREAM)
        assert not (out == 0xAB).all(-1).any()


def test_noise_changes_the_image_and_labels_do(opened) -> None:
    engine, manifest = opened
    inputs, out = tensors(engine, manifest)
    engine.run(inputs, out, stream=HOST_STREAM)
    first = hu(out)
    for name in inputs:
        changed = {**inputs, name: np.ascontiguousarray(inputs[name][..., ::-1])}
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
        lambda i, o: ({**i, "style": np.zeros((1, 4), np.float32)}, o),
    ],
)
def test_tensors_that_break_the_contract_are_refused(opened, broken) -> None:
    engine, manifest = opened
    inputs, out = broken(*tensors(engine, manifest))
    with pytest.raises(EngineError):
        engine.run(inputs, out, stream=HOST_STREAM)


def test_use_after_close_is_refused_and_closing_twice_is_harmless(opened) -> None:
    engine, manifest = opened
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(*tensors(engine, manifest), stream=HOST_STREAM)
