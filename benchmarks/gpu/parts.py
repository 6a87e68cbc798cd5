"""TensorRT, ONNX Runtime and torch on a GPU, one means at a time.

These are what our engines are made of, and what can only be seen on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.bare import Bare, require
from benchmarks.gpu.case import (
    BATCH,
    FP16,
    FP32,
    Absent,
    Case,
    against_cpu,
    graph_of,
    lean_module,
    module,
    need_gpu,
    parity,
)
from benchmarks.gpu.model import draw, hu, random_graph
from benchmarks.gpu.torch_engine import loopback
from export.precision_audit import LEAST_HALF
from runtime.engines.gpu.probe import device


def gpu(case: Case) -> str:
    """There is an NVIDIA GPU with a driver.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    need_gpu()
    nvidia = device()
    return f"{nvidia}, driver for CUDA {nvidia.driver[0]}.{nvidia.driver[1]}"


def half_torch(case: Case) -> str:
    """FP16 weights and tensor cores keep the picture, whatever engine runs them.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    need_gpu()
    torch = module("torch")
    if not torch.cuda.is_available():
        raise Absent("this torch has no CUDA")
    from export.graph import to_fp16

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    manifest, graph = random_graph()
    inputs = {name: torch.from_numpy(array) for name, array in draw(manifest, BATCH).items()}
    with torch.inference_mode():
        expected = hu(graph(**inputs).numpy())
        generated = to_fp16(graph).cuda()(
            **{name: tensor.cuda() for name, tensor in inputs.items()}
        )
    return parity(hu(generated.cpu().numpy()), expected, FP16)


def parse_uint8(case: Case) -> str:
    """TensorRT parses the graph's uint8 inputs and output.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    trt = tensorrt()
    from export.to_tensorrt import parse
    from runtime.engines.gpu.tensorrt import collecting_logger

    logger = collecting_logger(trt, [])
    network = parse(trt, trt.Builder(logger), logger, graph_of(case))
    types = [network.get_input(n).dtype.name for n in range(network.num_inputs)] + [
        network.get_output(0).dtype.name
    ]
    expected = [
        {"uint8": "UINT8", "float32": "FLOAT"}[t.dtype]
        for t in (*case.manifest.inputs, case.manifest.output)
    ]
    require(types == expected, f"the network's tensors are {types}, not {expected}")
    return f"{network.num_layers} layers, inputs and output {' '.join(types)}"


def build_compatible(case: Case) -> str:
    """Build an engine as build_engine.py does, and list it.

    It is built, its types are counted, and it is read back. The later checks are its parity check.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    tensorrt()
    from export.attach_engine import add_engine
    from export.to_tensorrt import CLASSIC, BuildOptions

    if CLASSIC.file in case.manifest.files:
        return f"{CLASSIC.file} is in the model already"
    graph_of(case)
    began = time.perf_counter()
    options = BuildOptions(max_batch=BATCH, timing_cache=case.work / "timing.cache")
    manifest = add_engine(
        case.model, options, lambda manifest: {}, gpu=device(), say=lambda text: None, quiet=True
    )
    entry = manifest.files[CLASSIC.file]
    return (
        f"{entry.bytes / 2**20:.1f} MiB in {time.perf_counter() - began:.0f} s,"
        f" {100 * entry.facts['half_network']:.0f} % of the network's convolutions FP16"
    )


def build_rtx(case: Case) -> str:
    """Build an engine of TensorRT for RTX as build_engine.py does, and list it.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    need_gpu()
    from export.attach_engine import add_engine
    from export.to_tensorrt import FOR_RTX, BuildOptions, why_not

    if missing := why_not(FOR_RTX):
        raise Absent(missing.fact)
    if FOR_RTX.file in case.manifest.files:
        return f"{FOR_RTX.file} is in the model already"
    graph_of(case)
    began = time.perf_counter()
    manifest = add_engine(
        case.model,
        BuildOptions(max_batch=BATCH),
        None,
        gpu=None,
        say=lambda text: None,
        target=FOR_RTX,
        quiet=True,
    )
    entry = manifest.files[FOR_RTX.file]
    return f"{entry.bytes / 2**20:.1f} MiB in {time.perf_counter() - began:.0f} s"


