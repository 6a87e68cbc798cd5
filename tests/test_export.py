"""Export: the graph is the contract, the proof finds what is wrong, and the folder is whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.graph import LabelsToIntensity
from export.model_folder import write_model
from export.parity import FP32_MAX, measure, random_inputs, require
from runtime.contract import Manifest
from runtime.engines.onnx import OnnxEngine
from runtime.errors import ModelError, ParityError
from runtime.files import sha256_of
from train.checkpoint import load_generator, load_run, load_validation


def graph_of(run_folder: Path) -> LabelsToIntensity:
    run = load_run(run_folder)
    return LabelsToIntensity(load_generator(run_folder), len(run.labels), run.intensity)


def test_the_model_folder_holds_what_its_manifest_says(model: Path, trained: Path) -> None:
    manifest, run = Manifest.load(model), load_run(trained)
    assert sorted(p.name for p in model.iterdir()) == ["manifest.json", "model.onnx"]
    manifest.verify(model, manifest.files)
    assert (manifest.labels, manifest.grid, manifest.intensity) == (run.labels, run.grid, run.intensity)
    assert manifest.noise and manifest.style == 0
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.training["weights_sha256"] == sha256_of(trained / "generator.safetensors")


def test_the_manifest_carries_the_measured_parity(model: Path) -> None:
    (proof,) = Manifest.load(model).parity["model.onnx"].values()
    assert set(proof) == {"validation masks", "random labels"}
    for numbers in proof.values():
        assert numbers["slices"] >= 8 and 0 <= numbers["max"] <= FP32_MAX and numbers["differing"] < 0.01


def test_no_patient_or_path_reaches_the_model(model: Path, cohort: Path) -> None:
    text = (model / "manifest.json").read_text() + repr((model / "model.onnx").read_bytes())
    assert "ct_train" not in text and str(cohort) not in text and str(cohort.parent.parent) not in text


def test_uint8_stays_at_the_border(model: Path) -> None:
    """TensorRT takes uint8 as input and output only, and has no int16."""
    graph = onnx.load(model / "model.onnx")
    assert graph.opset_import[0].version == 21
    nodes = graph.graph.node
    for name in ("labels", "noise"):
        assert [n.op_type for n in nodes if name in n.input] == ["Cast"], name
    assert [n.op_type for n in nodes if "ct" in n.output] == ["Cast"]
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    inner = {v.type.tensor_type.elem_type for v in inferred.value_info}
    assert inner <= {onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64}


def test_batch_height_and_width_are_dynamic(model: Path, trained: Path) -> None:
    engine, graph = OnnxEngine(model / "model.onnx", Manifest.load(model)), graph_of(trained)
    for rows, columns in ((1, 1), (3, 2)):
        d, z = load_run(trained).grid.divisor, load_run(trained).grid.slices
        parity = measure(graph, engine, random_inputs(3, z, (rows * d, columns * d), 8))
        assert parity.slices == 3 and parity.max <= FP32_MAX


def test_the_graph_paints_hu_as_little_endian_bytes(trained: Path) -> None:
    class Ramp(torch.nn.Module):
        def forward(self, condition, noise=None, style=None):
            n, _, h, w = condition.shape
            return torch.linspace(0, 1, n * h * w).reshape(n, 1, h, w)

    run = load_run(trained)
    graph = LabelsToIntensity(Ramp(), len(run.labels), run.intensity)  # type: ignore[arg-type]
    out = graph(torch.zeros(1, 1, 64, 64, dtype=torch.uint8)).numpy()
    expected = np.rint(np.linspace(0, 1, 4096, dtype=np.float32) * 2048 - 1024)
    assert out.dtype == np.uint8 and np.array_equal(out.view("<i2").ravel(), expected)


def test_labels_reach_their_own_channels(trained: Path) -> None:
    class Weighted(torch.nn.Module):
        def forward(self, condition, noise=None, style=None):
            return (condition * torch.arange(condition.shape[1]).view(1, -1, 1, 1)).sum(1, keepdim=True) / 8

    run = load_run(trained)
    labels = np.arange(8, dtype=np.uint8).reshape(1, 1, 2, 4)
    hu = LabelsToIntensity(Weighted(), 8, run.intensity)(torch.from_numpy(labels)).numpy().view("<i2")[..., 0]  # type: ignore[arg-type]
    assert np.array_equal(hu[0], np.rint(labels[0, 0] / 8 * 2048 - 1024))


def test_altered_weights_in_the_exported_graph_are_caught_and_nothing_is_written(
    trained: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph whose two label channels were swapped on the way into the file."""
    from export import model_folder

    def swapped(graph, specs, divisor, path) -> None:
        real(graph, specs, divisor, path)
        proto = onnx.load(path)
        weights = max((t for t in proto.graph.initializer if len(t.dims) == 4 and t.dims[1] == 24), key=lambda t: t.dims[2])
        array = onnx.numpy_helper.to_array(weights).copy()
        array[:, [8, 11]] = array[:, [11, 8]]  # of the middle slice of three
        weights.CopyFrom(onnx.numpy_helper.from_array(array, weights.name))
        onnx.save(proto, path)

    real = model_folder.to_onnx
    monkeypatch.setattr(model_folder, "to_onnx", swapped)
    with pytest.raises(ParityError, match="paints other values than the network on validation masks"):
        write_model(load_run(trained), graph_of(trained), load_validation(load_run(trained)), tmp_path / "model", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_parity_counts_every_hu(trained: Path, model: Path) -> None:
    """A graph that is 2 HU higher everywhere differs by exactly 2 at every pixel."""
    graph = graph_of(trained)
    graph.low, graph.high = graph.low + 2, graph.high + 2
    labels = random_inputs(2, 3, (64, 64), 8)
    parity = measure(graph, OnnxEngine(model / "model.onnx", Manifest.load(model)), labels)
    assert 2 <= parity.max <= 3 and abs(parity.mean - 2) < 0.01 and parity.differing == 1.0
    with pytest.raises(ParityError):
        require(parity, "model.onnx", "random labels")


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda r: shutil.rmtree(r), "holds no run.json"),
        (lambda r: (r / "run.json").write_text("{"), "cannot be used"),
        (
            lambda r: save_file({k: v + 1 for k, v in load_file(r / "generator.safetensors").items()}, r / "generator.safetensors"),
            "generator.safetensors is not the file",
        ),
        (lambda r: (r / "validation.safetensors").write_bytes(b""), "validation.safetensors is not the file"),
    ],
)
def test_a_run_that_was_altered_is_refused_with_exit_2(spoil, fact: str, trained: Path, tmp_path: Path, command) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    spoil(run)
    done = command("export/build_engine.py", run, "-o", tmp_path / "model", "--onnx-only")
    assert done.returncode == 2 and fact in done.stderr and "remedy" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()


