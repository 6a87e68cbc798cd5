"""The proof: what it measures is right, it names what is wrong and where, and nothing is written
then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export import error_localization, model_folder, parity
from export.graph import LabelsToIntensity, fuse_batch_norm
from export.model_folder import FILES, validate, write_model
from export.quantize import candidates
from runtime.core.errors import ParityError
from runtime.core.manifest import Manifest
from runtime.engines.cpu.onnxruntime import OnnxEngine
from runtime.engines.registry import BACKENDS
from train.checkpoint import load_calibration, load_generator, load_run, load_validation
from train.networks.blocks import ARCHITECTURES


@pytest.fixture(scope="module")
def graph(trained: Path) -> LabelsToIntensity:
    run = load_run(trained)
    return LabelsToIntensity(load_generator(trained), len(run.labels), run.intensity)


@pytest.fixture(scope="module")
def manifest(model: Path) -> Manifest:
    return Manifest.load(model)


@pytest.fixture(scope="module")
def references_by_name(
    graph: LabelsToIntensity, manifest: Manifest, trained: Path
) -> dict[str, parity.Reference]:
    return parity.references(graph, manifest, load_validation(load_run(trained)))


def test_validation_covers_every_installed_backend(manifest: Manifest) -> None:
    """Every file of the model is validated in every backend that is installed."""
    assert {f.precision for f in manifest.files.values()} == {"fp32", "fp16", "int8"}
    for name, file in manifest.files.items():
        here = {
            b.name
            for b in BACKENDS
            if b.file == (file.kind, file.precision) and b.uninstalled() is None
        }
        assert here and set(manifest.parity[name]) == here
        for proof in manifest.parity[name].values():
            masks = proof[parity.ON_MASKS]
            assert (
                masks["slices"] >= 64
                and masks["masks"] == 32
                and proof[parity.ON_RANDOM]["slices"] == 8
            )
            assert all(
                value <= limit
                for value, limit in parity.limit_violations(file.precision, masks).values()
            )
            assert (
                proof["engine"].split()[0] in ("onnxruntime", "openvino")
                and proof["slices_per_second"] > 0
            )
    assert all(p[parity.ON_RANDOM]["max"] <= 1 for p in manifest.parity["model.onnx"].values())


def test_calibration_validation_use_different_patients(trained: Path, manifest: Manifest) -> None:
    run = load_run(trained)
    ours, theirs = load_validation(run), load_calibration(run)
    assert (
        theirs is not None
        and ours.shape[1:] == theirs.shape[1:] == (manifest.grid.slices, 64, 64)
        and len(theirs) == 64
    )
    shared = {m.tobytes() for m in ours if m.any()} & {m.tobytes() for m in theirs if m.any()}
    assert not shared and manifest.export["int8"]["calibrated_on"] == "training masks"


def test_validation_figures_are_image_differences(
    graph: LabelsToIntensity, manifest: Manifest
) -> None:
    """Images that are 2 HU too high everywhere, and 30 too high at one pixel."""
    truth = parity.reference(
        graph,
        parity.draw_inputs(
            manifest.inputs, parity.random_labels(2, manifest.grid.slices, (64, 64), 8)
        ),
    )
    generated = truth.values + np.int16(2)
    generated[1, 10, 20] += 28
    numbers = parity.compare(truth, generated, manifest)
    pixels = generated.size
    assert numbers["slices"] == 2 and numbers["max"] == 30 and numbers["differing"] == 1.0
    assert numbers["mean"] == pytest.approx(2 + 28 / pixels, abs=1e-6) and numbers["p99_9"] == 2
    assert set(numbers["organs"].values()) == {2.0} and len(numbers["organs"]) == 7
    assert 0 < numbers["dssim"] < 0.01
    assert parity.compare(truth, truth.values, manifest)["dssim"] == 0
    assert parity.limit_violations("fp16", numbers)["organs"] == (2.0, 1)


def test_onnx_batch_height_width_are_dynamic(
    model: Path, graph: LabelsToIntensity, manifest: Manifest
) -> None:
    d = manifest.grid.divisor
    for rows, columns in ((1, 1), (3, 2)):
        labels = parity.random_labels(3, manifest.grid.slices, (rows * d, columns * d), 8)
        truth = parity.reference(graph, parity.draw_inputs(manifest.inputs, labels))
        generated, _ = parity.run_engine(OnnxEngine(model / "model.onnx", manifest), truth.inputs)
        assert (
            generated.shape == (3, rows * d, columns * d)
            and np.abs(generated - truth.values).max() <= 1
        )


def altered(path: Path, where: str, change: Callable[[Any], Any], part: int = 1) -> None:
    """Rewrite the weights (or another `part` of the inputs) of the node of that name."""
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.name == where)
    tensor = next(t for t in model.graph.initializer if t.name == node.input[part])
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(
        onnx.numpy_helper.from_array(change(array.copy()).astype(array.dtype), tensor.name)
    )
    onnx.save(model, path)


def swap_channels(weights: Any) -> Any:
    weights[:, [8, 11]] = weights[
        :, [11, 8]
    ]  # background and left ventricle of the middle slice of three
    return weights


def flush_small(weights: Any) -> Any:
    return np.where(
        np.abs(weights) < np.quantile(np.abs(weights), 0.6), 0, weights
    )  # as a conversion with too narrow a range would


DEFECTS: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "swapped label channel": (
        "fp32",
        lambda p: altered(p, "generator.encoder.0.0/Conv", swap_channels),
        "the largest difference",
        "encoder.0 ",
    ),
    "broken half conversion": (
        "fp16",
        lambda p: altered(p, "generator.decoder.3.0/ConvTranspose", flush_small),
        "model.fp16.onnx in ",
        "decoder.3 ",
    ),
    "wrong scale of HU": (
        "fp32",
        lambda p: altered(p, "graph/Mul", lambda v: v * 1.01),
        "model.onnx in ",
        "image in HU ",
    ),
    "too coarse INT8": (
        "int8",
        lambda p: altered(p, "generator.encoder.1.0/Conv", lambda b: b + 3, part=2),
        "model.int8.onnx in ",
        "encoder.1 ",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_validation_error_names_defective_region(
    defect: str,
    model: Path,
    graph: LabelsToIntensity,
    manifest: Manifest,
    references_by_name: dict[str, parity.Reference],
    tmp_path: Path,
) -> None:
    precision, spoil, fact, region = DEFECTS[defect]
    path = tmp_path / FILES[precision]
    shutil.copy(model / path.name, path)
    validate(graph, path, precision, manifest, references_by_name, lambda _: None)
    spoil(path)
    with pytest.raises(
        ParityError, match="synthesizes other values than the network on validation masks"
    ) as caught:
        validate(graph, path, precision, manifest, references_by_name, lambda _: None)
    assert (
        fact in caught.value.fact
        and caught.value.exit_code == 1
        and "at most" in caught.value.expected
    )
    (worst,) = [
        line for line in str(caught.value).splitlines() if line.endswith("<- the worst stage")
    ]
    assert worst.strip().startswith(region)


@pytest.mark.parametrize("precision", [p for p in FILES if p != "int8-gpu"])  # opt-in
def test_validation_names_truncated_file(
    precision: str,
    model: Path,
    graph: LabelsToIntensity,
    manifest: Manifest,
    references_by_name: dict[str, parity.Reference],
    tmp_path: Path,
) -> None:
    path = tmp_path / FILES[precision]
    whole = (model / path.name).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ParityError, match=f"{path.name} does not run in openvino"):
        validate(graph, path, precision, manifest, references_by_name, lambda _: None)


def test_failed_validation_writes_no_model(
    model: Path,
    trained: Path,
    graph: LabelsToIntensity,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def swapped(graph: LabelsToIntensity, manifest: Manifest, path: Path) -> None:
        shutil.copy(model / path.name, path)
        altered(path, "generator.encoder.0.0/Conv", swap_channels)

    monkeypatch.setattr(model_folder, "to_onnx", swapped)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("an older one")
    run = load_run(trained)
    with pytest.raises(ParityError, match=r"model\.onnx in openvino"):
        write_model(
            run,
            graph,
            load_validation(run),
            load_calibration(run),
            tmp_path / "model",
            say=lambda _: None,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "manifest.json").read_text() == "an older one"


def write_again(graph: LabelsToIntensity, trained: Path, folder: Path) -> tuple[Manifest, str]:
    run, said = load_run(trained), []
    manifest = write_model(
        run, graph, load_validation(run), load_calibration(run), folder, say=said.append
    )
    return manifest, "\n".join(said)


@pytest.mark.slow
def test_int8_layers_failing_validation_stay_float(
    graph: LabelsToIntensity, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training masks that find nothing wrong: what they let pass, the proof's do not, and the
    export still ends with a file that holds.
    """
    monkeypatch.setattr(model_folder, "MARGIN", 1e9)
    monkeypatch.setattr(
        parity, "LIMITS", {**parity.LIMITS, "int8": {"body_mean": 1.5, "organs": 3}}
    )
    found, said = write_again(graph, trained, tmp_path / "model")
    assert (
        "not taken: model.int8.onnx in openvino-int8 synthesizes other values" in said
        and "<- the worst stage" in said
    )
    assert 0 < found.export["int8"]["layers"] < found.export["int8"]["of"]
    assert all(
        proof[parity.ON_MASKS]["body_mean"] <= 1.5
        for proof in found.parity["model.int8.onnx"].values()
    )


