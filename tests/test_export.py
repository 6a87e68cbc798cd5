"""Export: the graph is the contract, and the folder is whole or absent.

What proves it is tested in test_proof.py.
"""

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
from runtime.core.atomic_files import sha256_of
from runtime.core.errors import ModelError
from runtime.core.manifest import Manifest
from train.checkpoint import load_generator, load_run

FILES = ["MODEL_CARD.md", "manifest.json", "model.fp16.onnx", "model.int8.onnx", "model.onnx"]


def graph_of(run_folder: Path) -> LabelsToIntensity:
    run = load_run(run_folder)
    return LabelsToIntensity(load_generator(run_folder), len(run.labels), run.intensity)


def test_model_folder_matches_manifest(model: Path, trained: Path) -> None:
    manifest, run = Manifest.load(model), load_run(trained)
    assert sorted(p.name for p in model.iterdir()) == FILES
    assert sorted(manifest.files) == FILES[2:]
    manifest.verify(model, manifest.files)
    assert (manifest.labels, manifest.grid, manifest.intensity) == (
        run.labels,
        run.grid,
        run.intensity,
    )
    assert manifest.noise and manifest.style == 0
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.training["weights_sha256"] == sha256_of(trained / "generator.safetensors")


def test_model_has_no_patient_or_path(model: Path, cohort: Path) -> None:
    text = "".join(repr(path.read_bytes()) for path in model.iterdir())
    assert (
        "ct_train" not in text and str(cohort) not in text and str(cohort.parent.parent) not in text
    )


# What TensorRT's parser documents (onnx-tensorrt, docs/operators.md) of what our networks are made
# of
PARSED = {
    "Add",
    "BatchNormalization",
    "Cast",
    "Clip",
    "Concat",
    "Constant",
    "Conv",
    "ConvTranspose",
    "DepthToSpace",
    "Div",
    "Equal",
    "Floor",
    "Gather",
    "Gemm",
    "LeakyRelu",
    "Less",
    "MatMul",
    "Mul",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Resize",
    "Round",
    "Shape",
    "Sigmoid",
    "Slice",
    "Split",
    "Sub",
    "Transpose",
    "Unsqueeze",
    "Where",
}
ONNX = onnx.TensorProto
INNER = {
    "model.onnx": {ONNX.FLOAT, ONNX.BOOL, ONNX.INT64},
    "model.fp16.onnx": {ONNX.FLOAT, ONNX.FLOAT16, ONNX.BOOL, ONNX.INT64},
}


def check_for_tensorrt(path: Path, inner: set[int]) -> None:
    """uint8 as input and output only, no int16, first node Cast(FLOAT), last Cast(UINT8),
    nothing the parser does not take.
    """
    model = onnx.load(path)
    assert model.opset_import[0].version == 21 and {n.op_type for n in model.graph.node} <= PARSED
    assert [(n.op_type, n.attribute[0].i) for n in model.graph.node if "ct" in n.output] == [
        ("Cast", ONNX.UINT8)
    ]
    for name in ("labels", "noise"):
        assert [(n.op_type, n.attribute[0].i) for n in model.graph.node if name in n.input] == [
            ("Cast", ONNX.FLOAT)
        ], name
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    border = {"labels", "noise", "style", "ct"}
    typed = {
        v.name: v.type.tensor_type.elem_type for v in inferred.value_info if v.name not in border
    }
    produced = {name for node in model.graph.node for name in node.output} - border
    assert produced <= set(typed), "a tensor without a type is not checked"
    assert {*typed.values(), *(t.data_type for t in model.graph.initializer)} <= inner


@pytest.mark.parametrize("file", INNER)
def test_float_graph_operators_suit_tensorrt(file: str, model: Path) -> None:
    """Float graphs hold only what TensorRT takes."""
    check_for_tensorrt(model / file, INNER[file])


