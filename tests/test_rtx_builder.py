"""Every graph in NVIDIA's own parser and builder, without a GPU.

TensorRT for RTX has TensorRT's ONNX parser and builds on a CPU. What it refuses here, TensorRT
would refuse on a GPU machine.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from bindings import folder as bindings_folder
from bindings import python
from onnx import TensorProto, helper, numpy_helper
from samples import write_fake_model

from export.attach_engine import CAPABILITIES, add_engine
from export.graph import LabelsToIntensity, to_fp16
from export.parity import draw_inputs, run_engine
from export.quantize import Quantizer
from export.to_onnx import to_onnx
from export.to_tensorrt import FOR_RTX, BuildOptions, Built, build, parse, shapes_of
from export.weight_reconstruction import ASYMMETRIC, SYMMETRIC
from runtime.core.atomic_files import sha256_of
from runtime.core.errors import BuildError
from runtime.core.labels import MM_WHS
from runtime.core.manifest import GridPolicy, Intensity, Manifest, ModelFile
from runtime.engines.gpu.probe import why_no_gpu
from runtime.engines.gpu.tensorrt import collecting_logger
from runtime.engines.registry import BACKENDS, open_engine
from train.networks.blocks import ARCHITECTURES
from train.networks.generator import Generator, initialise

GRID = GridPolicy((32, 32), (3.0, 3.0), 8, slices=3, slice_spacing=9.0)


@pytest.fixture(scope="module")
def trt() -> Any:
    """The real builder: installed, or where `make tensorrt-bindings` put it."""
    try:
        return FOR_RTX.load()
    except ImportError:
        sys.path.append(str(bindings_folder("rtx")))
        return FOR_RTX.load()


def random_network(kind: str, style: int, noise: bool) -> tuple[Manifest, LabelsToIntensity]:
    """A network of an architecture with random weights, and its manifest without files."""
    import torch

    torch.manual_seed(1)
    textures = 4 if noise else 0
    generator = Generator(
        GRID.slices * len(MM_WHS),
        kind=kind,
        filters=8,
        depth=3,
        skips=True,
        textures=textures,
        style=style,
    )
    initialise([generator])
    intensity = Intensity("HU", -1024, 1024)
    manifest = Manifest("random", MM_WHS, GRID, intensity, style=style, noise=noise, files={})
    return manifest, LabelsToIntensity(generator, len(MM_WHS), intensity)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    """A model folder with the FP32 and the FP16 graph of a network with every input."""
    folder = tmp_path_factory.mktemp("exported")
    manifest, graph = random_network("edge", style=2, noise=True)
    files = {}
    for name, precision, network in (
        ("model.onnx", "fp32", graph),
        ("model.fp16.onnx", "fp16", to_fp16(graph)),
    ):
        to_onnx(network, manifest, folder / name)
        size, digest = (folder / name).stat().st_size, sha256_of(folder / name)
        files[name] = ModelFile("onnx", precision, size, digest)
    manifest = replace(manifest, files=files)
    write_fake_model(folder, manifest)
    return manifest, folder


def built(onnx_file: Path, manifest: Manifest, trt: Any) -> Built:
    return build(onnx_file, shapes_of(manifest, 4), BuildOptions(), target=FOR_RTX, trt=trt)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_real_builder_takes_every_architecture(kind: str, trt: Any, tmp_path: Path) -> None:
    """FP32 and FP16 are built, and every convolution that NVIDIA's parser saw has that type."""
    manifest, graph = random_network(kind, style=2, noise=True)
    for half, network in ((0, graph), (1, to_fp16(graph))):
        path = tmp_path / f"{half}.onnx"
        to_onnx(network, manifest, path)
        engine = built(path, manifest, trt)
        assert engine.layers.half == half and engine.version == trt.__version__
        assert engine.plan


