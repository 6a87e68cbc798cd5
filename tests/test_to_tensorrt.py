"""The TensorRT builder through success and every refusal, on a stand-in that is strict
(fake_tensorrt.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import SimpleITK as sitk
from fake_tensorrt import Script, tensorrt
from onnx import TensorProto, helper, numpy_helper
from samples import write_fake_model

import export.attach_engine
import export.precision_audit
from export.attach_engine import add_engine, parity_checker, progress
from export.build_engine import _required_but_missing, _targets
from export.graph import LabelsToIntensity
from export.model_card import CARD
from export.precision_audit import half_weights
from export.to_tensorrt import CLASSIC, BuildOptions, build, shapes_of, why_not
from runtime import Synthesizer
from runtime.core.atomic_files import sha256_of
from runtime.core.errors import BuildError, MissingComponent, ModelError, OutputError, ParityError
from runtime.core.manifest import Manifest, ModelFile
from runtime.engines.cpu.onnxruntime import OnnxEngine
from runtime.engines.fake import fake_manifest
from runtime.engines.gpu.probe import Device
from runtime.engines.registry import Backend
from train.checkpoint import load_generator, load_run, load_validation

ENGINE, LAYERS = CLASSIC.file, CLASSIC.layers
GPU = Device(0, "NVIDIA Test", (8, 9), 24 << 30, (13, 0))
MEASURED = {
    "slices": 64,
    "masks": 64,
    "mean": 0.1,
    "p99_9": 1.0,
    "max": 3,
    "body_mean": 0.1,
    "body_p99_9": 1.0,
    "body_max": 3,
    "differing": 0.1,
    "organs": {},
    "dssim": 0.0,
}
PROOF = {
    "tensorrt": {
        "engine": "tensorrt_lean",
        "slices_per_second": 1.0,
        "validation masks": MEASURED,
        "random labels": MEASURED,
    }
}


def write_graph(path: Path, weights: Any = np.float16) -> None:
    """labels → a convolution with `weights`' type → a tail in FP32. What it computes is of no
    interest here.
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(weights))
    nodes = [
        helper.make_node("Cast", ["labels"], ["a"], "cast_in", to=kind),
        helper.make_node("Conv", ["a", "kernel"], ["b"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("ConvTranspose", ["b", "up"], ["c"], "conv_up"),
        helper.make_node("Cast", ["c"], ["d"], "cast_out", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["d", "scale"], ["ct"], "tail"),
    ]
    tensors = [
        numpy_helper.from_array(np.zeros((4, 1, 3, 3), weights), "kernel"),
        numpy_helper.from_array(np.zeros((4, 1, 1, 1), weights), "up"),
        numpy_helper.from_array(np.full((1, 1, 4, 2), 0.5, np.float32), "scale"),
    ]
    inputs = [
        helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", 1, "H", "W"]),
        helper.make_tensor_value_info("noise", TensorProto.UINT8, ["N", "H", "W"]),
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("ct", TensorProto.FLOAT, None)], tensors
    )
    onnx.save(helper.make_model(graph), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with an FP16 and an FP32 graph, before any engine."""
    folder = write_fake_model(tmp_path / "model", fake_manifest())
    files = {}
    for name, kind in (("model.onnx", np.float32), ("model.fp16.onnx", np.float16)):
        write_graph(folder / name, kind)
        files[name] = ModelFile(
            "onnx",
            "fp16" if "fp16" in name else "fp32",
            (folder / name).stat().st_size,
            sha256_of(folder / name),
        )
    return write_fake_model(folder, replace(Manifest.load(folder), files=files))


@pytest.fixture
def lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file where the lean runtime's library would lie."""
    library = tmp_path / "libnvinfer_lean.so.11"
    library.touch()
    monkeypatch.setattr(export.precision_audit, "lean_library", lambda: library)
    return library


def add(
    folder: Path, script: Script, options: BuildOptions | None = None, check_parity: Any = None
) -> tuple[Manifest, list[str]]:
    said: list[str] = []

    def proof(manifest: Manifest) -> Mapping[str, Any]:
        manifest.verify(folder, [ENGINE])  # what is validated is what is listed
        return PROOF

    made = add_engine(
        folder,
        options or BuildOptions(),
        check_parity or proof,
        gpu=GPU,
        say=said.append,
        quiet=True,
        trt=tensorrt(script),
    )
    return made, said


def untouched(folder: Path) -> bool:
    """The validated ONNX model, whole, without an engine or a half-written file."""
    manifest, found = Manifest.load(folder), {p.name for p in folder.iterdir()} - {CARD}
    manifest.verify(folder, manifest.files)
    return (
        found
        == {"manifest.json", "model.fp16.onnx", "model.onnx"}
        == {*manifest.files, "manifest.json"}
    )


@pytest.mark.parametrize("version", ["10.13.2.6", "11.4.0.106"])
def test_engine_built_from_manifest_and_listed(version: str, folder: Path, lean: Path) -> None:
    """The engine is built as the manifest says and is listed with its facts."""
    script = Script(version=version)
    made, _ = add(folder, script)
    assert script.log == [
        "parse",
        f"WORKSPACE {2 << 30}",
        "shape labels (1, 1, 32, 32) (8, 1, 32, 32) (8, 1, 64, 64)",
        "shape noise (1, 32, 32) (8, 32, 32) (8, 64, 64)",
        # and no TF32
        "build EXCLUDE_LEAN_RUNTIME VERSION_COMPATIBLE SAME_COMPUTE_CAPABILITY DETAILED",
    ]
    assert made == Manifest.load(folder)
    made.verify(folder, made.files)
    engine = made.files[ENGINE]
    assert (engine.kind, engine.precision, made.file_of("engine", "fp16")) == (
        "engine",
        "fp16",
        ENGINE,
    )
    assert engine.facts == {
        "tensorrt": version,
        "gpu": "NVIDIA Test",
        "compute_capability": [8, 9],
        "hardware": "same",
        "version_compatible": True,
        "profiles": [
            {
                "labels": {"min": [1, 1, 32, 32], "opt": [8, 1, 32, 32], "max": [8, 1, 64, 64]},
                "noise": {"min": [1, 32, 32], "opt": [8, 32, 32], "max": [8, 64, 64]},
            }
        ],
        "device_memory": [4096],
        "workspace": 2 << 30,
        "onnx_sha256": sha256_of(folder / "model.fp16.onnx"),
        "half_network": 1.0,
        "half_convolutions": 2,
        "convolutions": 2,
    }
    assert made.parity[ENGINE] == PROOF and ENGINE in (folder / CARD).read_text()
    layers = json.loads((folder / LAYERS).read_text())
    assert {"name": "conv", "type": "CONVOLUTION", "outputs": ["HALF"]} in layers["network"]
    assert {"name": "tail", "type": "ELEMENTWISE", "outputs": ["FLOAT"]} in layers["network"]
    assert {
        "Name": "conv_up",
        "LayerType": "DECONVOLUTION",
        "Outputs": [{"Format/Datatype": "Half"}],
    } in layers["engine"]["Layers"]


def test_engine_is_validated_like_graphs(
    model: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime stands in for the GPU: the engine is measured against the network, by FP16's
    limits, and a wrong one is found.
    """
    backend = Backend("tensorrt", ("engine", "fp16"), "onnxruntime", "", OnnxEngine)
    monkeypatch.setattr(export.attach_engine, "BACKENDS", (backend,))
    run, manifest = load_run(trained), Manifest.load(model)
    graph = LabelsToIntensity(load_generator(trained), len(run.labels), run.intensity)
    check_parity = parity_checker(graph, load_validation(run), tmp_path, "fp16")
    shutil.copy(model / "model.fp16.onnx", tmp_path / ENGINE)
    proof = check_parity(manifest)["tensorrt"]
    assert proof["validation masks"]["slices"] >= 64 and 0 < proof["validation masks"]["mean"] <= 1
    broken = onnx.load(model / "model.fp16.onnx")
    kernel = max(broken.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    kernel.raw_data = bytes(len(kernel.raw_data))
    onnx.save(broken, tmp_path / ENGINE)
    with pytest.raises(
        ParityError, match=r"model.engine in tensorrt synthesizes other values than the network"
    ):
        check_parity(manifest)
    monkeypatch.setattr(
        export.attach_engine,
        "BACKENDS",
        (replace(backend, why=lambda: ("there is no GPU", "use one")),),
    )
    with pytest.raises(
        MissingComponent, match=r"model.engine cannot be validated: there is no GPU"
    ):
        check_parity(manifest)


def test_engine_options_reach_builder(folder: Path) -> None:
    script = Script()
    made, _ = add(
        folder,
        script,
        BuildOptions(
            precision="fp32", native=True, hardware="this", max_batch=3, workspace=1 << 20
        ),
    )
    assert script.log[1:3] == [
        f"WORKSPACE {1 << 20}",
        "shape labels (1, 1, 32, 32) (3, 1, 32, 32) (3, 1, 64, 64)",
    ]
    assert script.log[-1] == "build NONE DETAILED"
    facts = made.files[ENGINE].facts
    assert (made.files[ENGINE].precision, facts["version_compatible"], facts["hardware"]) == (
        "fp32",
        False,
        "this",
    )
    assert facts["onnx_sha256"] == sha256_of(folder / "model.onnx")
    script = Script()
    add(folder, script, BuildOptions(native=True, hardware="ampere+"))
    assert script.log[-1] == "build AMPERE_PLUS DETAILED"


def test_engine_of_canvas_model_fixes_size() -> None:
    """The engine of a model that fits slices to its canvas takes no other size."""
    profile = shapes_of(fake_manifest(pixel_spacing=None, slices=3), 4)
    assert profile["labels"] == ((1, 3, 32, 32), (4, 3, 32, 32), (4, 3, 32, 32))


def test_engine_refused_profile_names_shapes(folder: Path) -> None:
    with pytest.raises(
        BuildError,
        match=(
            r"refuses the shapes labels \(1, 1, 32, 32\) … \(8, 1, 32, 32\) … \(8, 1, 64, 64\);"
            r" noise"
        ),
    ):
        add(folder, Script(refuses_profile=True))
    assert untouched(folder)


def test_failed_engine_build_quotes_tensorrt(folder: Path) -> None:
    with pytest.raises(
        BuildError,
        match=r"no engine from model.fp16.onnx: out of device memory; no tactic for conv",
    ):
        add(folder, Script(builds=False, errors=("out of device memory", "no tactic for conv")))
    assert untouched(folder)


def test_engine_timing_cache_per_gpu(folder: Path, tmp_path: Path, lean: Path) -> None:
    """The timing cache is kept, and one of another GPU is not used."""
    options = BuildOptions(timing_cache=tmp_path / "caches" / "timing.bin")
    script = Script()
    assert "new" in add(folder, script, options)[1][1] and "timing cache of 0 bytes" in script.log
    assert options.timing_cache.read_bytes() == b"timings of this GPU"
    script = Script()
    assert (
        "19 bytes" in add(folder, script, options)[1][1]
        and "timing cache of 19 bytes" in script.log
    )
    for other in (b"timings of that GPU", b"no timing cache at all"):
        options.timing_cache.write_bytes(other)
        script = Script()
        assert (
            "started empty" in add(folder, script, options)[1][1]
            and "timing cache of 0 bytes" in script.log
        )
        assert options.timing_cache.read_bytes() == b"timings of this GPU"


def test_engine_full_disk_keeps_onnx_model(folder: Path, lean: Path) -> None:
    """RLIMIT_FSIZE makes every write past 64 bytes fail, as a full disk does: the engine is the
    first of them.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OutputError, match=ENGINE):
            add(folder, Script())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert untouched(folder)


def test_engine_fp16_that_is_fp32_refused(folder: Path, lean: Path, tmp_path: Path) -> None:
    """An FP16 engine is refused, whichever step turned it into FP32."""
    assert (
        half_weights(folder / "model.fp16.onnx") == 1 and half_weights(folder / "model.onnx") == 0
    )
    for where, what in (
        ("network", "the convolutions TensorRT parsed"),
        ("engine", "the built engine's convolutions"),
    ):
        with pytest.raises(BuildError, match=f"only 0 % of {what} are FP16"):
            add(folder, Script(forgets_half=where))
        assert untouched(folder)
    single = write_fake_model(tmp_path / "single", fake_manifest())
    shutil.copy(folder / "model.onnx", single)
    file = ModelFile(
        "onnx", "fp16", (single / "model.onnx").stat().st_size, sha256_of(single / "model.onnx")
    )
    write_fake_model(single, replace(Manifest.load(single), files={"model.onnx": file}))
    with pytest.raises(BuildError, match="only 0 % of its weights are FP16"):
        add(single, script := Script())
    assert script.log == []  # refused before minutes of building


def test_unreadable_engine_is_reported(
    folder: Path, lean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = add(folder, Script(loads=False))[0].files[ENGINE].facts
    assert (
        facts["device_memory"] is None
        and facts["not_inspected"] == "TensorRT does not load the engine back here"
    )
    monkeypatch.setattr(export.precision_audit, "lean_library", lambda: None)
    facts = add(folder, Script())[0].files[ENGINE].facts
    assert (
        "tensorrt-lean-cu13-libs is not installed" in facts["not_inspected"]
        and facts["half_network"] == 1
    )
    assert "tensorrt-lean-cu13-libs" in json.loads((folder / LAYERS).read_text())["reason"]


def test_engine_failing_validation_is_removed(folder: Path, lean: Path) -> None:
    """An engine that fails its validation is removed, and so is the one before it."""
    add(folder, Script())

    def wrong(manifest: Manifest) -> Mapping[str, Any]:
        raise ParityError("model.engine synthesizes other values")

    with pytest.raises(ParityError):
        add(folder, Script(), check_parity=wrong)
    assert untouched(folder) and ENGINE not in (folder / CARD).read_text()


def test_engine_missing_or_altered_graph_refused(folder: Path) -> None:
    """A missing or altered graph is refused before the build."""
    (folder / "model.fp16.onnx").write_bytes((folder / "model.fp16.onnx").read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model.fp16.onnx is not the file its manifest describes"):
        add(folder, script := Script())
    write_fake_model(folder, replace(Manifest.load(folder), files={}))
    with pytest.raises(ModelError, match="holds no fp16 graph"):
        add(folder, script)
    assert script.log == []


def test_engine_progress_counts_outermost_phase(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    profile = shapes_of(Manifest.load(folder), 8)
    build(
        folder / "model.fp16.onnx",
        profile,
        BuildOptions(),
        trt=tensorrt(Script()),
        on_progress=lambda *step: seen.append(step),
    )
    assert seen == [("Building Engine", 1, 3), ("Building Engine", 2, 3), ("Building Engine", 3, 3)]


def test_engine_phase_is_one_progress_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = shapes_of(Manifest.load(folder), 8)
    for quiet, lines in ((False, ["Building Engine 3/3", "Building Engine 3/3 in"]), (True, [])):
        build(
            folder / "model.fp16.onnx",
            profile,
            BuildOptions(),
            trt=tensorrt(Script()),
            on_progress=progress(quiet),
        )
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(lines) and all(
            line.startswith(start) for line, start in zip(said, lines, strict=True)
        )


VERSIONS = [
    ("10.0.1", False),
    ("10.12.0.36", False),
    ("10.13.2.6", True),
    ("11.4.0.106", True),
    ("12.0.0", False),
]


@pytest.mark.parametrize(("version", "served"), VERSIONS)
def test_tensorrt_of_other_version_is_named(
    version: str, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    missing = why_not()
    named = missing is not None and f"tensorrt {version} is installed" in missing.fact
    assert named is not served


@pytest.mark.slow  # two whole exports
def test_export_without_gpu_succeeds(trained: Path, command, tmp_path: Path) -> None:
    """Without a GPU the export succeeds and says in one line what can be added; who requires an
    engine gets exit 3, and the same ONNX model.
    """
    if why_not() is None:
        pytest.skip("there is a GPU and a TensorRT: this machine builds engines")
    model = tmp_path / "model"
    done = command("export/build_engine.py", trained, "-o", model, "--target", "auto")
    assert done.returncode == 0, done.stderr
    (line,) = [row for row in done.stderr.splitlines() if "engines that can be added" in row]
    assert '".[tensorrt]"' in line and "on a machine with an NVIDIA GPU" in line
    assert done.stderr.count("NVIDIA GPU") == 1  # no wall of GPU text on a healthy run
    done = command("export/build_engine.py", trained, "-o", model, "--target", "tensorrt")
    assert done.returncode == MissingComponent.exit_code == 3, done.stderr
    # before the graphs are written, and at the end
    assert done.stderr.count("no engine of TensorRT can be built here") == 2
    assert "nvidia-smi" in done.stderr and 'pip install -e ".[tensorrt]"' in done.stderr
    assert f"python -m runtime synth MASK --model {model}" in done.stderr
    assert "Traceback" not in done.stderr
    manifest = Manifest.load(model)
    manifest.verify(model, manifest.files)
    assert manifest.file_of("onnx", "fp32") and not manifest.file_of("engine", "fp16")
    with Synthesizer.open(model, backend="onnx") as synth:
        ct = synth(sitk.GetImageFromArray(np.full((2, 16, 16), 205, np.uint16)))
    assert ct.GetSize() == (16, 16, 2)


@pytest.mark.parametrize(
    ("arguments", "missing", "named"),
    [
        ([], ["tensorrt", "rtx"], None),
        (["--require-engine"], ["tensorrt", "rtx"], "rtx"),  # what this machine can do first
        (["--require-engine"], ["tensorrt"], None),
        (["--target", "rtx"], ["rtx"], "rtx"),
        (["--target", "tensorrt"], ["tensorrt"], "tensorrt"),
    ],
)
def test_missing_engine_matters_if_required(
    arguments: list[str], missing: list[str], named: str | None
) -> None:
    options = argparse.Namespace(
        target=arguments[1] if "--target" in arguments else "auto",
        require_engine="--require-engine" in arguments,
    )
    why = {name: MissingComponent(name) for name in missing}
    lacking = _required_but_missing(options, _targets(options.target), why)
    assert (lacking and lacking.fact) == named