def test_fp16_graph_has_fp16_weights(model: Path) -> None:
    """Every convolution's weights are FP16; what comes after them, where 65536 must fit, is
    FP32.
    """
    graph = onnx.load(model / "model.fp16.onnx").graph
    types = {t.name: t.data_type for t in graph.initializer}
    kernels = [types[n.input[1]] for n in graph.node if n.op_type in ("Conv", "ConvTranspose")]
    assert len(kernels) > 10 and set(kernels) == {ONNX.FLOAT16}
    inferred = onnx.shape_inference.infer_shapes(onnx.load(model / "model.fp16.onnx")).graph
    types |= {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    assert {
        types[n.input[0]] for n in graph.node if n.op_type in ("Sigmoid", "Round", "Clip", "Floor")
    } == {ONNX.FLOAT}
    assert (model / "model.fp16.onnx").stat().st_size < 0.6 * (model / "model.onnx").stat().st_size


def test_int8_graph_quantisation_scheme(
    model: Path,
) -> None:
    """INT8 quantises unsigned activations, and signed weights of each channel."""
    graph = onnx.load(model / "model.int8.onnx").graph
    constants = {t.name: t for t in graph.initializer}
    sources = {name: node for node in graph.node for name in node.output}
    zero_points = [
        constants[n.input[2]].data_type for n in graph.node if n.op_type == "QuantizeLinear"
    ]
    assert zero_points and set(zero_points) == {ONNX.UINT8}
    quantised = [
        n for n in graph.node if n.op_type in ("Conv", "ConvTranspose") and n.input[1] in sources
    ]
    assert len(quantised) == Manifest.load(model).export["int8"]["layers"] > 0
    for node in quantised:
        weights = sources[node.input[1]]
        channels = constants[weights.input[0]].dims[0 if node.op_type == "Conv" else 1]
        assert constants[weights.input[0]].data_type == ONNX.INT8 and list(
            constants[weights.input[1]].dims
        ) == [channels]


def test_batch_norms_are_folded_into_convolutions(model: Path) -> None:
    for file in ("model.onnx", "model.fp16.onnx", "model.int8.onnx"):
        assert not [
            n for n in onnx.load(model / file).graph.node if n.op_type == "BatchNormalization"
        ]


def test_onnx_nodes_have_module_names(model: Path, trained: Path) -> None:
    modules = {f"generator.{name}" for name, _ in load_generator(trained).named_modules()}
    for file in INNER:
        names = [n.name for n in onnx.load(model / file).graph.node]
        assert len(set(names)) == len(names)
        assert {name.split("/")[0] for name in names} - modules <= {"graph", "generator"}
        assert "generator.encoder.0.0/Conv" in names


def test_onnx_output_is_little_endian_hu(trained: Path) -> None:
    class Ramp(torch.nn.Module):
        def forward(self, condition, noise=None, style=None):
            n, _, h, w = condition.shape
            image = torch.linspace(0, 1, n * h * w).reshape(n, 1, h, w)
            return image, image  # without and with texture

    run = load_run(trained)
    graph = LabelsToIntensity(Ramp(), len(run.labels), run.intensity)  # type: ignore[arg-type]
    out = graph(torch.zeros(1, 1, 64, 64, dtype=torch.uint8)).numpy()
    expected = np.rint(np.linspace(0, 1, 4096, dtype=np.float32) * 2048 - 1024)
    assert out.dtype == np.uint8 and np.array_equal(out.view("<i2").ravel(), expected)


def test_labels_reach_their_own_channels(trained: Path) -> None:
    class Weighted(torch.nn.Module):
        def forward(self, condition, noise=None, style=None):
            weights = torch.arange(condition.shape[1]).view(1, -1, 1, 1)
            image = (condition * weights).sum(1, keepdim=True) / 8
            return image, image

    run = load_run(trained)
    labels = np.arange(8, dtype=np.uint8).reshape(1, 1, 2, 4)
    hu = (
        LabelsToIntensity(Weighted(), 8, run.intensity)(torch.from_numpy(labels))
        .numpy()
        .view("<i2")[..., 0]
    )  # type: ignore[arg-type]
    assert np.array_equal(hu[0], np.rint(labels[0, 0] / 8 * 2048 - 1024))


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda r: shutil.rmtree(r), "holds no run.json"),
        (lambda r: (r / "run.json").write_text("{"), "cannot be used"),
        (
            lambda r: save_file(
                {k: v + 1 for k, v in load_file(r / "generator.safetensors").items()},
                r / "generator.safetensors",
            ),
            "generator.safetensors is not the file",
        ),
        (
            lambda r: (r / "validation.safetensors").write_bytes(b""),
            "validation.safetensors is not the file",
        ),
    ],
)
def test_altered_run_is_exit_2(spoil, fact: str, trained: Path, tmp_path: Path, command) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    spoil(run)
    done = command("export/build_engine.py", run, "-o", tmp_path / "model", "--onnx-only")
    assert (
        done.returncode == 2
        and fact in done.stderr
        and "remedy" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "model").exists()


def test_unwritable_export_is_exit_4(trained: Path, tmp_path: Path, command) -> None:
    (tmp_path / "file").write_text("")
    done = command(
        "export/build_engine.py",
        trained,
        "-o",
        tmp_path / "file" / "model",
        "--onnx-only",
        "--quiet",
    )
    assert (
        done.returncode == 4
        and "cannot be written" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.slow
def test_required_engine_without_builder_is_exit_3(
    trained: Path, model: Path, tmp_path: Path, command
) -> None:
    """The validated ONNX model replaces the older one completely."""
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("of an older version")
    done = command("export/build_engine.py", trained, "-o", tmp_path / "model", "--require-engine")
    assert done.returncode == 3 and "TensorRT" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == FILES
    Manifest.load(tmp_path / "model").verify(tmp_path / "model", FILES[2:])
    for name in FILES[2:]:  # the same run is the same files, whatever hash seed the process had
        assert sha256_of(tmp_path / "model" / name) == sha256_of(model / name), name


def test_load_generator_needs_folder_alone(trained: Path) -> None:
    """`load_generator` rebuilds the network from the model folder alone."""
    net = load_generator(trained)
    stored = load_file(trained / "generator.safetensors")
    assert not net.training and set(net.state_dict()) == set(stored)
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())


def test_model_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_run(tmp_path / "nowhere")
    assert caught.value.file == tmp_path / "nowhere"