def build_native(case: Case) -> str:
    """Native engines: the inspector counts FP16 layers, and the full runtime keeps the picture.

    FP16 and FP32, the latter without TF32.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    trt = tensorrt()
    from export.precision_audit import half_convolutions, inspect_plan
    from export.to_tensorrt import BuildOptions, build, shapes_of
    from runtime.engines.gpu.tensorrt import collecting_logger

    shapes, cache, lines = shapes_of(case.manifest, BATCH), case.work / "timing.cache", []
    for precision, limits in (("fp16", FP16), ("fp32", FP32)):
        options = BuildOptions(
            precision=precision, native=True, max_batch=BATCH, timing_cache=cache
        )
        plan = build(graph_of(case, precision), shapes, options, trt=trt).plan
        inspection = inspect_plan(trt, plan, shapes, native=True, logger=collecting_logger(trt, []))
        require(inspection.information is not None, f"not inspected: {inspection.reason}")
        half, convolutions = half_convolutions(inspection.information or {})
        require(
            convolutions and half >= LEAST_HALF * convolutions * (precision == "fp16"),
            f"{half} of {convolutions} convolutions are FP16",
        )
        text = against_cpu(case, Bare("tensorrt", plan, case.manifest, BATCH).run, limits)
        memory = sum(inspection.activations or ()) / 2**20
        lines.append(
            f"{precision}: {half} of {convolutions} convolutions FP16, {memory:.0f} MiB of"
            f" activations, {text}"
        )
    return "; ".join(lines)


def lean_loads(case: Case) -> str:
    """The lean runtime loads a version-compatible engine and keeps the picture.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    bare = Bare(lean_module(), _plan(case), case.manifest, BATCH)
    return against_cpu(case, bare.run)


def lean_managed(case: Case) -> str:
    """The lean engine computes the same with activations in memory that we allocate.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    return _same(case, managed=True)


def captured(case: Case) -> str:
    """The lean engine computes the same as a CUDA graph with its copies.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    return _same(case, managed=True, captured=True)


def ort_cuda(case: Case) -> str:
    """ONNX Runtime's CUDA provider keeps the picture, with no fallback to the CPU.

    Args:
        case: The model and the folder to work in.

    Returns:
        A line about what was seen.

    Raises:
        Absent: A package, a file or the GPU is missing.
        RuntimeError: The check fails.
    """
    need_gpu()
    ort = module("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Absent("this onnxruntime has no CUDA provider (onnxruntime-gpu has)")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(
        str(graph_of(case)), options, providers=["CUDAExecutionProvider"]
    )
    require(
        session.get_providers()[0] == "CUDAExecutionProvider",
        f"it runs on {session.get_providers()}",
    )
    return against_cpu(case, lambda inputs: session.run(None, inputs)[0])


def tensorrt() -> Any:
    """The full TensorRT module.

    Raises:
        Absent: It or the GPU is missing.
    """
    need_gpu()
    return module("tensorrt")


def _plan(case: Case) -> bytes:
    """The model's own engine, if the lean runtime can take it."""
    name = case.manifest.file_of("engine", "fp16")
    if name is None or not case.manifest.files[name].facts.get("version_compatible"):
        raise Absent("the model holds no version-compatible FP16 engine")
    case.manifest.verify(case.model, [name])
    return (case.model / name).read_bytes()


def _same(case: Case, **options: bool) -> str:
    """Compare the lean engine with `options` to the one without, on two sets of inputs."""
    name, plan = lean_module(), _plan(case)
    plain, special = (
        Bare(name, plan, case.manifest, BATCH),
        Bare(name, plan, case.manifest, BATCH, **options),
    )
    for seed in (3, 4):
        inputs = draw(case.manifest, BATCH, seed)
        require(
            np.array_equal(plain.run(inputs), special.run(inputs)),
            f"other values with {', '.join(options)}",
        )
    return "the same bytes on two sets of inputs"


CHECKS: dict[str, tuple[str, Callable[[Case], str]]] = {
    "gpu": ("an NVIDIA GPU and its driver", gpu),
    "half": ("the FP16 graph on the GPU, in torch: HU parity", half_torch),
    "loopback": ("our memory and streams: a CUDA graph of copies", loopback),
    "uint8": ("TensorRT parses uint8 in and out", parse_uint8),
    "build": ("uint8 pairs stack under strong typing: the engine builds", build_compatible),
    "lean": (
        "the lean runtime loads VERSION_COMPATIBLE + EXCLUDE_LEAN_RUNTIME: HU parity",
        lean_loads,
    ),
    "managed": ("USER_MANAGED activations in the lean runtime", lean_managed),
    "captured": ("a CUDA graph of the lean engine with its copies", captured),
    "native": ("native engines: share of FP16 layers, HU parity of FP16 and FP32", build_native),
    "rtx": ("TensorRT for RTX builds the engine", build_rtx),
    "ort": ("ONNX Runtime CUDA, no fallback to the CPU: HU parity", ort_cuda),
}