@pytest.mark.slow
def test_real_builder_takes_exported_files(model: Path, trt: Any) -> None:
    """Each graph of a model folder, as its manifest lists them: a new one joins by itself."""
    manifest = Manifest.load(model)
    graphs = {name: file for name, file in manifest.files.items() if file.kind == "onnx"}
    assert {"fp32", "fp16"} <= {file.precision for file in graphs.values()}
    for name, file in graphs.items():
        if file.precision == "int8":  # the form for CPUs, which test_..._unsigned_int8 pins
            continue
        assert built(model / name, manifest, trt).plan


POLYGRAPHY = """
import sys, {module} as trt
sys.modules["tensorrt_rtx"] = trt
sys.argv = ["polygraphy", "inspect", "capability", sys.argv[1]]
from polygraphy.tools import main
sys.exit(main())
"""


@pytest.mark.slow
def test_polygraphy_finds_graph_supported(
    exported: tuple[Manifest, Path], trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's own tool is a second opinion: the graph is supported as a whole."""
    if not (bindings_folder("rtx") / "polygraphy").is_dir():
        pytest.skip("Polygraphy is not installed: make tensorrt-bindings")
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    monkeypatch.chdir(tmp_path)  # it leaves files where it finds parts that are not supported
    code = POLYGRAPHY.format(module=trt.__name__)
    done = python(code, str(exported[1] / "model.fp16.onnx"), path=bindings_folder("rtx"))
    assert done.returncode == 0 and "Graph is fully supported by TensorRT" in done.stdout, (
        done.stderr
    )


@pytest.mark.slow
def test_rtx_engine_is_listed_unvalidated(
    exported: tuple[Manifest, Path], trt: Any, tmp_path: Path, root: Path
) -> None:
    """An engine built without a GPU is in the manifest with what it is tied to, and no backend
    takes it by itself.
    """
    manifest, source = exported
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    said: list[str] = []
    written = add_engine(
        folder,
        BuildOptions(),
        None,
        gpu=None,
        say=said.append,
        target=FOR_RTX,
        quiet=True,
        trt=trt,
    )
    assert written == Manifest.load(folder)
    written.verify(folder, written.files)
    engine = written.files[FOR_RTX.file]
    assert (engine.kind, engine.precision) == ("rtx-engine", "fp16")
    assert engine.facts["tensorrt_rtx"] == trt.__version__
    assert engine.facts["compute_capabilities"] == list(CAPABILITIES)
    assert engine.facts["onnx_sha256"] == manifest.files["model.fp16.onnx"].sha256
    assert engine.facts["half_network"] == 1
    schema = json.loads((root / "runtime/manifest.schema.json").read_text())["properties"]["files"]
    jsonschema.validate(json.loads((folder / "manifest.json").read_text())["files"], schema)
    backend = next(b for b in BACKENDS if b.name == "tensorrt-rtx")
    assert not backend.validated(written) and "compute capabilities 8.0, 8.6" in said[0]
    if why_no_gpu():
        with pytest.raises(Exception, match="cannot run this model here") as caught:
            open_engine("tensorrt-rtx", written, folder)
        assert caught.value.exit_code == 3


@pytest.mark.slow
def test_real_builder_takes_symmetric_int8(
    exported: tuple[Manifest, Path], trt: Any, tmp_path: Path
) -> None:
    """The INT8 form for CPUs is refused, the symmetric one is built."""
    manifest, folder = exported
    shutil.copy(folder / "model.onnx", tmp_path / "fp32.onnx")  # others are written beside it
    masks = np.random.default_rng(0).integers(0, 3, (4, 3, 32, 32), np.uint8)
    inputs = draw_inputs(manifest.inputs, masks)
    for name, steps in (("unsigned", ASYMMETRIC), ("symmetric", SYMMETRIC)):
        Quantizer(tmp_path / "fp32.onnx", inputs, steps).write(tmp_path / f"{name}.onnx", ())
    with pytest.raises(BuildError, match=r"unsigned.onnx, 1 errors") as caught:
        built(tmp_path / "unsigned.onnx", manifest, trt)
    assert "DequantizeLinear" in caught.value.rows[0]
    assert built(tmp_path / "symmetric.onnx", manifest, trt).plan
    # and both CPU engines compute the same from it, as its parity check needs
    values = []
    for name in ("onnx-int8-gpu", "openvino-int8-gpu"):
        backend = next(backend for backend in BACKENDS if backend.name == name)
        if backend.missing():
            pytest.skip(f"{backend.module} is not installed")
        engine = backend.open(tmp_path / "symmetric.onnx", manifest)
        values.append(run_engine(engine, inputs)[0].astype(int))
        engine.close()
    assert np.abs(values[0] - values[1]).mean() < 1 and len(np.unique(values[0])) > 16


@pytest.mark.slow
def test_real_builder_refuses_wrong_shapes(exported: tuple[Manifest, Path], trt: Any) -> None:
    """Other inputs, and shapes that contradict each other, are refused by name."""
    manifest, folder = exported
    shapes = shapes_of(manifest, 4)
    smallest, best, largest = shapes["labels"]
    for profile, what in (
        ({"labels": shapes["labels"]}, r"takes \['labels', 'noise', 'style'\]"),
        ({**shapes, "labels": (largest, best, smallest)}, "refuses the shapes labels"),
        ({**shapes, "labels": (smallest[:2], best[:2], largest[:2])}, "has 4 dimensions"),
    ):
        with pytest.raises(BuildError, match=what):
            build(folder / "model.onnx", profile, BuildOptions(), target=FOR_RTX, trt=trt)


Steps = Sequence[tuple[str, Sequence[str], str, dict[str, Any]]]
# What reads the mask first, by what TensorRT for RTX says of it. ONNX Runtime takes all of them.
F, I16, I32, U8 = TensorProto.FLOAT, TensorProto.INT16, TensorProto.INT32, TensorProto.UINT8
CAST = ("Cast", ["labels"], "x", {"to": F})
CONV = ("Conv", ["x", "w"], "y", {"pads": [1, 1, 1, 1]})
CASES: dict[str, tuple[bool, Steps]] = {
    "uint8 → FLOAT → Conv": (True, [CAST, CONV]),
    "uint8 → INT32 → FLOAT": (
        True,
        [("Cast", ["labels"], "i", {"to": I32}), ("Cast", ["i"], "y", {"to": F})],
    ),
    "uint8 in Slice": (
        False,
        [("Slice", ["labels", "0", "1", "1"], "s", {}), ("Cast", ["s"], "y", {"to": F})],
    ),
    "uint8 in Equal": (
        False,
        [("Equal", ["labels", "three"], "e", {}), ("Cast", ["e"], "y", {"to": F})],
    ),
    "uint8 in OneHot": (
        False,
        [("OneHot", ["labels", "depth", "values"], "o", {}), ("Cast", ["o"], "y", {"to": F})],
    ),
    "INT16 output": (False, [CAST, CONV, ("Cast", ["y"], "z", {"to": I16})]),
    "antialiased Resize": (
        False,
        [CAST, ("Resize", ["x", "", "double"], "y", {"mode": "linear", "antialias": 1})],
    ),
    "nearest Resize": (True, [CAST, ("Resize", ["x", "", "double"], "y", {"mode": "nearest"})]),
    "transposed convolution": (True, [CAST, ("ConvTranspose", ["x", "up"], "y", {})]),
    "DepthToSpace": (
        True,
        [
            CAST,
            ("Conv", ["x", "four"], "c", {"pads": [1, 1, 1, 1]}),
            ("DepthToSpace", ["c"], "y", {"blocksize": 2}),
        ],
    ),
    "GroupNormalization": (
        True,
        [CAST, ("GroupNormalization", ["x", "s1", "s1"], "y", {"num_groups": 1})],
    ),
    "InstanceNormalization": (True, [CAST, ("InstanceNormalization", ["x", "s1", "s1"], "y", {})]),
    "RandomNormalLike": (True, [CAST, ("RandomNormalLike", ["x"], "y", {})]),
    "INT8, symmetric": (
        True,
        [
            CAST,
            ("QuantizeLinear", ["x", "step", "i8"], "q", {}),
            ("DequantizeLinear", ["q", "step", "i8"], "d", {}),
            ("Conv", ["d", "w"], "y", {}),
        ],
    ),
    "INT8, unsigned": (
        False,
        [
            CAST,
            ("QuantizeLinear", ["x", "step", "u128"], "q", {}),
            ("DequantizeLinear", ["q", "step", "u128"], "d", {}),
            ("Conv", ["d", "w"], "y", {}),
        ],
    ),
    "INT32 bias": (
        False,
        [
            CAST,
            ("DequantizeLinear", ["bias", "step"], "b", {}),
            ("Conv", ["x", "w", "b"], "y", {}),
        ],
    ),
}
CONSTANTS: dict[str, Any] = {
    "w": np.ones((1, 1, 3, 3), np.float32),
    "four": np.ones((4, 1, 3, 3), np.float32),
    "up": np.ones((1, 1, 2, 2), np.float32),
    "s1": np.ones(1, np.float32),
    "double": np.array([1, 1, 2, 2], np.float32),
    "0": np.array([0], np.int64),
    "1": np.array([1], np.int64),
    "three": np.uint8(3),
    "depth": np.int64(8),
    "values": np.array([0, 1], np.uint8),
    "step": np.float32(0.5),
    "i8": np.int8(0),
    "u128": np.uint8(128),
    "bias": np.array([3], np.int32),
}


def written(steps: Steps, path: Path) -> Path:
    """A graph of one input `labels`, uint8 (1, 1, 16, 16), whose last step is its output."""
    used = {name for _, names, _, _ in steps for name in names}
    constants = [numpy_helper.from_array(v, k) for k, v in CONSTANTS.items() if k in used]
    nodes = [helper.make_node(op, list(names), [out], **o) for op, names, out, o in steps]
    kind = next((options["to"] for _, _, _, options in steps[-1:] if "to" in options), F)
    output = helper.make_tensor_value_info(steps[-1][2], kind, None)
    labels = helper.make_tensor_value_info("labels", U8, [1, 1, 16, 16])
    graph = helper.make_graph(nodes, "g", [labels], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_parser_answer_is_pinned(name: str, trt: Any, tmp_path: Path) -> None:
    """What TensorRT's parser takes and refuses, so that a graph it would refuse never lands."""
    accepted, steps = CASES[name]
    path = written(steps, tmp_path / "model.onnx")
    logger = collecting_logger(trt, [])

    def parsed() -> Any:
        return parse(trt, trt.Builder(logger), logger, path)

    if accepted:
        assert parsed().num_layers > 0
        return
    with pytest.raises(BuildError, match=r"does not take model.onnx, \d+ errors") as caught:
        parsed()
    assert caught.value.rows and caught.value.exit_code == 1


RUNTIME = """
import sys, {module} as trt
logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
runtime = trt.Runtime(logger)
plan = open(sys.argv[1], "rb").read()
print(runtime.get_engine_validity(plan)[0].name, runtime.deserialize_cuda_engine(plan))
"""


@pytest.mark.slow
def test_rtx_runtime_without_driver_survives(
    exported: tuple[Manifest, Path], trt: Any, tmp_path: Path
) -> None:
    """Unlike the lean runtime it does not end the process: it says that the engine is not valid."""
    if why_no_gpu() is None:
        pytest.skip("there is a GPU")
    manifest, folder = exported
    (tmp_path / "plan").write_bytes(built(folder / "model.onnx", manifest, trt).plan)
    place = Path(trt.__file__).parent.parent
    code = RUNTIME.format(module=trt.__name__)
    done = python(code, str(tmp_path / "plan"), path=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "INVALID None"  # after what TensorRT itself prints


@pytest.mark.slow
def test_rtx_build_stops_on_ctrl_c(exported: tuple[Manifest, Path], trt: Any) -> None:
    """A build that is interrupted ends without an engine and without an exception in TensorRT."""
    manifest, folder = exported

    def interrupt(phase: str, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    stop: Callable[[str, int, int], None] = interrupt
    with pytest.raises(KeyboardInterrupt):
        build(
            folder / "model.onnx",
            shapes_of(manifest, 4),
            BuildOptions(),
            target=FOR_RTX,
            trt=trt,
            on_progress=stop,
        )