@pytest.mark.slow
def test_int8_file_failing_validation_is_omitted(
    graph: LabelsToIntensity, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An INT8 file that passes its validation in no form is left out of the model."""
    monkeypatch.setattr(parity, "LIMITS", {**parity.LIMITS, "int8": {"body_mean": 0, "organs": 3}})
    monkeypatch.setattr(model_folder, "candidates", lambda *given: islice(candidates(*given), 1))
    found, said = write_again(graph, trained, tmp_path / "model")
    assert set(found.files) == {"model.onnx", "model.fp16.onnx"} == set(found.parity)
    assert (
        not (tmp_path / "model" / "model.int8.onnx").exists()
        and found.export["int8"]["layers"] == 0
    )
    assert "model.int8.onnx is left out: no layer can be quantized" in said


def test_validation_masks_come_from_all_patients() -> None:
    """Masks come from all patients and not from the first alone."""
    assert list(model_folder.spread(48, 4)) == [0, 16, 31, 47] and list(
        model_folder.spread(5, 5)
    ) == [0, 1, 2, 3, 4]
    assert list(model_folder.spread(1, 3)) == [0, 0, 0]


def test_small_slices_synthesized_until_medians_stable(
    manifest: Manifest,
) -> None:
    """The same masks with other noise: an organ of a few hundred pixels has another median each
    time.
    """
    masks = parity.random_labels(3, manifest.grid.slices, (64, 64), 8)
    many = parity.repeated(masks, 64, manifest.inputs)
    assert len(many) * 64 * 64 >= 2**20 and all(
        np.array_equal(many[n], masks[n % 3]) for n in range(0, len(many), 7)
    )
    labels_alone = tuple(tensor for tensor in manifest.inputs if tensor.name == "labels")
    assert (
        len(parity.repeated(masks, 64, labels_alone)) == 64
    )  # synthesized again it would be the same
    assert len(parity.repeated(np.zeros((80, 1, 256, 256), np.uint8), 64, manifest.inputs)) == 80


def test_int8_channel_rescaling_passes_validation(
    graph: LabelsToIntensity, model: Path, references_by_name: dict[str, parity.Reference]
) -> None:
    """Fitting brings channels nearer to one range; the layers after undo it, and the image is
    right.
    """
    for region in error_localization.stage_errors(
        graph, model / "model.int8.onnx", references_by_name[parity.ON_MASKS].inputs
    ):
        assert region.error < 0.25, region


def test_validation_without_body_uses_whole_slice() -> None:
    numbers = {"mean": 9.0, "body_mean": None, "organs": {"aorta": None}}
    assert parity.limit_violations("int8", numbers) == {"body_mean": (9.0, 8), "organs": (0.0, 3)}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fp16_batchnorm_folding_for_style_networks(kind: str, manifest: Manifest) -> None:
    """In torch, before any file: folded batch norms change rounding only, and halves stay within
    their limits.
    """
    from export.graph import to_fp16
    from train.networks.generator import Generator, initialise

    torch.manual_seed(0)
    net = Generator(
        24, kind=kind, filters=8, depth=3, skips=True, textures=4, texture_kernel=7, style=4
    )
    initialise([net])
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    graph = LabelsToIntensity(net, 8, manifest.intensity)
    inputs = {
        "labels": torch.randint(0, 8, (2, 3, 32, 32), dtype=torch.uint8),
        "style": torch.randn(2, 4),
        "noise": torch.randint(0, 256, (2, 32, 32), dtype=torch.uint8),
    }

    def hu(graph: LabelsToIntensity) -> Any:
        with torch.inference_mode():
            return graph(**inputs).numpy().view("<i2")[..., 0].astype(int)

    truth, flat = hu(graph), fuse_batch_norm(graph)
    assert np.abs(hu(flat) - truth).max() <= 1 and len(np.unique(truth)) > 50
    left = [m for m in flat.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(left) == (
        2 if kind == "reference" else 0
    )  # there the norm follows an activation, as in the original
    delta = np.abs(hu(to_fp16(flat)) - truth)
    assert 0 < delta.mean() <= 1 and np.percentile(delta, 99.9) <= 10
    assert all(p.dtype == torch.float32 for p in graph.parameters()), (
        "the network itself is left as it was"
    )


def test_ssim_agrees_with_torchmetrics() -> None:
    """In the export it is measured without that package, which would leave a list of fonts
    behind.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as reference

    generator = torch.Generator().manual_seed(7)
    x = 2048 * torch.rand(3, 1, 40, 56, generator=generator) - 1024
    for noise in (0.0, 1.0, 300.0):
        y = x + noise * torch.randn(x.shape, generator=generator)
        expected = float(reference(y, x, data_range=2048.0, kernel_size=11))
        assert parity.similarity(y, x, 2048.0) == pytest.approx(expected, abs=1e-6)
    assert parity.similarity(x, x, 2048.0) == pytest.approx(1.0, abs=1e-6)