def test_an_engine_that_cannot_be_built_is_exit_3_and_the_onnx_model_is_kept(trained: Path, tmp_path: Path, command) -> None:
    done = command("export/build_engine.py", trained, "-o", tmp_path / "model")
    assert done.returncode == 3 and "TensorRT" in done.stderr and "Traceback" not in done.stderr
    Manifest.load(tmp_path / "model").verify(tmp_path / "model", ["model.onnx"])


def test_an_output_that_cannot_be_written_is_exit_4(trained: Path, tmp_path: Path, command) -> None:
    (tmp_path / "file").write_text("")
    done = command("export/build_engine.py", trained, "-o", tmp_path / "file" / "model", "--onnx-only", "--quiet")
    assert done.returncode == 4 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_a_second_export_replaces_the_first_whole(trained: Path, model: Path, tmp_path: Path, command) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("of an older version")
    assert command("export/build_engine.py", trained, "-o", tmp_path / "model", "--onnx-only", "--quiet").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["manifest.json", "model.onnx"]


def test_load_generator_rebuilds_the_network_from_the_folder_alone(trained: Path) -> None:
    net = load_generator(trained)
    stored = load_file(trained / "generator.safetensors")
    assert not net.training and set(net.state_dict()) == set(stored)
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())


def test_model_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_run(tmp_path / "nowhere")
    assert caught.value.file == tmp_path / "nowhere"
